"""Lists of tensors as text: a line for each name and shape, those that differ in counted places as {first..last}."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def written(shapes: Shapes) -> str:
    """The lines of these tensors."""
    found = {tuple(name.split(".")): shape for name, shape in shapes.items()}
    for place in reversed(range(max(map(len, found)))):
        alike = {}
        for name, shape in found.items():
            counts = len(name) > place and name[place].isdigit()
            key = (name[:place], name[place + 1 :] if counts else name[place:], counts, shape)
            alike.setdefault(key, []).append(int(name[place]) if counts else None)
        found = {}
        for (before, after, counts, shape), numbers in alike.items():
            if not counts:
                found[before + after] = shape
                continue
            for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
                counted = [number for _, number in run]
                first, last = counted[0], counted[-1]
                found[*before, str(first) if first == last else f"{{{first}..{last}}}", *after] = shape
    return "".join(" ".join([".".join(name), *map(str, shape)]) + "\n" for name, shape in found.items())


def read(path: Path) -> Shapes:
    """The shapes in a file of such lines; none is there twice."""
    pairs = [(name, shape) for line in path.read_text().splitlines() for name, *shape in [line.split()]]
    named = [(one, tuple(map(int, shape))) for name, shape in pairs for one in _spelt(name)]
    assert len(dict(named)) == len(named)
    return dict(named)


def _spelt(name: str) -> list[str]:
    counted = _RANGE.search(name)
    if counted is None:
        return [name]
    first, last = map(int, counted.groups())
    return [one for i in range(first, last + 1) for one in _spelt(_RANGE.sub(str(i), name, count=1))]
