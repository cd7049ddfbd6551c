"""The settings that a checkpoint recommends for calls and edits.

A checkpoint's folder may contain `recommended_settings.json`:

    {
      "call": {"steps": 20, "guidance_scale": 4.0},
      "add": {"threshold": 0.7, "warmup_share": 0.4},
      "remove": {"threshold": 0.9, "warmup_share": 0.1}
    }

A call uses these values for all settings that the user does not give. "add" applies to edits with a positive scale, and
"remove" to edits with a negative scale. `warmup_share` is the warm-up as a share of the call's model calls.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sega_jax.method.argument_kinds import Kind, Real
from sega_jax.method.arguments import Argument, arguments
from sega_jax.method.checks import brief
from sega_jax.method.guidance import Edit
from sega_jax.method.guidance.edits import THRESHOLD, WARMUP
from sega_jax.systems.base import System
from sega_jax.text.files import CheckpointError, read_json

FILE = "recommended_settings.json"
_OF_EDITS: dict[str, Kind] = {"threshold": Real(0, 1), "warmup_share": Real(0, 1)}


@dataclasses.dataclass(frozen=True)
class Recommended:
    """The settings that a checkpoint recommends. Without a recommendation, the library's defaults apply.

    Attributes:
        call: Arguments of the family's calls; see `recommendable`. `pipe.recommended = ...` checks them.
        add: `threshold` and `warmup_share`, numbers from 0 to 1, for edits that add a concept. The warm-up is the share
            times the number of model calls, rounded.
        remove: The same settings for edits that remove a concept.

    Raises:
        TypeError, ValueError: A setting in `add` or `remove` is unknown or out of range.

    Example:
        >>> import sega_jax
        >>> sega_jax.load().recommended.call["steps"]
        20
    """

    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add: Mapping[str, float] = dataclasses.field(default_factory=dict)
    remove: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("add", "remove"):
            object.__setattr__(self, name, _checked(name, getattr(self, name), _OF_EDITS))

    def __bool__(self) -> bool:
        return bool(self.call or self.add or self.remove)

    def edit(self, edit: Edit, calls: int) -> Edit:
        """Returns an edit in which recommended values or the library's defaults replace a threshold and a warm-up of
        None.

        Args:
            edit: The edit.
            calls: The number of model calls.
        """
        recommended = self.remove if edit.scale < 0 else self.add
        threshold, warmup = edit.threshold, edit.warmup
        if threshold is None:
            threshold = recommended.get("threshold", THRESHOLD)
        if warmup is None:
            share = recommended.get("warmup_share")
            warmup = WARMUP if share is None else round(share * calls)
        return dataclasses.replace(edit, threshold=threshold, warmup=warmup)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the contents of the file."""
        return {field.name: dict(getattr(self, field.name)) for field in dataclasses.fields(self)}


def recommendable(system: System) -> dict[str, Argument]:
    """Returns {name: argument} for the arguments of a family's calls that a checkpoint can recommend."""
    return {name: one for name, one in arguments(system.call).items() if one.recommendable}


def checked(recommended: Recommended, system: System) -> Recommended:
    """Returns recommended settings whose arguments of calls are checked.

    Raises:
        TypeError, ValueError: An argument is unknown, or its value has the wrong type or is out of range.
    """
    kinds = {name: one.kind for name, one in recommendable(system).items()}
    return dataclasses.replace(recommended, call=_checked("call", recommended.call, kinds))


def read(folder: Path, system: System) -> Recommended:
    """Reads the recommended settings in a checkpoint's folder. They are empty if there is no such file.

    Raises:
        CheckpointError: The file is broken, names an unknown setting, or gives a value that is out of range.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return Recommended()
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; restore it, or remove it to use the library's defaults")
    contents = read_json(path)
    known = [field.name for field in dataclasses.fields(Recommended)]
    if unknown := contents.keys() - known:
        raise CheckpointError(f"{path} has {min(unknown)!r}, but it may contain only {', '.join(known)}; correct it")
    try:
        return checked(Recommended(**contents), system)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _checked(name: str, settings: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Returns checked settings.

    Raises:
        TypeError, ValueError: A setting is unknown, or its value has the wrong type or is out of range.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"{name}={brief(settings)} should be an object with settings, such as {next(iter(kinds))}")
    for setting in settings:
        if setting not in kinds:
            raise ValueError(f"{name}: {setting!r} cannot be recommended; give only {', '.join(kinds)}")
    return {setting: kinds[setting].check_one(f"{name}: {setting}", value) for setting, value in settings.items()}
