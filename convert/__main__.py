"""`sega-jax-convert`, which is `python -m convert`."""

import click

from convert.conversion import DTYPES, convert
from convert.paella import convert_paella, is_published
from convert.writers import FORMS
from sega_jax.shell import plainly


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.argument("dest")
@click.option(
    "--to",
    type=click.Choice(list(FORMS)),
    help="The form to write.  [default: orbax; of Paella's files, diffusers]",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Casts the weights.  [default: as they are]")
@click.option("--variant", help='Of the weight files to read, such as "fp16".')
@click.option("--byt5", help="Paella: the folder of google/byt5-xl, to go with it.")
@click.option("--openclip", help="Paella: the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, to go with it.")
@click.version_option(package_name="sega_jax")
def main(source: str, dest: str, to: str | None, variant: str | None, **options: str | None) -> None:
    """Writes the checkpoint in the folder SOURCE to the folder DEST: from diffusers layout (.safetensors or .bin)
    to Orbax, or back; or from DeepFloyd-IF's own layout (config.yml and pytorch_model.bin) to either; or from Paella's
    published files (paella_v3.pt, vqgan_f4.pt, prior_v1.pt) to either."""
    with plainly():
        if is_published(source):
            if variant:
                raise ValueError(f"variant={variant!r} is not for Paella's published files, which have none")
            made = convert_paella(source, dest, to=to or "diffusers", **options)
        else:
            if texts := [name for name in ("byt5", "openclip") if options.pop(name)]:
                raise ValueError(f"--{texts[0]} goes with Paella's published files, and {source} has none of them")
            made = convert(source, dest, to=to or "orbax", variant=variant, **options)
        click.echo(f"Wrote {made}")


if __name__ == "__main__":
    main()
