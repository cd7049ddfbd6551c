"""Defines the commands that write the pictures and numbers of a sweep's folder to a file: sheet, plot and report."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from PIL import Image

from sega_jax import sweep as sweeps
from sega_jax.cli.named_files import check_names, force_option, out_option, write
from sega_jax.cli.terminal import echo
from sega_jax.pipelines.progress import plainly

_FOLDER = click.argument("folder")
_ACROSS = click.option(
    "--across",
    metavar="AXIS",
    default="auto",
    show_default=True,
    help="The axis from left to right, such as glasses.scale; none for a single column.",
)
_DOWN = click.option(
    "--down",
    metavar="AXIS",
    default="auto",
    show_default=True,
    help="The axis from top to bottom; none for a single row.",
)
_WHERE = click.option(
    "--where",
    multiple=True,
    metavar="AXIS=VALUE",
    help="Use only the pictures with this value, such as seed=3. Values may be written as in the sweep's file or as on"
    " a sheet. May be given several times, for different axes.",
)


@click.command()
@_FOLDER
@_ACROSS
@_DOWN
@_WHERE
@click.option(
    "--side",
    default=160,
    show_default=True,
    type=click.IntRange(16, 4096),
    help="The shorter side of a picture on the sheet, in pixels.",
)
@out_option("sheet.png", "The file to write; if there are several sheets, their file names are numbered.")
@force_option
def sheet(folder: str, across: str, down: str, where: tuple[str, ...], side: int, out: Path, force: bool) -> None:
    """Arranges a sweep's pictures in a grid, with one setting on the horizontal axis and another on the vertical axis.

    By default, one axis is a setting of an edit, if possible its scale, and the other is the seed, the prompt or
    another setting. Each combination of the remaining axes' values gets a separate sheet.
    """
    with plainly():
        format = _picture_format(out)
        results = sweeps.Results(folder)
        pages = sweeps.sheets(results, _axis(across), _axis(down), _fixed(results, where), side=side)
        digits = len(str(len(pages)))
        numbered = [out.with_stem(f"{out.stem}-{number:0{digits}}") for number in range(1, len(pages) + 1)]
        paths = numbered if len(pages) > 1 else [out]
        check_names(paths, force)
        for path in paths:
            page = pages.pop(0)  # so that only one sheet is in memory
            save = partial(page.image.save, format=format)
            write(path, _encoded(path, save, "use .png, a smaller --side, or --where"), force)
            fixed = ", ".join(f"{key} = {sweeps.show(value)}" for key, value in page.fixed.items())
            echo(f"Wrote {path}" + (f": {fixed}" if fixed else ""))


@click.command()
@_FOLDER
@click.option("--y", required=True, metavar="COLUMN", help="The column to plot: a metric or other numbers.")
@click.option("--x", required=True, metavar="AXIS", help="The horizontal axis.")
@click.option("--by", metavar="AXIS", help="Draw one line, or bars of one colour, for each value of this axis.")
@_WHERE
@out_option("plot.png", "The file to write, with the extension png, svg or pdf.")
@force_option
def plot(folder: str, y: str, x: str, by: str | None, where: tuple[str, ...], out: Path, force: bool) -> None:
    """Plots the mean of a column for each value of an axis, with 95 % confidence intervals.

    The plot has lines if all values on the horizontal axis are numbers, and bars otherwise.
    """
    with plainly():
        check_names([out], force)
        results = sweeps.Results(folder)
        figure = sweeps.plot(results, y, x, by, _fixed(results, where))
        save = partial(figure.savefig, format=(out.suffix or ".png")[1:])
        write(out, _encoded(out, save, "use .png, .svg or .pdf"), force)
        echo(f"Wrote {out}")


@click.command()
@_FOLDER
@_ACROSS
@_DOWN
@click.option("--title", help="The title of the page.  [default: the folder's name]")
@out_option("report.html", "The file to write.")
@force_option
def report(folder: str, across: str, down: str, title: str | None, out: Path, force: bool) -> None:
    """Writes one HTML file with axes, plots and sheets."""
    with plainly():
        check_names([out], force)
        name = folder.rstrip("/").rpartition("/")[2] if title is None else title
        write(out, sweeps.report(sweeps.Results(folder), _axis(across), _axis(down), name).encode(), force)
        echo(f"Wrote {out}")


def _axis(text: str) -> str | None:
    return None if text == "none" else text


def _encoded(path: Path, save: Callable[[io.BytesIO], Any], remedy: str) -> bytes:
    """Returns the content of a file, given a function that saves it to a stream, and the remedy if this fails."""
    stream = io.BytesIO()
    try:
        save(stream)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"--out {path} cannot be written in this format ({error}); {remedy}") from None
    return stream.getvalue()


def _picture_format(path: Path) -> str:
    """Returns the format of a picture file. Devices without an extension, such as /dev/stdout, receive a PNG.

    Raises:
        ValueError: Pillow cannot write files with this extension.
    """
    if (known := Image.registered_extensions().get(path.suffix.lower() or ".png")) not in Image.SAVE:
        raise ValueError(f"--out {path} should have the extension of a picture, such as .png")
    return str(known)


def _fixed(results: sweeps.Results, where: tuple[str, ...]) -> dict[str, Any]:
    """Reads the --where options.

    Raises:
        ValueError: an option is malformed, an axis is given twice, or no picture has the value.
    """
    fixed: dict[str, Any] = {}
    for text in where:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ValueError(f"--where {text} should be AXIS=VALUE, such as seed=3")
        if key in fixed:
            raise ValueError(f"--where {text}: {key} already has a value; give each axis once")
        fixed[key] = results.value(key, value, as_text=True)
    return fixed
