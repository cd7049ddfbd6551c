"""The description of a sweep: its file, its axes, its settings and its points."""
