"""The command `sega-jax`."""

import click

from sega_jax.cli.edit import edit
from sega_jax.cli.info import info
from sega_jax.cli.sweep import sweep
from sega_jax.cli.verify import verify
from sega_jax.pipelines.help_pages import WIDTH, Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH})
@click.version_option(package_name="sega_jax")
def main() -> None:
    """Makes pictures from text, and edits them by adding or removing concepts (semantic guidance).

    \b
    Start with an edit, then make many pictures at once:
      sega-jax edit --prompt "a portrait of a woman" --edit glasses
      sega-jax sweep --example > sweep.toml
      sega-jax sweep sweep.toml

    `sega-jax COMMAND --help` explains a command.
    """


main.add_command(edit)
main.add_command(info)
main.add_command(sweep)
main.add_command(verify)
