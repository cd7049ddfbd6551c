"""Tokenization and other text processing that works without networks."""
