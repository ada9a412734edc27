"""Suites files -> validated suites -> cells, and the names of agents and tasks."""
