"""`sega-jax verify`: compares pictures from a Stable Diffusion 1.5 checkpoint with pictures that diffusers
published."""

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from sega_jax.cli.options import load_arguments, option, parsed
from sega_jax.cli.terminal import echo, remember_compilations, versions
from sega_jax.diffusers_api import published_pictures
from sega_jax.diffusers_api.stable_diffusion import SemanticStableDiffusionPipeline
from sega_jax.method.checks import check_float
from sega_jax.pipelines import sources
from sega_jax.pipelines.help_pages import Command
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.progress import plainly
from sega_jax.pipelines.weight_files import weight_paths
from sega_jax.systems.registry import weight_stem
from sega_jax.text.files import sha256

# Options of `load` that would change the pictures.
_OTHERWISE = ("scheduler", "prediction_type", "safety_checker", "unet", "vae")
_DTYPE = (
    "The number format of the networks: float32, bfloat16 or float16; the published pictures were made in float32."
    "  [default: float32]"
)
_OPTIONS = [
    click.Argument(["model"]),
    *(
        option(one, help=_DTYPE if name == "dtype" else None)
        for name, one in load_arguments().items()
        if name not in _OTHERWISE
    ),
    click.Option(
        ["--tolerance"],
        type=click.FloatRange(0, 1, min_open=True),
        metavar="NUMBER",
        default=published_pictures.TOLERANCE,
        show_default=True,
        help="The largest difference between values from 0 to 1 that counts as equal, as in diffusers' tests.",
    ),
    click.Option(
        ["--noise"],
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        metavar="FOLDER",
        default=published_pictures.NOISE,
        help="A folder with the noise that tests/reference/record_cuda_noise.py recorded on a different GPU."
        "  [default: the noise that comes with the package]",
    ),
]


@click.command(
    "verify",
    cls=Command,
    params=_OPTIONS,
    sections={"Loading the checkpoint": [name for name in load_arguments() if name not in _OTHERWISE]},
)
@click.pass_context
def verify(ctx: click.Context, model: str, tolerance: float, noise: Path, **options: Any) -> None:
    """Compares a checkpoint with published pictures.

    MODEL is a Stable Diffusion 1.5 checkpoint: a folder in diffusers layout, owner/name on the hub, or a single file.
    Its pictures are compared with three pictures that diffusers published. The command prints a report that can be
    pasted into an issue. The exit status is 0 if all three pictures are equal within the tolerance, and 1 otherwise.
    """
    with plainly():
        given = parsed(LoadOptions, {name: value for name, value in options.items() if value not in (None, False)})
        check_float("--tolerance", tolerance, 0, 1)  # click accepts NaN
        LoadOptions(model, **given)
        pictures = published_pictures.PICTURES
        noises = [published_pictures.noise(picture.seed, noise) for picture in pictures]
        remember_compilations()
        source = sources.find(model, given.get("revision"), given.get("config"))
        where, commit = sources.place(source)
        given = {"dtype": "float32", **given, "revision": commit}
        pipe = SemanticStableDiffusionPipeline.from_pretrained(where, safety_checker=None, **given)
        size, wanted = pipe.pipeline.latent_shape(), noises[0].shape[1:]
        if size != wanted:
            raise ValueError(
                f"{model} makes latents of shape {size}, expected {wanted}: the published pictures are from Stable"
                " Diffusion 1.5; name a Stable Diffusion 1.5 checkpoint"
            )
        for line in _report(pipe, source, given.get("variant")):
            echo(line)
        different = []
        echo(f"\nlargest difference of each picture (tolerance {tolerance:g})")
        for picture, latents in zip(pictures, noises, strict=True):
            difference = published_pictures.difference(pipe, picture, latents)
            equal = difference <= tolerance  # False for NaN
            echo(f"  {picture.name:16} {difference:.4f}  {'equal' if equal else 'different'}")
            different += [] if equal else [picture.name]
    if different:
        echo(f"\nFAILED: {', '.join(different)}: different from the pictures that diffusers published")
        if pipe.pipeline.dtype.name not in ("float32", "float64"):
            echo("Half precision can cause differences above the tolerance; run the command with --dtype float32")
        ctx.exit(1)
    echo(f"\nPASSED: equal to the {len(pictures)} pictures that diffusers published")


def _report(pipe: SemanticStableDiffusionPipeline, source: sources.Source, variant: str | None) -> Iterator[str]:
    """Yields lines about the versions, devices and checkpoint."""
    native = pipe.pipeline
    device = native.devices.devices[0]
    software = {name: version for name, version in versions("").items() if name != "device"}
    software |= {"jaxlib": importlib.metadata.version("jaxlib"), "Python": platform.python_version()}
    yield "sega-jax verify"
    yield f"versions    {', '.join(f'{name} {version}' for name, version in software.items())}"
    yield f"devices     {len(native.devices)} x {device.device_kind} ({device.platform})"
    yield f"dtype       {native.dtype.name}, float32 matrices multiplied in float32"
    yield f"scheduler   {pipe.scheduler.name}"
    name, commit = sources.place(source)
    if commit is not None:
        yield f"checkpoint  {name}, commit {commit}"
        return
    yield f"checkpoint  {Path(name).name}"  # omit the parent folders: their names may include a person's name
    yield from (f"  {name}: sha256 {sha256(path)}" for name, path in _weights(source, variant))


def _weights(source: sources.Source, variant: str | None) -> Iterator[tuple[str, Path]]:
    """Yields (name in the checkpoint, path) for the weight files of a local checkpoint."""
    if source.file is not None:
        yield source.file.name, source.file
        return
    for part in source.parts:
        folder, stem = source.folder / part, weight_stem(source.system, part)
        for path in weight_paths(folder, stem, variant):
            yield str(path.relative_to(source.folder)), path
