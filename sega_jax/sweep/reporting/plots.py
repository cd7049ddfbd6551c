"""Line plots of what was measured over an axis."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sega_jax.sweep.reporting.results import Results, Row, numbers, show

_COLOURS = (
    "#4c72b0",
    "#dd8452",
    "#55a868",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
    "#ccb974",
    "#64b5cd",
)


def plot(
    results: Results, y: str, x: str, by: str | None = None, fixed: Mapping[str, Any] | None = None, axes: Any = None
) -> Any:
    """The mean of a column over an axis, with its 95 % interval: 1.96 standard errors over all pictures of a
    value, as if each were drawn by itself.

    Args:
        y: a column of numbers, such as a metric's name or "seconds".
        x: an axis, or another column.
        by: an axis with a line for each of its values.
        fixed: values of columns that are shown alone.
        axes: of matplotlib, to draw on; None is a figure of its own.

    Returns:
        The figure of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no such column or value, a column that holds no numbers, or no picture yet.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> sweep.plot(results, "seconds", "glasses.scale").savefig("seconds.svg")
    """
    if axes is None:
        axes = _figure().subplots()
    rows = results.where(fixed or {})
    if not rows:
        raise ValueError(f"{results.folder} has no picture yet")
    for column in (y, x, *([by] if by else [])):
        results.check(column)
    values, real = _ordered(results, rows, x)
    groups, graded = _ordered(results, rows, by) if by else ([None], False)
    for k, group in enumerate(groups):
        some = [row for row in rows if by is None or row.get(by) == group]
        at, mean, error = _means(some, y, x, values)
        places = [values[i] if real else i for i in at]
        colour = _colour(k, len(groups), graded)
        axes.plot(places, mean, marker="o", markersize=4, linewidth=1.6, color=colour, label=show(group))
        axes.fill_between(places, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    if not real:
        axes.set_xticks(range(len(values)), [_short(show(value)) for value in values])
    elif len(values) <= 10:
        axes.set_xticks(values, [show(value) for value in values])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if by:
        # Beside the lines, which it would cover wherever it was.
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        legend = axes.legend(title=by, frameon=False, fontsize="small", title_fontsize="small", **place)
        for text in legend.get_texts():
            text.set_text(_short(text.get_text()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    # Prompts and names of files are no formulas, although they may contain dollar signs.
    for text in (*axes.findobj(lambda one: hasattr(one, "set_parse_math")), *axes.get_xticklabels()):
        text.set_parse_math(False)
    return axes.figure


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib, which is not installed; pip install ".[sweep]"') from None
    return Figure(figsize=(5.4, 3.4), dpi=160, layout="constrained")


def _colour(number: int, count: int, graded: bool) -> Any:
    """Of a line: from dark to light where they are of rising numbers."""
    if not graded or count < 3:
        return _COLOURS[number % len(_COLOURS)]
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / (count - 1))


def _ordered(results: Results, rows: Sequence[Row], column: str) -> tuple[list[Any], bool]:
    """The values of a column in an order, and whether they are places on a line."""
    there = list(dict.fromkeys(row.get(column) for row in rows))
    if all(type(value) in (int, float) for value in there):
        return sorted(there), True
    known = results.axes.get(column, there)
    return [value for value in known if value in there], False


def _means(rows: Sequence[Row], y: str, x: str, values: Sequence[Any]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Of the values that have numbers: which they are, their means, and the halves of the intervals."""
    column, at, mean, error = numbers(rows, y), [], [], []
    for i, value in enumerate(values):
        some = column[[row.get(x) == value for row in rows]]
        some = some[~np.isnan(some)]
        if some.size:
            at.append(i)
            mean.append(some.mean())
            error.append(1.96 * some.std(ddof=1) / math.sqrt(some.size) if some.size > 1 else 0.0)
    if not at:
        raise ValueError(f"{y!r} has no numbers; was it measured?")
    return at, np.array(mean), np.array(error)


def _short(text: str) -> str:
    return textwrap.fill(text, 24, max_lines=3, placeholder=" …")
