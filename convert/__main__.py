"""`sega-jax-convert`, which is `python -m convert`."""

import click

from convert.conversion import DTYPES, convert
from convert.writers import FORMS
from sega_jax.cli import plainly


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.argument("dest")
@click.option("--to", type=click.Choice(list(FORMS)), default="orbax", help="The form to write.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Casts the weights.  [default: as they are]")
@click.option("--variant", help='Of the weight files to read, such as "fp16".')
@click.version_option(package_name="sega_jax")
def main(source: str, dest: str, to: str, dtype: str | None, variant: str | None) -> None:
    """Writes the checkpoint in the folder SOURCE to the folder DEST: from diffusers layout (.safetensors or .bin)
    to Orbax, or back; or from DeepFloyd-IF's own layout (config.yml and pytorch_model.bin) to either."""
    with plainly():
        click.echo(f"Wrote {convert(source, dest, to=to, dtype=dtype, variant=variant)}")


if __name__ == "__main__":
    main()
