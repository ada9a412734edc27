"""scpo-bench."""
