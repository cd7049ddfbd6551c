"""Plots of a column's means over an axis: lines over numbers, bars over words."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sega_jax.sweep.reporting import intervals
from sega_jax.sweep.reporting.labels import arrange
from sega_jax.sweep.reporting.results import Results, Row, numbers
from sega_jax.sweep.reporting.values import comparable, show

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
# The first line is solid, so that it stays visible through the gaps of other lines with the same values.
_MARKERS = "osD^vP*X<>"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 4)))
_MOST_GROUPS = len(_COLOURS)
_MOST_WORDS = 100
# In points: the distance between the markers of two groups with the same values, and the size of a marker.
_SPACING, _MARKER = 4.5, 5.0
_BAR = 0.14  # in inches: the minimum width of a bar
_INTERVAL = "#333333"


class _Group(NamedTuple):
    """The pictures of one line, or of the bars with one colour."""

    label: str
    colour: Any
    positions: list[int]  # the indices of the values of `x` for which the group has numbers
    means: np.ndarray  # [positions, 3]: the means, and the lower and upper ends of their intervals


def plot(
    results: Results, y: str, x: str, by: str | None = None, fixed: Mapping[str, Any] | None = None, axes: Any = None
) -> Any:
    """Plots the mean of a column for each value of an axis, with 95 % confidence intervals.

    If all values on the horizontal axis are numbers, each group is a line; otherwise, it is a set of bars. The markers
    of several lines are placed next to each other, up to a few points from their value, so that lines with the same
    values can be told apart. A picture that several points describe counts once. A value with a single picture has no
    interval.

    The intervals assume that the pictures are independent. For a metric that is a `Probability` and for columns of true
    and false, an interval is Wilson's score interval, which is within [0, 1]:
    (m + z^2 / 2n +- z sqrt(m (1 - m) / n + z^2 / 4n^2)) / (1 + z^2 / n), with the mean m of n pictures and z = 1.96
    (Wilson 1927). For other columns, it extends 1.96 standard errors to each side of the mean.

    Args:
        results: the sweep's results.
        y: a column of numbers, such as a metric's name or "seconds".
        x: an axis, or another column.
        by: an axis; the plot has one group for each of its values, at most 10. If None, it has a single group.
        fixed: {column: value}; the plot includes only pictures with these values; see `Results.value`.
        axes: the matplotlib axes to draw on; if None, a new figure is made.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a column or value does not exist, `y` contains no numbers or infinite ones, there are too many
            groups or bars, or there are no pictures yet.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> sweep.plot(results, "seconds", "glasses.scale").savefig("seconds.svg")
    """
    rows = results.where(fixed or {})
    for column in (y, x, *([by] if by else [])):
        results.check(column)
    values, numeric = _ordered(results, rows, x)
    groups = _groups(results, rows, y, x, by, values)
    if not numeric and len(values) > _MOST_WORDS:
        raise ValueError(
            f"{x} has {len(values)} values, which are not all numbers, but a plot has room for bars at most"
            f" {_MOST_WORDS} values; choose another x"
        )
    own = axes is None
    if own:
        figure = _figure()
        axes = figure.subplots()
        if not numeric:
            figure.set_figwidth(max(figure.get_figwidth(), _BAR * len(values) * (len(groups) + 1)))
    if numeric:
        _lines(axes, groups, values)
    else:
        _bars(axes, groups, len(values))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if by:
        # Place the legend next to the plot, because inside the plot it could cover lines.
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "handlelength": 3 if numeric else 1}
        axes.legend(title=by, frameon=False, fontsize="small", title_fontsize="small", **place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6, axis="both" if numeric else "y")
    arrange(axes, [] if numeric else [show(value) for value in values], resize=own)
    return axes.figure


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib, but it is not installed; pip install ".[sweep]"') from None
    return Figure(figsize=(5.4, 3.4), dpi=160, layout="constrained")


def _colour(number: int, count: int, graded: bool) -> Any:
    """Returns a group's colour. If the groups represent numbers (`graded`), their colours range from dark to light."""
    if not graded or count < 3:
        return _COLOURS[number % len(_COLOURS)]
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / (count - 1))


def _groups(
    results: Results, rows: Sequence[Row], y: str, x: str, by: str | None, values: Sequence[Any]
) -> list[_Group]:
    """Returns the groups of a plot.

    Raises:
        ValueError: there are too many groups, or `y` has no numbers or infinite ones.
    """
    names, graded = _ordered(results, rows, by) if by else ([None], False)
    if len(names) > _MOST_GROUPS:
        raise ValueError(
            f"{by} has {len(names)} values, but a plot can show at most {_MOST_GROUPS} groups; use {by} as x, or leave"
            " it out, so that the plot shows means over all its values"
        )
    members: dict[Any, list[Row]] = {comparable(name): [] for name in names}
    for row in rows:
        members[comparable(row.get(by) if by else None)].append(row)
    is_probability = y in results.probabilities or all(isinstance(row.get(y), bool | None) for row in rows)
    groups = []
    for k, name in enumerate(names):
        positions, means = _means(members[comparable(name)], y, x, values, is_probability)
        label = show(name) if positions else f"{show(name)} (no numbers)"
        groups.append(_Group(label, _colour(k, len(names), graded), positions, means))
    if not any(group.positions for group in groups):
        raise ValueError(f"{y!r} has no numbers for these pictures; measure it first")
    return groups


