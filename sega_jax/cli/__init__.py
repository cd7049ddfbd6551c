"""The shell commands of `sega-jax`."""
