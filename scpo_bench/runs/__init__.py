"""Runs: one cell trained and recorded (``harness``), many cells in processes (``launch``)."""
