"""Draws the sheet of `sega-jax edit`: the pictures without edits and, below them, the pictures with edits."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

# In pixels: the side length up to which small pictures are enlarged, and the maximum total width of all columns.
_SIDE, _WIDTH = 384, 2048
# The maximum number of pictures in a row, and a larger maximum for sheets that would otherwise exceed four rows.
_COLUMNS, _MANY_COLUMNS = 8, 16
_INK, _GREY, _EMPTY = "#1f2328", "#656d76", "#eaeef2"
_SIGNS = {"+": "#116329", "-": "#a40e26"}

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Segment = tuple[str, str]  # a string without line breaks, and its colour
Line = list[tuple[float, str, str]]  # the offset, text and colour of each part of a line


class Cell(NamedTuple):
    """A picture on the sheet, or a note that explains why it is missing."""

    image: Image.Image | None
    note: str = ""


class Sheet:
    """Collects small copies of pictures and draws them on one page.

    Args:
        prompt: the title.
        edits: the concepts, each with the prefix "+ " or "- ". Empty for a sheet without edited pictures.
        count: the number of seeds that will be added.
    """

    def __init__(self, prompt: str, edits: Sequence[str], count: int):
        self.prompt, self.edits, self.count = prompt, list(edits), count
        self._cells: dict[int, list[Cell]] = {}
        self._size = (_SIDE, _SIDE)

    def add(self, seed: int, cells: Sequence[Cell]) -> None:
        """Adds a seed's picture without edits and, if there are edits, the picture with them."""
        self._cells[seed] = [Cell(None if one.image is None else self._resized(one.image), one.note) for one in cells]

    @property
    def pictures(self) -> int:
        """The number of pictures added so far."""
        return sum(cell.image is not None for cells in self._cells.values() for cell in cells)

    @property
    def _beside(self) -> bool:
        """Whether the two pictures of a single seed are drawn next to each other."""
        return self.count == 1 and bool(self.edits)

    @property
    def columns(self) -> int:
        """The number of pictures in a row; only the last row may have fewer."""
        if self._beside:
            return 2
        most = _COLUMNS if self.count <= 4 * _COLUMNS else _MANY_COLUMNS
        return -(-self.count // -(-self.count // most))

    def _resized(self, image: Image.Image) -> Image.Image:
        zoom = min(_SIDE // max(image.size), _WIDTH // (self.columns * image.width))
        if zoom >= 1:
            # An integer factor keeps the pixels sharp and equal in size.
            self._size = (image.width * zoom, image.height * zoom)
            return image.resize(self._size, Image.Resampling.NEAREST)
        scale = min(1, _WIDTH / (self.columns * image.width))
        self._size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        return image.resize(self._size, Image.Resampling.LANCZOS)

    def draw(self) -> Image.Image:
        """Draws the page and returns it."""
        width = self._size[0]
        gap = max(width // 40, 4)
        inner = self.columns * (width + gap) - gap
        em = min(max(inner // 46, 14), 32)
        page = _Page(inner, margin=max(em, 16))
        edits = [(text, _SIGNS.get(text[:1], _INK)) for text in self.edits]
        page.text([(word, _INK) for word in self.prompt.split()], round(em * 1.2))
        page.space(em // 2)
        seeds = list(self._cells)
        if self._beside:
            labels = [[("without edits", _GREY)], edits]
            page.texts(labels, em, width, gap)
            page.space(em // 3)
            page.cells(self._cells[seeds[0]], self._size, gap, em)
            page.texts([[(f"seed {seeds[0]}", _GREY)]], em, width, gap)
            return page.finish()
        for start in range(0, len(seeds), self.columns):
            block = seeds[start : start + self.columns]
            for kind in range(2 if self.edits else 1):
                if self.edits:
                    page.text(edits if kind else [("without edits", _GREY)], em)
                    page.space(em // 3)
                page.cells([self._cells[seed][kind] for seed in block], self._size, gap, em)
                page.space(em // 3)
            page.texts([[(f"seed {seed}", _GREY)] for seed in block], em, width, gap)
            page.space(em)
        return page.finish()


class _Page:
    """A page that grows downwards. Everything is drawn at the end, when the height is known."""

    def __init__(self, width: int, margin: int):
        self.width, self.margin, self.y = width, margin, margin
        self._texts: list[tuple[int, int, int, Line]] = []  # left, top, size
        self._images: list[tuple[int, int, Image.Image]] = []  # left, top
        self._bottom = margin

    def space(self, height: int) -> None:
        self.y += height

    def text(self, segments: Sequence[Segment], size: int) -> None:
        """Writes a paragraph across the full width."""
        self.texts([segments], size, self.width, 0)

    def texts(self, columns: Iterable[Sequence[Segment]], size: int, width: int, gap: int) -> None:
        """Writes paragraphs next to each other, in columns that are `width` pixels wide."""
        font, step, most = ImageFont.load_default(size), round(size * 1.3), 0
        for column, segments in enumerate(columns):
            lines = _wrapped(segments, font, width)
            left = self.margin + column * (width + gap)
            self._texts += [(left, self.y + i * step, size, line) for i, line in enumerate(lines)]
            most = max(most, len(lines))
        self.y += most * step
        self._bottom = self.y

    def cells(self, cells: Sequence[Cell], size: tuple[int, int], gap: int, em: int) -> None:
        """Adds cells next to each other. If a cell has a note, the note is shown instead of the picture."""
        width, height = size
        for column, cell in enumerate(cells):
            left = self.margin + column * (width + gap)
            image = cell.image
            if image is None or cell.note:
                image = Image.new("RGB", size, _EMPTY)
                lines = _wrapped([(cell.note, _GREY)], ImageFont.load_default(em), width - em)
                self._texts += [
                    (left + em // 2, self.y + em // 2 + i * em * 5 // 4, em, x) for i, x in enumerate(lines)
                ]
            self._images.append((left, self.y, image))
        self.y += height
        self._bottom = self.y

    def finish(self) -> Image.Image:
        """Draws the page and returns it."""
        page = Image.new("RGB", (self.width + 2 * self.margin, self._bottom + self.margin), "white")
        for left, top, image in self._images:
            page.paste(image, (left, top))
        draw = ImageDraw.Draw(page)
        for left, top, size, line in self._texts:
            font = ImageFont.load_default(size)
            for offset, text, colour in line:
                draw.text((left + offset, top), text, colour, font)
        return page


def _wrapped(segments: Sequence[Segment], font: Font, width: float) -> list[Line]:
    """Breaks coloured segments into lines of at most `width` pixels, inside segments or words if necessary."""
    lines: list[Line] = [[]]
    x, space = 0.0, font.getlength(" ")
    for text, colour in segments:
        apart = 2.5 * space if colour in _SIGNS.values() else space
        pieces = [text] if font.getlength(text) <= width else _pieces(text, font, width)
        for i, piece in enumerate(pieces):
            length = font.getlength(piece)
            before = (apart if i == 0 else space) if lines[-1] else 0
            if lines[-1] and x + before + length > width:
                lines.append([])
                x, before = 0.0, 0
            lines[-1].append((x + before, piece, colour))
            x += before + length
    return lines


def _pieces(text: str, font: Font, width: float) -> list[str]:
    """Splits a text at spaces. Words that are too wide are also split between letters."""
    pieces = []
    for word in text.split():
        piece = ""
        for letter in word:
            if piece and font.getlength(piece + letter) > width:
                pieces.append(piece)
                piece = ""
            piece += letter
        pieces.append(piece)
    return pieces
