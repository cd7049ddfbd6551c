"""Pipelines, which load a checkpoint, check the arguments of a call, run the call and return its pictures."""
