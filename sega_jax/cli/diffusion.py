"""What `sega-jax edit` has for Stable Diffusion: a picture to start from, rescaled
guidance, tiles, and how words are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.pipelines import images
from sega_jax.pipelines.batch import number
from sega_jax.systems.registry import STABLE_DIFFUSION, Kind

_OPTIONS = [
    click.option(
        "--image", metavar="FILE", help="Stable Diffusion: a picture to start from, as large as the one to make."
    ),
    click.option(
        "--strength", type=float, help="Stable Diffusion: the share of the steps that is run after it.  [default: 0.8]"
    ),
    click.option("--guidance-rescale", type=float, help="Stable Diffusion: 0 to 1, against too much contrast."),
    click.option("--tiled", is_flag=True, help="Stable Diffusion: decode large pictures in tiles, for less memory."),
    click.option("--long-prompts", is_flag=True, help="Stable Diffusion: read longer texts in chunks, and cut none."),
    click.option("--weighted", is_flag=True, help='Stable Diffusion: brackets are weights, as in "a (red:1.3) hat".'),
]


def options(command: Callable) -> Callable:
    """Adds these options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


NAMES = [parameter.name for parameter in reversed(options(lambda: None).__click_params__)]


def check(chosen: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Raises:
        FileNotFoundError, TypeError, ValueError: no picture, or a number out of range.
    """
    if chosen["image"] is not None:
        images.read(chosen["image"])
    if chosen["strength"] is not None:
        if chosen["image"] is None:
            raise ValueError("--strength is given without --image; name the picture to start from, or leave it out")
        number("--strength", chosen["strength"], 0, 1)
    if chosen["guidance_rescale"] is not None:
        number("--guidance-rescale", chosen["guidance_rescale"], 0, 1)


def check_kind(kind: Kind, model: str, chosen: Mapping[str, Any]) -> None:
    """Whether a command with this model has these options.

    Raises:
        ValueError: it has not.
    """
    given = list(read(chosen))
    if given and ("vae" not in kind.parts or kind.noising):
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is of {STABLE_DIFFUSION.name}, but {model} is {kind.name}; leave it out")


def read(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as a pipeline's call takes them, and a command can repeat them anywhere."""
    found = {name: value for name, value in chosen.items() if value not in (None, ()) and value is not False}
    if "image" in found:
        found["image"] = str(Path(found["image"]).expanduser().resolve())
    return found
