"""Names the files of a sweep's pictures after their settings, such as 0007-glasses.scale=4-seed=2.

A name starts with the number of the picture's first point, counted from 0 as in the records. The number makes the name
unique, even where upper and lower case are the same. The values of the axes that vary follow, as far as they fit. Names
contain only ASCII letters, digits and the characters - _ . =, which are safe in shells, in URLs and on Windows.
"""

import re
import unicodedata
from collections.abc import Container
from pathlib import Path
from typing import Any

from sega_jax.sweep.description.axes import Block, Uniform
from sega_jax.sweep.description.fields import kind_of
from sega_jax.sweep.description.stages import split
from sega_jax.sweep.description.sweep_file import Sweep

# In characters: the maximum length of a name with its ending, and of one value in it. Hidden names of unfinished files
# are up to 100 characters longer, and file systems allow 255.
_NAME, _WORD, _ENDING = 120, 32, len(".webp")
_DIGITS = 4  # the minimum number of digits of a point's number


class FileNames:
    """The names of a sweep's pictures, without endings.

    Args:
        sweep: the sweep.
        stages: the stages whose settings are listed; "" is a single model or the first stage.
    """

    def __init__(self, sweep: Sweep, stages: Container[str]):
        self._digits = max(_DIGITS, len(str(len(sweep) - 1)))
        # For each block, the keys in file names and the words of listed values, {setting: (key, {value: word})}.
        self._blocks: list[tuple[Block, dict[str, tuple[str, dict[Any, str]]]]] = []
        for block in sweep.blocks:
            words = {
                setting: (_key(setting, list(sweep.edits)), _words(setting, values))
                for setting, values in block.axes.items()
                if split(setting)[0] in stages and _varies(values)
            }
            self._blocks.append((block, words))

    def of(self, point: int) -> str:
        """Returns the name of the picture whose first point is `point`."""
        parts: list[str] = []
        rest = point
        for block, known in reversed(self._blocks):
            rest, place = divmod(rest, block.length)
            values = block.settings(place) if known else {}
            own = [f"{key}={words.get(values[one]) or _number(values[one])}" for one, (key, words) in known.items()]
            parts = own + parts
        name = f"{point:0{self._digits}}"
        for part in parts:
            if len(name) + 1 + len(part) > _NAME - _ENDING:
                break
            name += f"-{part}"
        return name


def _varies(values: Any) -> bool:
    return isinstance(values, Uniform) or len(set(values) if isinstance(values, tuple) else values) > 1


def _words(setting: str, values: Any) -> dict[Any, str]:
    """Returns a word for each listed value of an axis. Ranges and distributions, which are numbers, have no words."""
    if isinstance(values, Uniform) or not isinstance(values, tuple):
        return {}
    return {value: _word(setting, value, number) for number, value in enumerate(dict.fromkeys(values), 1)}


def _word(setting: str, value: Any, number: int) -> str:
    """Returns a short word for a value, or its number on the axis if it has no ASCII letters or digits."""
    kind = kind_of(setting)
    if kind is not None and kind.of_files:
        value = kind.label(value)
    if value is None:
        return "never"
    if isinstance(value, bool | int | float):
        return _number(value)
    if isinstance(value, tuple):
        value = " ".join(one if isinstance(one, str) else _number(one) for one in value) or "none"
    if split(setting)[1] == "scheduler":
        value = Path(value).name
    return _shortened(_cleaned(value)) or (f"value{number}" if value.strip() else "empty")


def _number(value: bool | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}".replace("+", "") if isinstance(value, float) else str(value)


def _key(setting: str, edits: list[str]) -> str:
    """Returns a setting in ASCII. An edit without ASCII letters or digits is named after its number, such as edit2."""
    edit, dot, name = setting.rpartition(".")
    known = edit in edits and not _cleaned(edit)
    return f"edit{edits.index(edit) + 1}.{name}" if known else f"{_cleaned(edit)}{dot}{name}"


def _cleaned(text: str) -> str:
    """Removes accents, and replaces everything except ASCII letters, digits and dots inside words with underscores."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "_".join(re.sub(r"(?<![A-Za-z0-9])\.|\.(?![A-Za-z0-9])|[^A-Za-z0-9.]", " ", ascii_text).split())


def _shortened(word: str) -> str:
    if len(word) <= _WORD:
        return word
    return (word[: _WORD + 1].rpartition("_")[0] or word[:_WORD]).rstrip("_.")
