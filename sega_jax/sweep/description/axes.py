"""An axis holds the values of a setting that varies from point to point. Ranges and draws are computed when they are
accessed."""

import dataclasses
import glob
import hashlib
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.method.checks import brief, check_float, check_int
from sega_jax.sweep.description.fields import check_known, check_setting
from sega_jax.text.files import absolute_path

Values = Sequence[Any]
# The maximum number of values in a range. A sweep has far fewer points (`sega_jax.sweep.description.sweep_file.MOST`).
_MOST = 2**31


@dataclasses.dataclass(frozen=True)
class Progression(Sequence):
    """The sequence start, start + step, ..., rounded to 12 digits so that 0.1 and 0.2 are followed by 0.3.

    Slices are not supported.
    """

    start: float
    step: float
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> float:  # type: ignore[override]
        if not 0 <= i < self.length:
            raise IndexError(i)
        return float(f"{self.start + i * self.step:.12g}")


class Uniform(NamedTuple):
    """A uniform distribution from `low` to `high`. If both are integers, it draws integers and includes `high`."""

    low: float
    high: float

    def at(self, fraction: float) -> float:
        """Returns the value at the given fraction of the interval, in [0, 1)."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return self.low + int(fraction * (self.high - self.low + 1))
        return self.low + fraction * (self.high - self.low)


class Block(NamedTuple):
    """Axes that vary together: point i has the i-th value of each axis, or, in a sample, the i-th draw from each
    axis."""

    axes: Mapping[str, Any]  # {setting: `Values`}, in a sample also {setting: `Uniform`}
    length: int
    key: int | None = None  # the seed for a sample's draws; None for axes that are not sampled

    def settings(self, i: int) -> dict[str, Any]:
        """Returns the settings of point i."""
        if self.key is None:
            return {key: values[i] for key, values in self.axes.items()}
        return {key: self._drawn(key, values, i) for key, values in self.axes.items()}

    def _drawn(self, key: str, values: Values | Uniform, i: int) -> Any:
        # As in JAX's key-based generators, each draw hashes its own counter. Adding draws or axes therefore does not
        # change other draws, and the draws do not depend on a library's version.
        digest = hashlib.sha256(f"{self.key}/{key}/{i}".encode()).digest()
        fraction = (int.from_bytes(digest[:8]) >> 11) / 2**53
        return values.at(fraction) if isinstance(values, Uniform) else values[int(fraction * len(values))]


def read(key: str, value: Any, edits: Mapping[str, Any], folder: Path, where: str, draws: bool = False) -> Any:
    """Returns the checked values of an axis.

    Args:
        key: the setting, such as "seed" or "glasses.scale".
        value: a list; {"from", "count", "step"} for equally spaced numbers; {"file"} for the lines of a text file;
            {"glob"} for the files that match a pattern; or, in a sample, {"low", "high"}.
        edits: the sweep's edits, {name: edit}.
        folder: the folder that relative paths start from.
        where: the part of the sweep to name in error messages.
        draws: whether the axis belongs to a sample.

    Raises:
        TypeError, ValueError, FileNotFoundError: the axis has none of these forms or is empty, or the setting does not
            accept one of its values.
    """
    name = f"{where}: {key}"
    check_known(key, edits, where)
    if isinstance(value, Mapping):
        values = _described(name, value, folder, draws)
    elif isinstance(value, list | tuple | range | Progression | Uniform):
        values = value
    else:
        check_setting(key, value, edits, where, folder)
        raise TypeError(
            f"{name}={brief(value)} should be a list of values; to use the same value for all points, put it in [call]"
        )
    if isinstance(values, Uniform):
        for end in values:
            check_setting(key, end, edits, where, folder)
        return values
    if not len(values):
        raise ValueError(f"{name} has no values, so the sweep has no points; give at least one value")
    if isinstance(values, range | Progression):
        for end in (values[0], values[len(values) - 1]):
            check_setting(key, end, edits, where, folder)
        return values
    return tuple(check_setting(key, item, edits, where, folder) for item in values)


def _described(name: str, value: Mapping[str, Any], folder: Path, draws: bool) -> Values | Uniform:
    keys = set(value)
    if draws and keys == {"low", "high"}:
        low, high = (_real(f"{name}.{end}", value[end]) for end in ("low", "high"))
        if not low < high:
            raise ValueError(f"{name}: low={low} should be below high={high}")
        return Uniform(low, high)
    if keys == {"file"}:
        return _lines(name, value["file"], folder)
    if keys == {"glob"}:
        return _matching(name, value["glob"], folder)
    if {"from", "count"} <= keys <= {"from", "count", "step"}:
        start, step = (_real(f"{name}.{end}", value.get(end, 1)) for end in ("from", "step"))
        count = check_int(f"{name}.count", value["count"], 0, _MOST)
        if step == 0:
            raise ValueError(f"{name}.step=0 repeats the same value; give a step other than 0")
        if isinstance(start, int) and isinstance(step, int):
            return range(start, start + step * count, step)
        return Progression(start, step, count)
    forms = "{from, count, step}, {file}, {glob}" + (", {low, high}" if draws else "")
    raise ValueError(
        f"{name} has {', '.join(map(repr, value)) or 'no keys'}, but an axis should be a list or one of {forms}"
    )


def _real(name: str, value: Any) -> float:
    check_float(name, value)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _matching(name: str, pattern: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(pattern, str):
        raise TypeError(f"{name}.glob={brief(pattern)} should be a path pattern such as photos/*.png")
    return tuple(sorted(glob.glob(absolute_path(pattern, folder), recursive=True)))


def _lines(name: str, file: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(file, str):
        raise TypeError(f"{name}.file={brief(file)} should be the path of a text file with one value per line")
    path = folder / Path(file).expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(
            f"{name}.file: {path} cannot be read ({reason}); name a text file with one value per line"
        ) from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
