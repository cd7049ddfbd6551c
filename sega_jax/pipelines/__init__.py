"""Pipelines: load a checkpoint, check the arguments of a call, run it and return its pictures."""
