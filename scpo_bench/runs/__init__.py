"""Running cells: one cell into one run folder, many cells in processes, and resuming."""
