"""Line plots of metrics over an axis."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sega_jax.sweep.reporting.labels import arrange
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
    """Plots the mean of a column for each value of an axis, with 95 % confidence intervals.

    Each interval extends 1.96 standard errors to each side of the mean. This assumes that the pictures are independent.

    Args:
        results: the sweep's results.
        y: a column of numbers, such as a metric's name or "seconds".
        x: an axis, or another column.
        by: an axis; the plot has one line for each of its values. If None, it has a single line.
        fixed: {column: value}; the plot includes only pictures with these values.
        axes: the matplotlib axes to draw on; if None, a new figure is made.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a column or value does not exist, `y` contains no numbers, or there are no pictures yet.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> sweep.plot(results, "seconds", "glasses.scale").savefig("seconds.svg")
    """
    own = axes is None
    if own:
        axes = _figure().subplots()
    rows = results.where(fixed or {})
    if not rows:
        raise ValueError(f"{results.folder} has no pictures yet; run the sweep first")
    for column in (y, x, *([by] if by else [])):
        results.check(column)
    values, real = _ordered(results, rows, x)
    groups, graded = _ordered(results, rows, by) if by else ([None], False)
    for k, group in enumerate(groups):
        members = [row for row in rows if by is None or row.get(by) == group]
        positions, mean, error = _means(members, y, x, values)
        places = [values[i] if real else i for i in positions]
        colour = _colour(k, len(groups), graded)
        axes.plot(places, mean, marker="o", markersize=4, linewidth=1.6, color=colour, label=show(group))
        axes.fill_between(places, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    if real and len(values) <= 10 and _apart(values):
        axes.set_xticks(values, [show(value) for value in values])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if by:
        # Place the legend next to the plot, because inside the plot it could cover lines.
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axes.legend(title=by, frameon=False, fontsize="small", title_fontsize="small", **place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    arrange(axes, [] if real else [show(value) for value in values], resize=own)
    return axes.figure


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib, but it is not installed; pip install ".[sweep]"') from None
    return Figure(figsize=(5.4, 3.4), dpi=160, layout="constrained")


def _colour(number: int, count: int, graded: bool) -> Any:
    """Returns a line's colour. If the lines represent numbers (`graded`), their colours range from dark to light."""
    if not graded or count < 3:
        return _COLOURS[number % len(_COLOURS)]
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / (count - 1))


def _ordered(results: Results, rows: Sequence[Row], column: str) -> tuple[list[Any], bool]:
    """Returns a column's sorted values, and whether they are all numbers."""
    present = list(dict.fromkeys(row.get(column) for row in rows))
    if all(type(value) in (int, float) for value in present):
        return sorted(present), True
    here = set(present)
    return [value for value in results.axes.get(column, present) if value in here], False


def _apart(values: Sequence[float]) -> bool:
    """Returns whether there is space for a label at each of these sorted numbers."""
    return all(12 * (b - a) >= values[-1] - values[0] for a, b in itertools.pairwise(values))


def _means(rows: Sequence[Row], y: str, x: str, values: Sequence[Any]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Averages column `y` for each value of `x`.

    Returns:
        The indices of the values of `x` for which `y` has numbers, the means, and the half-widths of the intervals.
    """
    groups: dict[Any, list[float]] = defaultdict(list)
    for row, number in zip(rows, numbers(rows, y), strict=True):
        if not np.isnan(number):
            groups[row.get(x)].append(number)
    positions, mean, error = [], [], []
    for i, value in enumerate(values):
        members = np.array(groups[value])
        if members.size:
            positions.append(i)
            mean.append(members.mean())
            error.append(1.96 * members.std(ddof=1) / math.sqrt(members.size) if members.size > 1 else 0.0)
    if not positions:
        raise ValueError(f"{y!r} has no numbers for these pictures; measure it first")
    return positions, np.array(mean), np.array(error)
