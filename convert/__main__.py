"""`sega-jax-convert`, which is `python -m convert`."""

from typing import Any

import click

from convert.conversion import DTYPES, convert
from convert.paella import convert_paella, is_published
from convert.single import convert_single
from convert.writers import FORMS
from sega_jax.pipelines.loading import PREDICTIONS
from sega_jax.pipelines.progress import plainly
from sega_jax.weights.single_file import is_one

SINGLE, PAELLA = "single files", "Paella's published files"
# The options that only they have.
_OF = dict.fromkeys(("byt5", "openclip"), PAELLA)
_OF |= dict.fromkeys(("tokenizer", "config", "prediction_type", "ema"), SINGLE)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.argument("dest")
@click.option(
    "--to",
    type=click.Choice(list(FORMS)),
    help="The form to write.  [default: orbax; of Paella's files and single files, diffusers]",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Casts the weights.  [default: as they are]")
@click.option("--variant", help='Of the weight files to read, such as "fp16".')
@click.option("--byt5", help="Paella: the folder of google/byt5-xl, to go with it.")
@click.option("--openclip", help="Paella: the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, to go with it.")
@click.option("--tokenizer", help="Single files: a folder with CLIP's vocabulary, vocab.json and merges.txt.")
@click.option(
    "--config", help="Single files: a folder in diffusers layout whose configs it has.  [default: as published]"
)
@click.option(
    "--prediction-type",
    type=click.Choice(PREDICTIONS),
    help="Single files: what the UNet predicts.  [default: epsilon for Stable Diffusion 1.x, v_prediction for 2.x]",
)
@click.option("--ema", is_flag=True, help="Single files: the UNet's moving average, where there is one.")
@click.version_option(package_name="sega_jax")
def main(source: str, dest: str, to: str | None, variant: str | None, **options: Any) -> None:
    """Writes the checkpoint in the folder SOURCE to the folder DEST: from diffusers layout (.safetensors or .bin)
    to Orbax, or back; or from DeepFloyd-IF's own layout (config.yml and pytorch_model.bin) to either; or from Paella's
    published files (paella_v3.pt, vqgan_f4.pt, prior_v1.pt) to either. Or SOURCE is Stable Diffusion 1.x or 2.x in a
    single file (.safetensors or .ckpt)."""
    with plainly():
        kind = SINGLE if is_one(source) else PAELLA if is_published(source) else None
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
