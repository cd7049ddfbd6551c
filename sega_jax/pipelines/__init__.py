"""Pipelines: loading a checkpoint, checking the arguments of a call, running it, and returning its pictures."""
