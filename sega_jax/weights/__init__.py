"""Reads parameters from files and writes them back. Each family of checkpoints supplies its own tables of names."""
