"""Makes contact sheets: pictures arranged along two axes, labelled at the edges with the axes' names and values."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from sega_jax.method.naming import name_of
from sega_jax.pipelines.captions import Font, Segment, distinct
from sega_jax.pipelines.fonts import announce
from sega_jax.sweep.reporting.results import Results, Row
from sega_jax.sweep.reporting.values import show

_GAP, _PAD, _GREY, _EMPTY = 4, 16, "#666666", "#f0f0f0"

Axis = tuple[str | None, Sequence[Any]]  # the axis's name and its values, or None and one value


class Page:
    """A contact sheet.

    Attributes:
        fixed: the values that the sheet's pictures have on all axes that it does not show.
    """

    def __init__(self, fixed: dict[str, Any], draw: Callable[[], Image.Image]):
        self.fixed, self._draw = fixed, draw

    @cached_property
    def image(self) -> Image.Image:
        """The sheet, which is drawn when it is first used."""
        return self._draw()


def sheets(
    results: Results,
    across: str | None = "auto",
    down: str | None = "auto",
    fixed: Mapping[str, Any] | None = None,
    *,
    side: int = 160,
) -> list[Page]:
    """Arranges pictures along two axes, with one page for each combination of the other axes' values.

    "auto" chooses an axis with several values: first a setting of an edit, if possible its scale, and then the seed,
    the prompt or another setting. Long labels are wrapped, and cut after a few lines. Characters that no font has cause
    a warning.

    Args:
        results: the sweep's results.
        across: the horizontal axis, such as "glasses.scale"; "auto" chooses one, and None means a single column.
        down: the vertical axis; "auto" chooses one, and None means a single row.
        fixed: {column: value}; the pages include only pictures with these values; see `Results.value`.
        side: the shorter side of a picture on the page, in pixels.

    Raises:
        ValueError: an axis or value is unknown, an axis is used twice, or the sweep has no pictures yet.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> [page] = sweep.sheets(results)  # the same as across="glasses.scale", down=None
        >>> page.image.save("sheet.png")
    """
    fixed = {column: results.value(column, value) for column, value in (fixed or {}).items()}
    given = [axis for axis in (across, down) if axis not in (None, "auto")]
    for axis in given:
        if axis not in results.axes:
            raise ValueError(f"{axis!r} is not an axis of this sweep; its axes are {', '.join(results.axes) or 'none'}")
        if axis in fixed or given.count(axis) > 1:
            raise ValueError(
                f"{axis!r} is used twice; use it once, as {name_of('across')}, as"
                f" {name_of('down')} or in {name_of('fixed')}"
            )
    across, down = _chosen(results, across, down, fixed)
    announce({show(row[axis]) for row in results.with_values(fixed) for axis in results.axes})
    columns, lines = (_values(results, axis, fixed) for axis in (across, down))
    shown_axes = [axis for axis in (across, down) if axis is not None]
    return [
        Page(page, partial(_page, results, rows, (across, columns), (down, lines), page | fixed, side))
        for page, rows in results.pages(shown_axes, fixed)
    ]


def _chosen(
    results: Results, across: str | None, down: str | None, fixed: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Replaces "auto" by an axis that has several values among the pictures with the values in `fixed`, or by None."""

    def is_of_edit(axis: str | None) -> bool:
        return axis is not None and axis.partition(".")[0] in results.plan.sweep.edits

    free = [axis for axis in results.axes if axis not in (across, down, *fixed)]
    varying = [axis for axis in free if len(_values(results, axis, fixed)) > 1]
    of_edits = sorted(filter(is_of_edit, varying), key=lambda axis: not axis.endswith(".scale"))
    others = [axis for axis in dict.fromkeys(("seed", "prompt", *varying)) if axis in varying and axis not in of_edits]
    first = 0 if is_of_edit(across) or is_of_edit(down) else 1
    order = iter([*of_edits[:first], *others, *of_edits[first:]])
    across, down = (next(order, None) if axis == "auto" else axis for axis in (across, down))
    return across, down


def _values(results: Results, axis: str | None, fixed: Mapping[str, Any]) -> list[Any]:
    """Returns the values of an axis that have pictures; numbers are sorted."""
    if axis is None:
        return [None]
    present = {row[axis] for row in results.with_values(fixed)}
    values = [value for value in results.axes[axis] if value in present]
    return sorted(values) if all(type(value) in (int, float) for value in values) else values


