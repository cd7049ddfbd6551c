"""What a sweep says: its file, its axes, its settings and its points."""
