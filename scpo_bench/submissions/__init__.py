"""Records made by others: bundles, their verification, and re-running their cells."""