def _page(
    results: Results, rows: Sequence[Row], across: Axis, down: Axis, fixed: Mapping[str, Any], side: int
) -> Image.Image:
    """Draws one page: a line of text with the fixed values, then the pictures, with the axes' names and values at the
    edges.
    """
    size = rows[0]["width"], rows[0]["height"]
    width, height = (round(length * side / min(size)) for length in size)
    small, normal, large = (Font(max(round(side * share), 11)) for share in (0.085, 0.1, 0.11))
    label_width, most_lines = max(width, 120), max(height // normal.step, 1)
    top = [_text([text], normal, width - normal.size // 2, 4, 0.5) for text in _labels(across, normal, width, 4)]
    left = [
        _text([text], normal, label_width, most_lines, 1) for text in _labels(down, normal, label_width, most_lines)
    ]
    x0 = max((label.width + 8 for label in left), default=0)
    y0 = max((label.height + 4 for label in top), default=0)
    xs = range(x0, x0 + len(across[1]) * (width + _GAP), width + _GAP)
    ys = range(y0, y0 + len(down[1]) * (height + _GAP), height + _GAP)
    table = Image.new("RGB", (xs.stop - _GAP, ys.stop - _GAP), "white")
    for x, label in zip(xs, top, strict=False):
        table.paste(label, (x + (width - label.width) // 2, y0 - 4 - label.height))
    for y, label in zip(ys, left, strict=False):
        table.paste(label, (x0 - 8 - label.width, y + (height - label.height) // 2))
    # The first row of each cell.
    cells = {(_value(row, across[0]), _value(row, down[0])): row for row in reversed(rows)}
    for (x, column), (y, line) in itertools.product(zip(xs, across[1], strict=True), zip(ys, down[1], strict=True)):
        table.paste(_picture(results, cells.get((column, line)), (width, height)), (x, y))
    if across[0]:
        name = _text([across[0]], large, table.width - x0, 3)
        y0 += name.height + 6
        table = ImageOps.expand(table, (0, name.height + 6, 0, 0), "white")
        table.paste(name, ((x0 + table.width - name.width) // 2, 0))
    if down[0]:
        name = _text([down[0]], large, max(table.height - y0, 160), 2).rotate(90, expand=True)
        below = max(y0 + name.height - table.height, 0)
        table = ImageOps.expand(table, (name.width + 6, 0, 0, below), "white")
        table.paste(name, (0, (y0 + table.height - name.height) // 2))
    if fixed:
        texts = [small.shortened(f"{key} = {show(value)}", 3 * table.width) for key, value in fixed.items()]
        caption = _text(texts, small, table.width, colour=_GREY)
        table = ImageOps.expand(table, (0, caption.height + 8, 0, 0), "white")
        table.paste(caption, (0, 0))
    return ImageOps.expand(table, _PAD, "white")


def _labels(axis: Axis, font: Font, width: int, most: int) -> list[str]:
    """Returns the labels of an axis's values, which have to fit into `most` lines."""
    texts = [show(value) for value in axis[1] if axis[0]]
    return distinct(texts, lambda text: font.lines([Segment(text)], width, most))


def _value(row: Row, axis: str | None) -> Any:
    return None if axis is None else row[axis]


def _picture(results: Results, row: Row | None, size: tuple[int, int]) -> Image.Image:
    """Returns a row's picture resized to `size`, or a grey rectangle if there is no picture."""
    image = None if row is None else results.picture(row)
    if image is None:
        return Image.new("RGB", size, _EMPTY)
    # Enlarging by an integer factor keeps pixels sharp.
    return image.resize(size, Image.Resampling.NEAREST if size[0] % image.width == 0 else Image.Resampling.LANCZOS)


def _text(
    texts: Sequence[str], font: Font, width: int, most: int | None = None, align: float = 0, colour: str = "black"
) -> Image.Image:
    """Draws texts, wrapped at `width` pixels and with at most `most` lines, on an image of matching size. `align` is 0
    for left and 1 for right."""
    lines = font.lines([Segment(text, colour) for text in texts], width, most)
    lengths = [math.ceil(font.width([line])) for line in lines]
    image = Image.new("RGB", (max(*lengths, 1), font.step * len(lines)), "white")
    for k, line in enumerate(lines):
        place = align * (image.width - lengths[k]), k * font.step
        font.draw(ImageDraw.Draw(image), place, line)
    return image
