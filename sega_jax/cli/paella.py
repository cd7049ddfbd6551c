"""What `sega-jax edit` has for Paella: the options of its sampler."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import click

from sega_jax.pipelines.batch import whole
from sega_jax.systems.registry import PAELLA, Kind

_OPTIONS = [
    click.option("--renoise-steps", type=int, help="Paella: steps that renoise tokens.  [default: 13 of 16 of all]"),
    click.option("--temperature", metavar="FIRST,LAST", help="Paella: of its first and last step.  [default: 1.2,0.2]"),
]


def options(command: Callable) -> Callable:
    """Adds the options of the sampler to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


NAMES = [parameter.name for parameter in reversed(options(lambda: None).__click_params__)]


def check(chosen: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Raises:
        ValueError: a number out of range, or what is none.
    """
    if chosen["renoise_steps"] is not None:
        whole("--renoise-steps", chosen["renoise_steps"], 0)
    read(chosen)


def check_kind(kind: Kind, model: str, chosen: Mapping[str, Any], eta: float) -> None:
    """Whether a command with this model has these options.

    Raises:
        ValueError: it has not.
    """
    given = [name for name, value in chosen.items() if value is not None]
    if given and kind is not PAELLA:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is of {PAELLA.name}, but {model} is {kind.name}; leave it out")
    if eta and kind is PAELLA:
        raise ValueError(f"--eta {eta:g} is DDIM's, {PAELLA.name} has none; leave it out")


def read(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a pipeline's call takes them.

    Raises:
        ValueError: the temperature is not two positive numbers.
    """
    found = {name: value for name, value in chosen.items() if value is not None}
    if "temperature" in found:
        try:
            first, last = map(float, chosen["temperature"].split(","))
        except ValueError:
            first = last = math.nan
        if not (0 < first < math.inf and 0 < last < math.inf):
            raise ValueError(f"--temperature {chosen['temperature']!r} should be two positive numbers like 1.2,0.2")
        found["temperature"] = first, last
    return found