def _lines(axes: Any, groups: Sequence[_Group], values: Sequence[float]) -> None:
    """Draws a line for each group, over numbers.

    The drawing of each line is moved to the left or right, so that the markers of several lines are next to each other.
    All markers stay in the middle third of the distance between two values, so that none seems to belong to another
    value. The lines' data is not moved, so limits, ticks and tools that read the data are exact.
    """
    from matplotlib.transforms import ScaledTranslation

    width = _inches(axes) * 72
    gap = width * min(np.diff(values), default=np.inf) / (values[-1] - values[0] or 1)
    spacing = min(_SPACING, gap / 3 / max(len(groups) - 1, 1))
    for k, group in enumerate(groups):
        places = [values[i] for i in group.positions]
        mean, low, high = group.means.T
        style = {"linestyle": _DASHES[k % len(_DASHES)], "linewidth": 1.6, "color": group.colour}
        style |= {"marker": _MARKERS[k], "markersize": _MARKER, "markeredgecolor": "white", "markeredgewidth": 0.5}
        shift = (k - (len(groups) - 1) / 2) * spacing / 72
        moved = axes.transData + ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)
        for drawn in (
            *axes.plot(places, mean, label=group.label, **style),
            axes.vlines(places, low, high, color=group.colour, linewidth=1.2, alpha=0.5),
        ):
            drawn.set_transform(moved)
    # Moved markers need room at both ends.
    axes.margins(x=0.05 + spacing * (len(groups) - 1) / width)
    if len(values) <= 10 and _has_room(values):
        axes.set_xticks(values, [show(value) for value in values])


def _bars(axes: Any, groups: Sequence[_Group], count: int) -> None:
    """Draws bars next to each other for each value on the horizontal axis, one for each group."""
    width = 0.8 / len(groups)
    for k, group in enumerate(groups):
        places = np.arange(count) + (k - (len(groups) - 1) / 2) * width
        mean, low, high = np.full((3, count), np.nan)
        mean[group.positions], low[group.positions], high[group.positions] = group.means.T
        # The edge shows that a mean is 0 and not missing.
        edge = {"edgecolor": group.colour, "linewidth": 1.2, "zorder": 3, "clip_on": False}
        axes.bar(places, mean, 0.9 * width, label=group.label, color=group.colour, **edge)
        # A white edge keeps the interval visible on dark bars.
        axes.vlines(places, low, high, color="white", linewidth=2.8, zorder=4)
        axes.vlines(places, low, high, color=_INTERVAL, linewidth=1.2, zorder=5)
    axes.axhline(0, color=_INTERVAL, linewidth=0.8)
    axes.set_xlim(-0.6, count - 0.4)


def _inches(axes: Any) -> float:
    """Returns the width of the axes in inches, before a layout makes room for the legend."""
    return float(axes.get_window_extent().width / axes.figure.dpi)


def _ordered(results: Results, rows: Sequence[Row], column: str) -> tuple[list[Any], bool]:
    """Returns a column's sorted values, and whether they are all numbers."""
    present = {comparable(row.get(column)): row.get(column) for row in rows}
    if all(type(value) in (int, float) for value in present.values()):
        return sorted(present.values()), True
    return [value for value in results.axes.get(column, present.values()) if comparable(value) in present], False


def _means(
    rows: Sequence[Row], y: str, x: str, values: Sequence[Any], is_probability: bool
) -> tuple[list[int], np.ndarray]:
    """Averages column `y` for each value of `x`.

    Returns:
        The indices of the values of `x` for which `y` has numbers, and for each of them the mean and the ends of its
        confidence interval, [indices, 3].

    Raises:
        ValueError: `y` contains something other than finite numbers.
    """
    # Points that describe the same picture have equal names.
    groups: dict[Any, dict[str, float]] = {comparable(value): {} for value in values}
    for row, number in zip(rows, numbers(rows, y), strict=True):
        if np.isinf(number):
            raise ValueError(f"{y!r} is infinite for some pictures, so it has no mean; measure NaN for these pictures")
        if not np.isnan(number):
            groups[comparable(row.get(x))][row["name"]] = number
    mean = intervals.mean_probability if is_probability else intervals.mean
    positions = [i for i, members in enumerate(groups.values()) if members]
    means = [mean(np.array(list(members.values()))) for members in groups.values() if members]
    return positions, np.array(means).reshape(-1, 3)


def _has_room(values: Sequence[float]) -> bool:
    """Returns whether there is space for a label at each of these sorted numbers."""
    return all(12 * (b - a) >= values[-1] - values[0] for a, b in itertools.pairwise(values))
