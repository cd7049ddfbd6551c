"""Cascades in sweeps: which stage a setting belongs to, and which settings of a point each stage gets.

Settings of the first stage have no prefix. Settings of a later stage begin with its name, such as `stage2.steps`. All
stages share the prompts, the seed, and the settings of how edits act together.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sega_jax.pipelines.cascade import FIRST, SHARED
from sega_jax.systems.base import System
from sega_jax.systems.registry import systems

# What every stage is given, from the settings of the first.
_COMMON = ("prompt", "negative_prompt", "seed", *SHARED)
# What a later stage is given by the stage before.
_MADE = ("image", "height", "width")
_EARLIER = re.compile(r"made:([0-9a-f]+):(\d+)x(\d+)")


def later_stages() -> dict[str, list[System]]:
    """Returns the families of the later stages of all cascades, by the names of the stages."""
    found: dict[str, list[System]] = {}
    for system in systems().values():
        for name, stage in system.stages.items():
            found.setdefault(name, []).append(stage)
    return found


def split(key: str) -> tuple[str, str]:
    """Returns the later stage that a setting is of, or "", and the setting's own name."""
    stage, dot, name = key.partition(".")
    return (stage, name) if dot and stage in later_stages() else ("", key)


def is_own(name: str) -> bool:
    """Tells whether a later stage has a setting of its own by this name."""
    return name not in (*_COMMON, *_MADE, "edits", "edited")


def of_stage(given: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns the settings of one stage, by their own names, out of those of a point of a cascade."""
    of_edits = {key: value for key, value in given.items() if "." in key and not split(key)[0]}
    own = {name: value for key, value in given.items() for of, name in [split(key)] if of == stage}
    if stage == FIRST:
        own = {key: value for key, value in given.items() if "." not in key and key not in ("edits", "edited")}
    common = {name: given[name] for name in _COMMON if name in given}
    guides = stage in given.get("edited", (FIRST,))
    acting = {"edits": given["edits"]} if "edits" in given else {}
    return common | own | of_edits | (acting if guides else {"edits": ()})


class Earlier(NamedTuple):
    """A picture that the stage before makes, in place of the path of a file."""

    name: str  # of the picture
    size: tuple[int, int]  # height and width in pixels

    def __str__(self) -> str:
        return f"made:{self.name}:{self.size[0]}x{self.size[1]}"


def earlier(picture: Any) -> Earlier | None:
    """Returns the picture of the stage before that stands in place of a path; None for a path."""
    found = _EARLIER.fullmatch(picture) if isinstance(picture, str) else None
    return None if found is None else Earlier(found[1], (int(found[2]), int(found[3])))
