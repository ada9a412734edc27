"""The record of one run: its schema, its files, and what must hold between its numbers."""
