"""Draws the sheet of `sega-jax edit`: the input picture if there is one, the pictures without edits, and the pictures
with edits."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from sega_jax.pipelines.captions import Font, Line, Segment
from sega_jax.pipelines.fonts import announce

# In pixels: the side length up to which small pictures are enlarged, and the maximum total width of all columns.
_SIDE, _WIDTH = 384, 2048
# The maximum number of pictures in a row, and a larger maximum for sheets that would otherwise exceed four rows.
_COLUMNS, _MANY_COLUMNS = 8, 16
# The maximum numbers of lines of the title and of other captions.
_TITLE, _LINES = 6, 8
_INK, _GREY, _EMPTY = "#1f2328", "#656d76", "#eaeef2"
_SIGNS = {"+": "#116329", "-": "#a40e26"}


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
        source: the picture that the call starts from or enlarges, if any.
    """

    def __init__(self, prompt: str, edits: Sequence[str], count: int, source: Image.Image | None = None):
        self.prompt, self.edits, self.count, self.source = prompt, list(edits), count, source
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
    def compares(self) -> bool:
        """Whether there are pictures to compare, so that the sheet is worth drawing."""
        return self.pictures > 1 or (self.pictures == 1 and self.source is not None)

    @property
    def _beside(self) -> bool:
        """Whether the pictures of a single seed are drawn next to each other."""
        return self.count == 1 and (bool(self.edits) or self.source is not None)

    @property
    def columns(self) -> int:
        """The number of pictures in a row; only the last row may have fewer."""
        if self._beside:
            return 1 + bool(self.edits) + (self.source is not None)
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
        """Draws the page and returns it. Characters that no font has cause a warning."""
        announce([self.prompt, *self.edits])
        width = self._size[0]
        gap = max(width // 40, 4)
        inner = self.columns * (width + gap) - gap
        em = min(max(inner // 46, 14), 32)
        page = _Page(inner, margin=max(em, 16))
        edits = [Segment(text, _SIGNS.get(text[:1], _INK)) for text in self.edits]
        without = [Segment("without edits", _GREY)]
        page.texts([[Segment(self.prompt, _INK)]], round(em * 1.2), inner, 0, _TITLE)
        page.space(em // 2)
        seeds = list(self._cells)
        labels = [[Segment("input", _GREY)]] if self.source is not None else []
        sources = [] if self.source is None else [Cell(_fitted(self.source, self._size))]
        if self._beside:
            page.texts([*labels, without, edits] if edits else labels, em, width, gap)
            page.space(em // 3)
            page.cells([*sources, *self._cells[seeds[0]]], self._size, gap, em)
            page.texts([*([] for _ in sources), [Segment(f"seed {seeds[0]}", _GREY)]], em, width, gap)
            return page.finish()
        if sources:
            page.texts(labels, em, width, gap)
            page.space(em // 3)
            page.cells(sources, self._size, gap, em)
            page.space(em)
        for start in range(0, len(seeds), self.columns):
            block = seeds[start : start + self.columns]
            for kind in range(2 if self.edits else 1):
                if self.edits:
                    page.texts([edits if kind else without], em, inner, 0)
                    page.space(em // 3)
                page.cells([self._cells[seed][kind] for seed in block], self._size, gap, em)
                page.space(em // 3)
            page.texts([[Segment(f"seed {seed}", _GREY)] for seed in block], em, width, gap)
            page.space(em)
        return page.finish()


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarges or reduces a picture to a size, and fills up the shorter side with white."""
    zoomed = size[0] % image.width == 0
    return ImageOps.pad(image, size, Image.Resampling.NEAREST if zoomed else Image.Resampling.LANCZOS, color="white")


class _Page:
    """A page that grows downwards. Everything is drawn at the end, when the height is known."""

    def __init__(self, width: int, margin: int):
        self.width, self.margin, self.y = width, margin, margin
        self._texts: list[tuple[Font, tuple[int, int], Line]] = []  # the left and upper ends of lines
        self._images: list[tuple[int, int, Image.Image]] = []  # left, top
        self._bottom = margin

    def space(self, height: int) -> None:
        self.y += height

    def texts(self, columns: Iterable[Sequence[Segment]], size: int, width: int, gap: int, most: int = _LINES) -> None:
        """Writes paragraphs of at most `most` lines next to each other, in columns that are `width` pixels wide."""
        font, count = Font(size), 0
        for column, segments in enumerate(columns):
            lines = font.lines(segments, width, most)
            self._write(font, self.margin + column * (width + gap), self.y, lines)
            count = max(count, len(lines))
        self.y += count * font.step
        self._bottom = self.y

    def cells(self, cells: Sequence[Cell], size: tuple[int, int], gap: int, em: int) -> None:
        """Adds cells next to each other. If a cell has a note, the note is shown instead of the picture."""
        width, height = size
        for column, cell in enumerate(cells):
            left = self.margin + column * (width + gap)
            image = cell.image
            if image is None or cell.note:
                image = Image.new("RGB", size, _EMPTY)
                font = Font(em)
                lines = font.lines([Segment(cell.note, _GREY)], width - em, max((height - em) // font.step, 1))
                self._write(font, left + em // 2, self.y + em // 2, lines)
            self._images.append((left, self.y, image))
        self.y += height
        self._bottom = self.y

    def finish(self) -> Image.Image:
        """Draws the page and returns it."""
        page = Image.new("RGB", (self.width + 2 * self.margin, self._bottom + self.margin), "white")
        for left, top, image in self._images:
            page.paste(image, (left, top))
        draw = ImageDraw.Draw(page)
        for font, place, line in self._texts:
            font.draw(draw, place, line)
        return page

    def _write(self, font: Font, left: int, top: int, lines: Sequence[Line]) -> None:
        self._texts += [(font, (left, top + i * font.step), line) for i, line in enumerate(lines)]
