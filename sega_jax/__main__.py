"""`python -m sega_jax` is `sega-jax`."""

from sega_jax.cli.main import main

main()
