"""`python -m sega_jax` is `sega-jax`."""

from sega_jax.cli import main

main()
