"""Reads and writes files of parameters. Each family of checkpoints supplies its own tables of names."""
