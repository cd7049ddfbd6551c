"""A report of a sweep: one HTML file with its pictures and curves in it, which opens without a server."""

import base64
import html
import io
import json
from typing import Any

from PIL import Image

from sega_jax.sweep.reporting.plots import plot
from sega_jax.sweep.reporting.results import Results, show
from sega_jax.sweep.reporting.sheets import sheets

# More pages than anybody looks at; the folder has the rest.
_PAGES = 12
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1.5rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
p.about { color: #666; margin-top: 0 }
table { border-collapse: collapse; font-size: .95rem } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
  vertical-align: top } th { font-weight: 600 } tr + tr { border-top: 1px solid #eee }
figure { margin: 1.2rem 0; overflow-x: auto } figure img { max-width: 100%; height: auto }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots img { width: 23rem; max-width: 100% }
details { margin: 2rem 0 } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def report(results: Results, across: str | None = None, down: str | None = None, title: str = "Sweep") -> str:
    """The report's HTML: what was made, the axes, curves of every metric, and contact sheets.

    Args:
        across, down: axes of the sheets; None chooses.

    Raises:
        ImportError: matplotlib is not installed, and there are metrics.
        ValueError: no such axis, or no picture yet.
    """
    if across is None and down is None:
        across, down = _chosen(results)
    pages = sheets(results, across, down)
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="about">{html.escape(_about(results))}</p>']
    parts += ["<h2>Axes</h2>", _table([(axis, _values(values)) for axis, values in results.axes.items()])]
    if curves := _curves(results):
        said = "Means over all pictures, with 95 % intervals (1.96 standard errors)."
        parts += ["<h2>Curves</h2>", f'<p>{said}</p><div class="plots">{"".join(curves)}</div>']
    parts += ["<h2>Pictures</h2>"]
    if len(pages) > _PAGES:
        parts += [f"<p>The first {_PAGES} of {len(pages)} sheets.</p>"]
    for page in pages[:_PAGES]:
        name = ", ".join(f"{key} = {show(value)}" for key, value in page.fixed.items()) or "all pictures"
        parts += [f'<figure><img alt="{html.escape(name)}" src="{_picture(page.image)}"></figure>']
    said = json.dumps(results.plan.sweep.as_dict(), indent=1, ensure_ascii=False)
    parts += [f"<details><summary>The sweep, as it was said</summary><pre>{html.escape(said)}</pre></details>"]
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(parts))


def _chosen(results: Results) -> tuple[str | None, str | None]:
    """An edit's scale or another of its settings across; then what is not of edits down."""
    axes = [axis for axis, values in results.axes.items() if len(values) > 1]
    of_edits = sorted((axis for axis in axes if "." in axis), key=lambda axis: not axis.endswith(".scale"))
    others = [axis for axis in ("seed", "prompt", *axes) if axis in axes and axis not in of_edits]
    order = [*of_edits[:1], *others, *of_edits[1:]]
    across, down = [*order, None, None][:2]
    return across, down


def _about(results: Results) -> str:
    made = list({row["name"]: row for row in results.rows}.values())
    first, seconds = made[0], sum(row["seconds"] for row in made)
    counts = results.plan.counts
    return (
        f"{len(made)} of {counts.pictures} pictures, {first['width']} × {first['height']}, of"
        f" {first['model'] or 'the demo model'} in {first['dtype']};"
        f" {first['scheduler'] or 'its own schedule'}; {seconds:.0f} s of {first['devices']} ×"
        f" {first['device']}; sega_jax {first['sega_jax']}, JAX {first['jax']};"
        f" {counts.compared}"
    )


def _values(values: list[Any]) -> str:
    shown = [show(value) for value in values]
    return ", ".join(shown) if len(shown) <= 12 else f"{', '.join(shown[:5])}, … {shown[-1]} ({len(shown)})"


def _curves(results: Results) -> list[str]:
    """Every metric over every axis of numbers, a line for each value of another one."""
    over = [
        axis
        for axis, values in results.axes.items()
        if len(values) > 1 and axis != "seed" and all(type(value) in (int, float) for value in values)
    ]
    found = []
    for metric in results.metrics:
        for axis in over:
            by = next((other for other in over if other != axis and len(results.axes[other]) < 7), None)
            file = io.StringIO()
            plot(results, metric, axis, by).savefig(file, format="svg")
            name = html.escape(f"{metric} over {axis}")
            found.append(f'<img alt="{name}" src="{_data("image/svg+xml", file.getvalue().encode())}">')
    return found


def _picture(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "webp", quality=88, method=4)
    return _data("image/webp", file.getvalue())


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _table(rows: list[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"
