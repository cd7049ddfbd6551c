"""The `sega-jax` shell commands."""
