"""Draws captions on pictures: lines of text in any script, wrapped or shortened to a width in pixels."""

import io
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import regex
from PIL import ImageDraw, ImageFont

from sega_jax.pipelines.fonts import clusters, own_font, readable, spans

_ELLIPSIS = "…"
# Lines may break after the parts that this pattern finds: words, and single Chinese or Japanese characters with their
# punctuation marks.
_CJK = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
_PARTS = regex.compile(rf"\s*(?:[\p{{Ps}}\p{{Pi}}]*{_CJK}[\p{{M}}\p{{Pe}}\p{{Pf}}\p{{Po}}ー々]*|(?:(?!{_CJK})\S)+)")
_RIGHT_TO_LEFT = {"R": True, "AL": True, "AN": True, "L": False}


class Segment(NamedTuple):
    """A text of one colour. Its first letter determines whether it is read from left to right."""

    text: str
    colour: str = "black"


class Piece(NamedTuple):
    """The part of a segment on one line. Its offset from the start of the line is in pixels."""

    offset: float
    text: str
    colour: str
    rtl: bool


Line = list[Piece]


class Font:
    """A font for captions in any script.

    Args:
        size: The size in pixels.

    Example:
        >>> from sega_jax.pipelines.captions import Font, Segment
        >>> [[piece.text for piece in line] for line in Font(14).lines([Segment("a portrait of a cat")], 70)]
        [['a portrait'], ['of a cat']]
    """

    def __init__(self, size: int):
        self.size = size
        self.step = round(size * 1.3)  # the distance between lines in pixels

    def length(self, text: str) -> float:
        """Returns the width in pixels of a text to which `readable` was applied."""
        return sum(part.font.getlength(part.text, **part.options) for part in _parts(text, self.size, False))

    def shortened(self, text: str, width: float) -> str:
        """Makes a text readable. If it is wider than `width`, an ellipsis replaces its end."""
        text = readable(text)
        return text if self.length(text) <= width else self._cut(text, width)

    def lines(self, segments: Sequence[Segment], width: float, most: int | None = None) -> list[Line]:
        """Arranges segments in lines, with wide gaps between segments.

        A segment is divided only if it is wider than a line. A word is divided only if it is wider than a line.

        Args:
            segments: The texts.
            width: The maximum width of a line in pixels.
            most: The maximum number of lines; an ellipsis replaces the rest of the text.
        """
        lines: list[Line] = [[]]
        for segment in segments:
            rest, rtl = readable(segment.text), _reads_from_the_right(segment.text)
            whole = self._prefix(_PARTS.findall(rest), width) == rest
            while rest:
                line = lines[-1]
                start = self._end(line) + 2.5 * self.length(" ") if line else 0.0
                part = self._prefix(_PARTS.findall(rest), width - start)
                if line and (not part or (whole and part != rest)):
                    if len(lines) == most:
                        last = line.pop()
                        line.append(last._replace(text=self._cut(last.text, width - last.offset)))
                        return lines
                    lines.append([])
                else:
                    letters = clusters(rest)
                    part = part or self._prefix(letters, width) or letters[0]
                    line.append(Piece(start, part, segment.colour, rtl))
                    rest = rest[len(part) :].lstrip()
        return lines

    def fits(self, text: str, width: float, most: int) -> bool:
        """Returns whether a text has at most `most` lines of this width if no word is divided."""
        words = (part.strip() for part in _PARTS.findall(readable(text)))
        return all(self.length(word) <= width for word in words) and len(self.lines([Segment(text)], width)) <= most

    def width(self, lines: Sequence[Line]) -> float:
        """Returns the width of the longest line in pixels."""
        return max(map(self._end, lines), default=0)

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], line: Line) -> None:
        """Draws a line. `place` is the left end of its upper edge."""
        bottom = place[1] + _opened(None, self.size).getmetrics()[0]
        for piece in line:
            x = place[0] + piece.offset
            for part in _parts(piece.text, self.size, piece.rtl):
                draw.text((x, bottom), part.text, piece.colour, part.font, anchor="ls", **part.options)
                x += part.font.getlength(part.text, **part.options)

    def _end(self, line: Line) -> float:
        return line[-1].offset + self.length(line[-1].text) if line else 0

    def _prefix(self, parts: Sequence[str], width: float, ending: str = "") -> str:
        """Joins as many parts as fit into the width together with an ending, which is not returned."""

        def length(count: int) -> float:
            return self.length("".join(parts[:count]) + ending)

        most = 8
        while most < len(parts) and length(most) <= width:  # short texts are measured faster
            most *= 2
        return "".join(parts[: bisect_right(range(1, min(most, len(parts)) + 1), width, key=length)])

    def _cut(self, text: str, width: float) -> str:
        return self._prefix(clusters(text), width, _ELLIPSIS).rstrip() + _ELLIPSIS


