"""Reads parameters from files and writes them back. Each family of checkpoints passes its own tables of names."""
