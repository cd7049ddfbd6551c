"""Pipelines with diffusers' names: they translate its arguments, defaults and results, and have no sampling loop."""
