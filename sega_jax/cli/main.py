"""The command `sega-jax`."""

import click

from sega_jax.cli.edit import edit
from sega_jax.cli.info import info
from sega_jax.cli.sweep import sweep
from sega_jax.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sega_jax")
def main() -> None:
    """Semantic guidance (SEGA) for text-to-image diffusion in JAX.

    Start with: sega-jax edit --prompt "a portrait of a woman" --edit "glasses"
    """


main.add_command(edit)
main.add_command(info)
main.add_command(sweep)
main.add_command(verify)
