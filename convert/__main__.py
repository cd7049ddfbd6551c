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
# {option: the only kind of source that it applies to}.
_SOURCE_KINDS = dict.fromkeys(("byt5", "openclip"), PAELLA)
_SOURCE_KINDS |= dict.fromkeys(("tokenizer", "config", "prediction_type", "ema"), SINGLE)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.argument("dest")
@click.option(
    "--to",
    type=click.Choice(FORMS),
    help="The format to write.  [default: diffusers for single files and Paella's files, otherwise orbax]",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="The dtype of the written weights.  [default: unchanged]")
@click.option("--variant", help='The variant of the weight files to read, such as "fp16".')
@click.option("--byt5", help="Paella: a folder with the first text encoder, google/byt5-xl.")
@click.option(
    "--openclip", help="Paella: a folder with the second text encoder, laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
)
@click.option("--tokenizer", help="Single files: a folder with CLIP's vocabulary, vocab.json and merges.txt.")
@click.option(
    "--config", help="Single files: a folder with configs in diffusers layout.  [default: the published ones]"
)
@click.option(
    "--prediction-type",
    type=click.Choice(PREDICTIONS),
    help="Single files: what the UNet predicts.  [default: epsilon for Stable Diffusion 1.x, v_prediction for 2.x]",
)
@click.option("--ema", is_flag=True, help="Single files: read the moving average of the UNet's weights.")
@click.version_option(package_name="sega_jax")
def main(source: str, dest: str, to: str | None, variant: str | None, **options: Any) -> None:
    """Converts the checkpoint SOURCE and writes it to the folder DEST, in diffusers layout or in Orbax format.

    SOURCE is a folder in diffusers layout (with .safetensors, .bin or Flax .msgpack files, or Orbax checkpoints), a
    DeepFloyd-IF stage in its original layout (config.yml and pytorch_model.bin), a folder with Paella's published files
    (paella_v3.pt, vqgan_f4.pt, prior_v1.pt), or a single-file Stable Diffusion 1.x, 2.x or XL checkpoint
    (.safetensors, or a pickle such as .ckpt)."""
    with plainly():
        kind = SINGLE if names_file(source) else PAELLA if is_published(source) else None
        for name, required in _SOURCE_KINDS.items():
            if options[name] and required != kind:
                raise ValueError(
                    f"--{name.replace('_', '-')} applies only to {required}, but {source} is something else; omit the"
                    " option"
                )
        options = {name: value for name, value in options.items() if _SOURCE_KINDS.get(name, kind) == kind}
        if variant and kind:
            raise ValueError(f"variant={variant!r} cannot be used, because {kind} have no variants; omit it")
        if kind == SINGLE:
            folder = convert_single(source, dest, to=to or "diffusers", **options)
        elif kind == PAELLA:
            folder = convert_paella(source, dest, to=to or "diffusers", **options)
        else:
            folder = convert(source, dest, to=to or "orbax", variant=variant, **options)
        click.echo(f"Wrote {folder}")


if __name__ == "__main__":
    main()
