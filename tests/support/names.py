"""Text files of tensor names and shapes, one tensor per line. Names that differ only in a number share one line, in
which {first..last} replaces the number."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def as_text(shapes: Shapes) -> str:
    """Returns the text of such a file, given the tensors' shapes."""
    lines = {tuple(name.split(".")): shape for name, shape in shapes.items()}
    for place in reversed(range(max(map(len, lines)))):
        alike = {}
        for name, shape in lines.items():
            counts = len(name) > place and name[place].isdigit()
            key = (name[:place], name[place + 1 :] if counts else name[place:], counts, shape)
            alike.setdefault(key, []).append(int(name[place]) if counts else None)
        lines = {}
        for (before, after, counts, shape), numbers in alike.items():
            if not counts:
                lines[before + after] = shape
                continue
            for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
                counted = [number for _, number in run]
                first, last = counted[0], counted[-1]
                lines[*before, str(first) if first == last else f"{{{first}..{last}}}", *after] = shape
    return "".join(" ".join([".".join(name), *map(str, shape)]) + "\n" for name, shape in lines.items())


def read(path: Path) -> Shapes:
    """Returns the shapes in a file that `as_text` wrote, and checks that no name is listed twice."""
    pairs = [(name, shape) for line in path.read_text().splitlines() for name, *shape in [line.split()]]
    named = [(full, tuple(map(int, shape))) for name, shape in pairs for full in _expanded(name)]
    assert len(dict(named)) == len(named)
    return dict(named)


def _expanded(name: str) -> list[str]:
    counted = _RANGE.search(name)
    if counted is None:
        return [name]
    first, last = map(int, counted.groups())
    return [full for i in range(first, last + 1) for full in _expanded(_RANGE.sub(str(i), name, count=1))]
