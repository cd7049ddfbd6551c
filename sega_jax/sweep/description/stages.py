"""Determines which stage of a cascade a setting belongs to, and which of a point's settings each stage receives.

Settings of the first stage have no prefix. Settings of a later stage start with its name, such as `stage2.steps`. All
stages share the prompts, the seed, and the settings that control how edits act together.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sega_jax.pipelines.cascade import FIRST, SHARED
from sega_jax.systems.base import System
from sega_jax.systems.registry import systems

# Settings that every stage takes from the first stage.
_COMMON = ("prompt", "negative_prompt", "seed", *SHARED)
# Settings that a later stage takes from the previous stage's pictures.
_FROM_EARLIER = ("image", "height", "width")
_EARLIER = re.compile(r"made:([0-9a-f]+):(\d+)x(\d+)")


def later_stages() -> dict[str, list[System]]:
    """Returns {stage name: families} for the later stages of all cascades."""
    families: dict[str, list[System]] = {}
    for system in systems().values():
        for name, stage in system.stages.items():
            families.setdefault(name, []).append(stage)
    return families


def split(key: str) -> tuple[str, str]:
    """Splits a setting's key into the name of its later stage ("" if it has none) and the setting's name within the
    stage."""
    stage, dot, name = key.partition(".")
    return (stage, name) if dot and stage in later_stages() else ("", key)


def is_own(name: str) -> bool:
    """Returns whether a later stage has its own value of this setting, separate from the first stage's."""
    return name not in (*_COMMON, *_FROM_EARLIER, "edits", "edited")


def of_stage(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Selects one stage's settings from a point's settings, and returns them with their names within the stage."""
    of_edits = {key: value for key, value in settings.items() if "." in key and not split(key)[0]}
    own = {name: value for key, value in settings.items() for prefix, name in [split(key)] if prefix == stage}
    if stage == FIRST:
        own = {key: value for key, value in settings.items() if "." not in key and key not in ("edits", "edited")}
    common = {name: settings[name] for name in _COMMON if name in settings}
    guides = stage in settings.get("edited", (FIRST,))
    acting = {"edits": settings["edits"]} if "edits" in settings else {}
    return common | own | of_edits | (acting if guides else {"edits": ()})


class Earlier(NamedTuple):
    """A picture that the previous stage makes. Its string form can be used in place of a file path."""

    name: str  # the picture's name in the sweep
    size: tuple[int, int]  # height and width in pixels

    def __str__(self) -> str:
        return f"made:{self.name}:{self.size[0]}x{self.size[1]}"


def earlier(picture: Any) -> Earlier | None:
    """Parses the string form of a picture from the previous stage. Returns None for paths and other values."""
    match = _EARLIER.fullmatch(picture) if isinstance(picture, str) else None
    return None if match is None else Earlier(match[1], (int(match[2]), int(match[3])))
