"""The command `sega-jax-convert`, also available as `python -m convert`."""

from typing import Any

import click

from convert.conversion import DTYPES, FORMS, convert
from convert.paella import convert_paella, is_published
from convert.single import convert_single
from sega_jax.pipelines.load_options import PREDICTIONS
from sega_jax.pipelines.progress import plainly
from sega_jax.pipelines.sources import names_file

SINGLE, PAELLA = "single files", "Paella's published files"
# Options that only these kinds of sources have.
_OF = dict.fromkeys(("byt5", "openclip"), PAELLA)
_OF |= dict.fromkeys(("tokenizer", "config", "prediction_type", "ema"), SINGLE)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.argument("dest")
@click.option(
    "--to",
    type=click.Choice(FORMS),
    help="The form to write.  [default: orbax, but diffusers for Paella's files and single files]",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Casts the weights.  [default: their own dtype]")
@click.option("--variant", help='The variant of the weight files to read, such as "fp16".')
@click.option("--byt5", help="Paella: the folder of google/byt5-xl, the first text encoder.")
@click.option("--openclip", help="Paella: the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, the second one.")
@click.option("--tokenizer", help="Single files: a folder with CLIP's vocabulary, vocab.json and merges.txt.")
@click.option("--config", help="Single files: a folder in diffusers layout with the configs.  [default: as published]")
@click.option(
    "--prediction-type",
    type=click.Choice(PREDICTIONS),
    help="Single files: what the UNet predicts.  [default: epsilon for Stable Diffusion 1.x, v_prediction for 2.x]",
)
@click.option("--ema", is_flag=True, help="Single files: read the UNet's moving average.")
@click.version_option(package_name="sega_jax")
def main(source: str, dest: str, to: str | None, variant: str | None, **options: Any) -> None:
    """Converts the checkpoint SOURCE to the folder DEST, in diffusers layout or in Orbax form.

    SOURCE is a folder in one of these forms (.safetensors, Flax's .msgpack, .bin or Orbax), a stage of DeepFloyd-IF in
    its own layout (config.yml and pytorch_model.bin), a folder with Paella's published files (paella_v3.pt,
    vqgan_f4.pt, prior_v1.pt), or Stable Diffusion 1.x, 2.x or XL in a single file (.safetensors, .ckpt or another
    pickle)."""
    with plainly():
        kind = SINGLE if names_file(source) else PAELLA if is_published(source) else None
        for name, of in _OF.items():
            if options[name] and of != kind:
                raise ValueError(f"--{name.replace('_', '-')} goes with {of}, and {source} is none")
        options = {name: value for name, value in options.items() if _OF.get(name, kind) == kind}
        if variant and kind:
            raise ValueError(f"variant={variant!r} is not for {kind}, which have none")
        if kind == SINGLE:
            made = convert_single(source, dest, to=to or "diffusers", **options)
        elif kind == PAELLA:
            made = convert_paella(source, dest, to=to or "diffusers", **options)
        else:
            made = convert(source, dest, to=to or "orbax", variant=variant, **options)
        click.echo(f"Wrote {made}")


if __name__ == "__main__":
    main()
