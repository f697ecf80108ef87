"""Opening an engine: its actors made, joined and run in one nursery."""
