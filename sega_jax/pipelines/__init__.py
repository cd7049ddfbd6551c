"""Calls to pictures: loading a checkpoint, checking a call, running it, and what it returns."""
