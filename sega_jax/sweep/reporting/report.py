"""Makes a sweep's report: one HTML file that contains all pictures and curves, and can be opened without a server."""

import base64
import io
import json
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from sega_jax.sweep.reporting.plots import plot
from sega_jax.sweep.reporting.results import Results, numbers
from sega_jax.sweep.reporting.sheets import Page, sheets
from sega_jax.sweep.reporting.values import exact

_WEBP = 16383  # the maximum side of a WebP picture, in pixels
_PAGES = 12  # the maximum number of sheets in a report


def report(results: Results, across: str | None = "auto", down: str | None = "auto", title: str = "Sweep") -> str:
    """Returns a report as HTML: a summary, the axes, a curve of every metric over every numeric axis, and the first 12
    contact sheets.

    Args:
        results: the sweep's results.
        across, down: the axes of the sheets; see `sheets`.
        title: the title of the page.

    Raises:
        ImportError: jinja2 is not installed, or metrics were measured and matplotlib is not installed.
        ValueError: an axis is unknown, or the sweep has no pictures yet.

    Example:
        >>> from pathlib import Path
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> Path("report.html").write_text(sweep.report(results)) > 10_000
        True
    """
    template = _template()
    pages = sheets(results, across, down)
    # Draw the sheets first, because damaged pictures are then added to the problems.
    drawn = [(_name(page), _picture(page.image)) for page in pages[:_PAGES]]
    curves, empty = _curves(results)
    text = template.render(
        title=title,
        about=_about(results),
        axes={axis: _values(values) for axis, values in results.axes.items()},
        curves=curves,
        left_out=[*(f"The metric {name} has no numbers." for name in empty), *(f"{one}." for one in results.problems)],
        count=len(pages),
        sheets=drawn,
        settings=json.dumps(results.plan.sweep.as_dict(), indent=1, ensure_ascii=False),
    )
    return text.encode("utf-8", "backslashreplace").decode()  # files cannot contain single surrogates


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise ImportError('reports need jinja2, but it is not installed; pip install ".[sweep]"') from None
    text = resources.files("sega_jax.sweep.reporting").joinpath("report.html.j2").read_text("utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(text)


def _about(results: Results) -> str:
    """Summarises the pictures, the model, the time and the number of evaluations."""
    pictures = list({row["name"]: row for row in results.rows}.values())
    first, seconds = pictures[0], sum(row["seconds"] for row in pictures)
    counts, last = results.plan.counts, results.plan.facts.prefix
    return (
        f"{len(pictures)} of {counts.pictures} pictures, {first[f'{last}width']} × {first[f'{last}height']}, made by"
        f" {first['model'] or 'the demo model'} in {first['dtype']};"
        f" {first['scheduler'] or 'its own schedule'}; {seconds:.0f} s on {first['devices']} ×"
        f" {first['device']}; sega_jax {first['sega_jax']}, JAX {first['jax']};"
        f" {counts.compared}"
    )


def _values(values: list[Any]) -> list[str]:
    """Lists an axis's values. If there are more than 12, it lists the first five, the last one and the total number."""
    shown = list(map(exact, values))
    return shown if len(shown) <= 12 else [*shown[:5], f"… {shown[-1]} ({len(shown)})"]


def _curves(results: Results) -> tuple[dict[str, str], list[str]]:
    """Plots every metric over every numeric axis, with a line for each value of another axis.

    Returns:
        {name: SVG}, and the names of metrics without numbers, which have no plots.
    """
    over = [
        axis
        for axis, values in results.axes.items()
        if len(values) > 1 and axis != "seed" and all(type(value) in (int, float) for value in values)
    ]
    curves: dict[str, str] = {}
    empty = []
    for metric in results.metrics:
        if np.isnan(numbers(results.rows, metric)).all():
            empty.append(metric)
            continue
        for axis in over:
            by = next((other for other in over if other != axis and len(results.axes[other]) < 7), None)
            file = io.StringIO()
            plot(results, metric, axis, by).savefig(file, format="svg")
            curves[f"{metric} over {axis}"] = _data("image/svg+xml", file.getvalue().encode())
    return curves, empty


def _name(page: Page) -> str:
    return ", ".join(f"{key} = {exact(value)}" for key, value in page.fixed.items()) or "all pictures"


def _picture(image: Image.Image) -> str:
    file = io.BytesIO()
    if max(image.size) > _WEBP:
        image.save(file, "png")
        return _data("image/png", file.getvalue())
    image.save(file, "webp", quality=88, method=4)
    return _data("image/webp", file.getvalue())


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
