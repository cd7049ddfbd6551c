"""Reads files into parameters and writes them back. Families of checkpoints pass their tables of names."""
