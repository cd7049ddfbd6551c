"""Turns text into tokens, without networks."""
