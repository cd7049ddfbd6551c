"""The command `sega-jax-convert`, also available as `python -m convert`."""

from typing import Any

import click

from convert.conversion import DTYPES, FORMS, convert
from convert.paella import convert_paella, is_published
from convert.single import convert_single
from sega_jax.method.naming import assignment
from sega_jax.pipelines.help_pages import WIDTH, Command
from sega_jax.pipelines.load_options import PREDICTIONS
from sega_jax.pipelines.progress import plainly
from sega_jax.pipelines.sources import names_file

SINGLE, PAELLA = "single files", "Paella's published files"
# {option: the only kind of source that it applies to}.
_SOURCE_KINDS = dict.fromkeys(("byt5", "openclip"), PAELLA)
_SOURCE_KINDS |= dict.fromkeys(("tokenizer", "config", "prediction_type", "ema"), SINGLE)


_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": WIDTH}
_SECTIONS = {
    f"Only for {kind}": [name for name, of in _SOURCE_KINDS.items() if of == kind] for kind in (SINGLE, PAELLA)
}


@click.command(cls=Command, context_settings=_CONTEXT, sections=_SECTIONS)
@click.argument("source")
@click.argument("dest")
@click.option(
    "--to",
    type=click.Choice(FORMS),
    help="The format to write.  [default: diffusers for single files and Paella's files, otherwise orbax]",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="The number format of the written weights.  [default: unchanged]"
)
@click.option(
    "--variant",
    help='The variant of the weight files to read, such as "fp16".  [default: the files without a variant]',
)
@click.option("--byt5", metavar="FOLDER", help="The folder of the first text encoder, google/byt5-xl.")
@click.option(
    "--openclip",
    metavar="FOLDER",
    help="The folder of the second text encoder, laion/CLIP-ViT-H-14-laion2B-s32B-b79K.",
)
@click.option("--tokenizer", metavar="FOLDER", help="The folder of CLIP's vocabulary, vocab.json and merges.txt.")
@click.option(
    "--config",
    metavar="FOLDER",
    help="A folder in diffusers layout with the configuration of the networks.  [default: the published one]",
)
@click.option(
    "--prediction-type",
    type=click.Choice(PREDICTIONS),
    help="What the UNet predicts.  [default: epsilon for Stable Diffusion 1.x, v_prediction for 2.x]",
)
@click.option("--ema", is_flag=True, help="Read the moving average of the UNet's weights, if the file has one.")
@click.version_option(package_name="sega_jax")
def main(source: str, dest: str, to: str | None, variant: str | None, **options: Any) -> None:
    """Converts a checkpoint.

    The checkpoint SOURCE is written to the folder DEST, in diffusers layout or in Orbax format.

    \b
    Example:
      sega-jax-convert v1-5-pruned-emaonly.safetensors stable-diffusion-1.5

    \b
    SOURCE is one of:
      a folder in diffusers layout, with .safetensors, .bin or .msgpack files
      a folder that this command wrote, with Orbax checkpoints
      a .safetensors or .ckpt file of Stable Diffusion 1.x, 2.x or XL
      a stage of DeepFloyd-IF as published: config.yml, pytorch_model.bin
      a folder with Paella's files: paella_v3.pt, vqgan_f4.pt, prior_v1.pt
    """
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
            raise ValueError(
                f"{assignment('variant', variant)} cannot be used, because {kind} have no variants; omit it"
            )
        if kind == SINGLE:
            folder = convert_single(source, dest, to=to or "diffusers", **options)
        elif kind == PAELLA:
            folder = convert_paella(source, dest, to=to or "diffusers", **options)
        else:
            folder = convert(source, dest, to=to or "orbax", variant=variant, **options)
        click.echo(f"Wrote {folder}")


if __name__ == "__main__":
    main()
