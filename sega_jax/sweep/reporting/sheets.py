"""Contact sheets: pictures over two axes, with their names and values beside them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from sega_jax.sweep.reporting.results import Results, Row, show

_GAP, _PAD, _GREY, _EMPTY = 4, 16, "#666666", "#f0f0f0"


class Page(NamedTuple):
    """A sheet, of the pictures with these values of the axes that it does not show."""

    fixed: dict[str, Any]
    image: Image.Image


def sheets(
    results: Results, across: str | None, down: str | None, fixed: Mapping[str, Any] | None = None, *, side: int = 160
) -> list[Page]:
    """Pictures over two axes, a page for each combination of the others' values.

    Args:
        across, down: axes of the sweep, as "glasses.scale"; None is none.
        fixed: the values of other axes, or of any column, that are shown alone.
        side: of a picture on the page in pixels, the shorter one.

    Raises:
        ValueError: no such axis or value, an axis that is named twice, or no picture yet.
    """
    fixed, chosen = dict(fixed or {}), [axis for axis in (across, down) if axis is not None]
    for axis in chosen:
        if axis not in results.axes:
            raise ValueError(f"{axis!r} is no axis of this sweep; its axes are {', '.join(results.axes) or 'none'}")
        if axis in fixed or chosen.count(axis) > 1:
            raise ValueError(f"{axis!r} is named twice; show it across or down, or fix it")
    if not results.rows:
        raise ValueError(f"{results.folder} has no picture yet")
    columns, lines = (_values(results, axis, fixed) for axis in (across, down))
    return [
        Page(page, _page(results, rows, (across, columns), (down, lines), page | fixed, side))
        for page, rows in results.pages(chosen, fixed)
    ]


def _values(results: Results, axis: str | None, fixed: Mapping[str, Any]) -> list[Any]:
    """Of an axis, those that some picture has."""
    if axis is None:
        return [None]
    there = [row[axis] for row in results.where(fixed)]
    values = [value for value in results.axes[axis] if value in there]
    return sorted(values) if all(type(value) in (int, float) for value in values) else values


Axis = tuple[str | None, Sequence[Any]]


def _page(
    results: Results, rows: Sequence[Row], across: Axis, down: Axis, said: Mapping[str, Any], side: int
) -> Image.Image:
    size = rows[0]["width"], rows[0]["height"]
    width, height = (round(length * side / min(size)) for length in size)
    small, usual, large = (ImageFont.load_default(max(round(side * share), 11)) for share in (0.085, 0.1, 0.11))
    left = _Labels(down, usual, max(width, 120))
    top = [_wrapped(usual, show(value), width) if across[0] else [] for value in across[1]]
    caption = [", ".join(f"{key} = {show(value)}" for key, value in said.items())]
    line, title = _height(usual), _height(large) + 6
    x0 = _PAD + (title if down[0] else 0) + left.width
    y0 = _PAD + (_height(small) + 8 if said else 0) + (title if across[0] else 0) + max(map(len, top)) * line + 4
    total = x0 + len(across[1]) * (width + _GAP) - _GAP + _PAD
    if said:
        caption = _wrapped(small, caption[0], total - 2 * _PAD)
        y0 += (len(caption) - 1) * _height(small)
    page = Image.new("RGB", (total, y0 + len(down[1]) * (height + _GAP) - _GAP + _PAD), "white")
    draw = ImageDraw.Draw(page)
    for k, text in enumerate(caption if said else []):
        draw.text((_PAD, _PAD + k * _height(small)), text, _GREY, small)
    if across[0]:
        middle = (x0 + total - _PAD) / 2
        draw.text((middle, y0 - max(map(len, top)) * line - title - 2), across[0], "black", large, anchor="ma")
    for i, texts in enumerate(top):
        for k, text in enumerate(texts):
            at = x0 + i * (width + _GAP) + width / 2, y0 - 4 - (len(texts) - 1 - k) * line
            draw.text(at, text, "black", usual, anchor="md")
    if down[0]:
        name = Image.new("RGB", (round(large.getlength(down[0])) + 4, title), "white")
        ImageDraw.Draw(name).text((2, 0), down[0], "black", large)
        name = name.rotate(90, expand=True)
        page.paste(name, (_PAD, max(y0, (y0 + page.height - _PAD - name.height) // 2)))
    for j, texts in enumerate(left.texts):
        y = y0 + j * (height + _GAP)
        for k, text in enumerate(texts):
            middle = y + height / 2 + (k - (len(texts) - 1) / 2) * line
            draw.text((x0 - 8, middle), text, "black", usual, anchor="rm")
        for i, value in enumerate(across[1]):
            at, here = x0 + i * (width + _GAP), {across[0]: value, down[0]: down[1][j]}
            row = next((row for row in rows if all(row[key] == one for key, one in here.items() if key)), None)
            image = None if row is None else results.picture(row)
            if image is None:
                draw.rectangle((at, y, at + width - 1, y + height - 1), _EMPTY)
            elif image.size != (width, height):
                # Small pictures keep their pixels.
                how = Image.Resampling.NEAREST if width % image.width == 0 else Image.Resampling.LANCZOS
                image = image.resize((width, height), how)
            if image is not None:
                page.paste(image, (at, y))
    return page


class _Labels:
    def __init__(self, axis: Axis, font: Any, most: int):
        self.texts = [_wrapped(font, show(value), most) if axis[0] else [] for value in axis[1]]
        self.width = 8 + round(max((font.getlength(text) for texts in self.texts for text in texts), default=-8))


def _wrapped(font: Any, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(int(width / font.getlength("n")), 6)) if width else [text]


def _height(font: Any) -> int:
    return sum(font.getmetrics()) + 2
