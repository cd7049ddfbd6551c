"""The settings that a checkpoint recommends for calls and edits.

A checkpoint's folder may contain `recommended_settings.json`:

    {
      "call": {"steps": 20, "guidance_scale": 4.0},
      "add": {"threshold": 0.7, "warmup": 0.4},
      "remove": {"threshold": 0.9, "warmup": 0.1}
    }

A call uses these values for all settings that the user does not give. "add" applies to edits with a positive scale, and
"remove" to edits with a negative scale. Here, a warm-up is a share of the call's model calls.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sega_jax.method.argument_kinds import Flag, Kind, Real
from sega_jax.method.arguments import Argument, arguments
from sega_jax.method.checks import brief
from sega_jax.method.guidance import Edit
from sega_jax.method.guidance.edits import THRESHOLD, WARMUP
from sega_jax.systems.base import System
from sega_jax.systems.call import Prompts, Seeds
from sega_jax.systems.images import Pictures
from sega_jax.text.files import CheckpointError, read_json

FILE = "recommended_settings.json"


@dataclasses.dataclass(frozen=True)
class Recommended:
    """The settings that a checkpoint recommends. Without a recommendation, the library's defaults apply.

    Attributes:
        call: Arguments of the family's calls.
        add: `threshold` and `warmup` for edits that add a concept. A warm-up is a share of the call's model calls, from
            0 to 1.
        remove: The same settings for edits that remove a concept.

    Example:
        >>> import sega_jax
        >>> sega_jax.load().recommended.call["steps"]
        20
    """

    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add: Mapping[str, float] = dataclasses.field(default_factory=dict)
    remove: Mapping[str, float] = dataclasses.field(default_factory=dict)

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
            warmup = round(recommended["warmup"] * calls) if "warmup" in recommended else WARMUP
        return dataclasses.replace(edit, threshold=threshold, warmup=warmup)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the contents of the file."""
        return {field.name: dict(getattr(self, field.name)) for field in dataclasses.fields(self)}


def recommendable(system: System) -> dict[str, Argument]:
    """Returns {name: argument} for the arguments of a family's calls that a checkpoint can recommend. These are the
    arguments that sweeps can vary, except texts, seeds, sizes, pictures and flags.
    """
    own = (Prompts, Seeds, Pictures, Flag)
    declared = {name: one for name, one in arguments(system.call).items() if one.sweep}
    return {
        name: one for name, one in declared.items() if not isinstance(one.kind, own) and name not in ("height", "width")
    }


def read(folder: Path, system: System) -> Recommended:
    """Reads the recommended settings in a checkpoint's folder. They are empty if there is no such file.

    Raises:
        CheckpointError: The file is broken, names an unknown setting, or gives a value that is out of range.
    """
    path = folder / FILE
    return checked(read_json(path), system, str(path)) if path.is_file() else Recommended()


def checked(contents: Mapping[str, Any], system: System, name: str) -> Recommended:
    """Returns the settings in the contents of a file.

    Args:
        contents: {"call": settings, "add": settings, "remove": settings}; each may be left out.
        system: The family of the checkpoint.
        name: The file's name, for error messages.

    Raises:
        CheckpointError: As for `read`.
    """
    of_edits = {"threshold": Real(0, 1), "warmup": Real(0, 1)}
    of_calls = {setting: one.kind for setting, one in recommendable(system).items()}
    known: dict[str, Mapping[str, Kind]] = {"call": of_calls, "add": of_edits, "remove": of_edits}
    tables: dict[str, dict[str, Any]] = {}
    for key, table in contents.items():
        if key not in known:
            raise CheckpointError(f"{name} has {key!r}, but it may contain only {', '.join(known)}; correct the file")
        if not isinstance(table, Mapping):
            raise CheckpointError(f"{name}: {key}={brief(table)} should be an object of settings; correct the file")
        tables[key] = {}
        for setting, value in table.items():
            if setting not in known[key]:
                raise CheckpointError(
                    f"{name}: {setting!r} in {key!r} is not a setting that a checkpoint of {system.title} can"
                    f" recommend; the settings are {', '.join(known[key])}"
                )
            try:
                tables[key][setting] = known[key][setting].check_one(f"{key}: {setting}", value)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{name}: {error}; correct the file") from None
    return Recommended(**tables)
