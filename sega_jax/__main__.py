"""`python -m sega_jax` runs the same command as `sega-jax`."""

from sega_jax.cli.main import main

main()
