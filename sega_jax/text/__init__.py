"""Tokenization and other text processing that needs no networks."""
