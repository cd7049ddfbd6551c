"""Encodes pictures with their settings, and arranges pictures with captions on sheets."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sega_jax.pipelines.captions import Font, Segment
from sega_jax.pipelines.fonts import announce
from sega_jax.pipelines.stored_settings import save_options
from sega_jax.weights.destination import write_file

_MARGIN, _FONT, _LINES = 8, 14, 6


def sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4) -> Image.Image:
    """Arranges pictures of equal size in a grid, each above its caption, for notebooks and reports.

    Pictures with a side shorter than 256 pixels are enlarged by an integer factor.

    Args:
        images: The pictures, in reading order.
        captions: One caption for each picture, in any script. Captions are wrapped, and cut after six lines.
        columns: The number of pictures in each row of the sheet.

    Example:
        >>> from PIL import Image
        >>> import sega_jax
        >>> pictures = [Image.new("RGB", (128, 128), color) for color in ("red", "blue")]
        >>> sega_jax.sheet(pictures, ["before", "after"]).width
        536
    """
    announce(captions)
    zoom = max(1, -(-256 // min(images[0].size)))
    width, height = (side * zoom for side in images[0].size)
    font = Font(_FONT)
    wrapped = [font.lines([Segment(caption)], width, _LINES) for caption in captions]
    columns = min(columns, len(images))
    across, down = width + _MARGIN, height + max(map(len, wrapped)) * font.step + 2 * _MARGIN
    page = Image.new("RGB", (columns * across + _MARGIN, -(-len(images) // columns) * down), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = _MARGIN + i % columns * across, _MARGIN + i // columns * down
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for k, line in enumerate(lines):
            font.draw(draw, (left, top + height + 4 + k * font.step), line)
    return page


def encoded(image: Image.Image, format: str, settings: dict[str, Any]) -> bytes:
    """Encodes a picture, without loss, as a file that stores its settings.

    Args:
        format: "png" or "webp".
        settings: Values that JSON can represent.
    """
    file = io.BytesIO()
    lossless = {"lossless": True} if format == "webp" else {}
    image.save(file, format, **lossless, **save_options(format, settings))
    return file.getvalue()


def save(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes a PNG file that contains the picture's settings. An existing file is never replaced.

    Raises:
        FileExistsError: The file exists.
        OSError: The file cannot be written, for example because the disk is full.
    """
    write_file(path, encoded(image, "png", settings))
