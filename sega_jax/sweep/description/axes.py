"""Axes: the values that a setting takes from point to point, none of which is made before it is asked for."""

import dataclasses
import glob
import hashlib
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.method.checks import brief, check_float, check_int
from sega_jax.sweep.description.fields import checked, known
from sega_jax.text.files import absolute_path

Values = Sequence[Any]
# No sweep has as many points.
_MOST = 2**31


@dataclasses.dataclass(frozen=True)
class Progression(Sequence):
    """start, start + step, ... to 12 digits, so that 0.1, 0.2 is followed by 0.3. It has no slices."""

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
    """Anything from low to high, both included where they are whole."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share in [0, 1)."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return self.low + int(share * (self.high - self.low + 1))
        return self.low + share * (self.high - self.low)


class Block(NamedTuple):
    """Axes that go together: point i of them has the i-th value of each; a sample draws them."""

    axes: Mapping[str, Any]  # `Values`, or of a sample `Uniform` as well
    length: int
    key: int | None = None  # of a sample

    def settings(self, i: int) -> dict[str, Any]:
        """Of point i."""
        if self.key is None:
            return {key: values[i] for key, values in self.axes.items()}
        return {key: self._drawn(key, values, i) for key, values in self.axes.items()}

    def _drawn(self, key: str, values: Values | Uniform, i: int) -> Any:
        # A counter hashed, as in JAX: more draws or another axis change none of the others, on any version of anything.
        digest = hashlib.sha256(f"{self.key}/{key}/{i}".encode()).digest()
        share = (int.from_bytes(digest[:8]) >> 11) / 2**53
        return values.at(share) if isinstance(values, Uniform) else values[int(share * len(values))]


def read(key: str, value: Any, edits: Mapping[str, Any], folder: Path, where: str, draws: bool = False) -> Any:
    """The values of an axis, checked.

    Args:
        value: a list; {"from", "count", "step"}, numbers at equal distances; {"file"}, the lines of a text; {"glob"},
            the files that match a pattern; or of a sample {"low", "high"}.
        folder: that files are relative to.

    Raises:
        TypeError, ValueError, FileNotFoundError: it is none of these, has no value, or one that the setting can not
            have.
    """
    name = f"{where}: {key}"
    known(key, edits, where)
    if isinstance(value, Mapping):
        values = _described(name, value, folder, draws)
    elif isinstance(value, list | tuple | range | Progression | Uniform):
        values = value
    else:
        checked(key, value, edits, where, folder)
        raise TypeError(f"{name}={brief(value)} should be a list of values; one value for all is said in [call]")
    if isinstance(values, Uniform):
        for end in values:
            checked(key, end, edits, where, folder)
        return values
    if not len(values):
        raise ValueError(f"{name} has no values, so that the sweep has no points; give one at least")
    if isinstance(values, range | Progression):
        for end in (values[0], values[len(values) - 1]):
            checked(key, end, edits, where, folder)
        return values
    return tuple(checked(key, one, edits, where, folder) for one in values)


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
            raise ValueError(f"{name}.step=0 gives one value many times; give another step")
        if isinstance(start, int) and isinstance(step, int):
            return range(start, start + step * count, step)
        return Progression(start, step, count)
    forms = "{from, count, step}, {file}, {glob}" + (", {low, high}" if draws else "")
    raise ValueError(f"{name} has {', '.join(map(repr, value)) or 'nothing'}; an axis is a list or {forms}")


def _real(name: str, value: Any) -> float:
    check_float(name, value)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _matching(name: str, pattern: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(pattern, str):
        raise TypeError(f"{name}.glob={brief(pattern)} should be a pattern of paths, such as photos/*.png")
    return tuple(sorted(glob.glob(absolute_path(pattern, folder), recursive=True)))


def _lines(name: str, file: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(file, str):
        raise TypeError(f"{name}.file={brief(file)} should be the path of a text, a value a line")
    path = folder / Path(file).expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(f"{name}.file: {path} cannot be read ({what}); name a text with a value a line") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