def distinct(texts: Sequence[str], cut: Callable[[str], object]) -> list[str]:
    """Returns texts that differ after `cut`, if possible. If cutting makes texts equal, an ellipsis replaces the words
    at the start that all have in common.

    Example:
        >>> from sega_jax.pipelines.captions import distinct
        >>> distinct(["a portrait of Ann", "a portrait of Ben"], lambda text: text[:10])
        ['…Ann', '…Ben']
    """
    different = set(texts)
    if len({str(cut(text)) for text in different}) == len(different):
        return list(texts)
    words = [text.split() for text in different]
    common = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))))
    return [_ELLIPSIS + " ".join(text.split()[common:]) for text in texts] if common else list(texts)


class _Part(NamedTuple):
    """A text in one font and one direction, and Pillow's options for drawing it."""

    text: str
    font: ImageFont.FreeTypeFont
    options: dict[str, Any]


def _parts(text: str, size: int, rtl: bool) -> Iterator[_Part]:
    """Yields the parts of a line of text in the order in which they appear from left to right."""
    runs = [(text, False)] if text.isascii() and not rtl else _runs(text, rtl)
    for run, backwards in reversed(runs) if rtl else runs:
        for part, file in reversed(spans(run)) if backwards else spans(run):
            yield _Part(part, _opened(file, size, backwards), {"direction": "rtl"} if backwards else {})


def _runs(text: str, rtl: bool) -> list[tuple[str, bool]]:
    """Splits a text into parts of one direction, and tells for each whether it is read from the right.

    This is the part of the Unicode bidirectional algorithm that concerns several fonts. Pillow arranges the characters
    inside of each part.
    """
    directions: list[bool | None] = []
    letter: bool = rtl  # the direction of the last letter
    for c in text:
        kind = unicodedata.bidirectional(c)
        letter = _RIGHT_TO_LEFT.get(kind, letter)
        followers = directions[-1] if directions and kind in ("NSM", "BN") else None
        directions.append(letter if kind in _RIGHT_TO_LEFT or kind == "EN" else followers)
    # Spaces and punctuation marks between two letters of one direction have this direction; others have the text's.
    resolved: list[bool] = []
    for direction, group in groupby(directions):
        count = len(list(group))
        if direction is None:
            before = resolved[-1] if resolved else rtl
            after = next((one for one in directions[len(resolved) + count :][:1] if one is not None), rtl)
            direction = before if before == after else rtl
        resolved += [direction] * count
    paired = groupby(zip(text, resolved, strict=True), key=lambda one: one[1])
    return [("".join(c for c, _ in run), direction) for direction, run in paired]


def _reads_from_the_right(text: str) -> bool:
    kinds = map(unicodedata.bidirectional, text)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


@cache
def _opened(file: Path | None, size: int, backwards: bool = False) -> ImageFont.FreeTypeFont:
    """Opens a font. Pillow draws its own font without HarfBuzz, which can only draw from left to right."""
    if file is not None:
        font = ImageFont.truetype(file, size)
        with suppress(OSError, ValueError):  # fonts with a fixed weight
            font.set_variation_by_name("Regular")
        return font
    font = own_font(size)
    return ImageFont.truetype(io.BytesIO(font.font_bytes), size) if backwards else font
