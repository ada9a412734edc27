"""Running many cells: local processes, one cell each."""
