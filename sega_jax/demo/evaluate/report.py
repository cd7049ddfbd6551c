"""Makes tables and plots from the results of `sega_jax.demo.evaluate.diffusion` and `sega_jax.demo.evaluate.paella`.

    python -m sega_jax.demo.evaluate.report FOLDER

The command reads FOLDER/results.json and writes tables.md, and, if matplotlib is installed, curves.png,
monotonicity.png and ablations.png.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from sega_jax.demo.evaluate.measures import Measurement
from sega_jax.pipelines.progress import plainly

# {setting of a study: its format below the study's table}
_ABOUT = {"seeds": "{} seeds", "first_seed": "the first seed is {}", "dtype": "{}", "device": "{}", "jax": "jax {}"}


def average(rows: Iterable[Measurement], *names: str) -> list[float]:
    """Averages columns over words, with the same weight for each word. Cells without pictures are left out."""
    rows = [row for row in rows if row.get("n")]
    return [float(np.mean([row[name] for row in rows])) if rows else float("nan") for name in names]


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Returns a Markdown table for each study, with the study's settings."""
    modules = sorted({study["about"].get("module", "sega_jax.demo.evaluate.diffusion") for study in results.values()})
    commands = " and ".join(f"`python -m {module}`" for module in modules)
    parts = [f"Measured by {commands}, written by `python -m sega_jax.demo.evaluate.report`.", ""]
    for study, write in _TABLES.items():
        if study in results:
            about = results[study]["about"]
            line = "; ".join(text.format(about[name]) for name, text in _ABOUT.items() if name in about)
            parts += [*write(results[study]["found"]), f"({study}: {line})", ""]
    return "\n".join(parts)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.0f}"


def _success(row: Measurement) -> str:
    interval = f"({_share(row['low'])}–{_share(row['high'])})"
    return f"{_share(row['success'])} {interval} of {row['n']}" if row["n"] else "–"


def _summary(rows: list[Measurement]) -> list[str]:
    """Returns one table with success and the share of other attributes kept, for every word, action and method."""
    cells = {(row["word"], row["action"], row["method"]): row for row in rows}
    columns = list(dict.fromkeys(key[1:] for key in cells))
    words = list(dict.fromkeys(word for word, _, _ in cells))
    body = [[word] for word in words]
    means = ["**mean**"]
    for column in columns:
        chosen = [cells[word, *column] for word in words]
        for line, row in zip(body, chosen, strict=True):
            line.append(f"{_share(row['success'])} / {_share(row['kept'])}")
        means.append("**{} / {}**".format(*map(_share, average(chosen, "success", "kept"))))
    head = ["word", *(f"{action}: {method}" for action, method in columns)]
    return _table("Success / other attributes kept (%)", head, [*body, means])


def _edits(rows: list[Measurement]) -> list[str]:
    """Returns the summary, and a table with confidence intervals for each action."""
    lines = _summary(rows)
    for action in ("add", "remove"):
        cells = {(row["word"], row["method"]): row for row in rows if row["action"] == action}
        if not cells:
            continue
        methods = list(dict.fromkeys(method for _, method in cells))
        words = list(dict.fromkeys(word for word, _ in cells))
        head = ["word"]
        head += [f"{method}: {name}" for method in methods for name in ("success (95 %)", "kept", "distance")]
        body = []
        for word in words:
            own = [cells[word, method] for method in methods]
            values = [(_success(row), _share(row["kept"]), _share(row["distance"])) for row in own]
            body.append([word, *(text for row in values for text in row)])
        means = [average((cells[word, m] for word in words), "success", "kept", "distance") for m in methods]
        body.append(["**mean**", *(f"**{_share(value)}**" for row in means for value in row)])
        lines += _table(f"{action.capitalize()} (%)", head, body)
    return lines


def _grouped(title: str, *keys: str) -> Callable[[list[Measurement]], list[str]]:
    """Returns a function that makes a table with a row for each combination of the keys' values, averaged over
    words."""

    def write(rows: list[Measurement]) -> list[str]:
        rows = [row for row in rows if all(key in row for key in keys)]
        groups: dict[tuple, list[Measurement]] = {}
        for row in rows:
            groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
        body = [
            [*name, str(sum(row["n"] for row in group)), *map(_share, average(group, "success", "kept", "distance"))]
            for name, group in groups.items()
        ]
        return _table(f"{title} (%)", [*keys, "pictures", "success", "kept", "distance"], body)

    return write


def _several(rows: list[Measurement]) -> list[str]:
    body = [[str(row["count"]), _success(row), _share(row["each"]), _share(row["kept"])] for row in rows]
    return _table("Several edits at once (%)", ["edits", "all present (95 %)", "each", "others kept"], body)


def _monotonicity(rows: list[Measurement]) -> list[str]:
    body = [[row["word"], f"{row['correlation']:.3f}", f"{row['of_seeds']:.3f}"] for row in rows]
    means = [f"**{np.mean([row[name] for row in rows]):.3f}**" for name in ("correlation", "of_seeds")]
    head = ["word", "of the mean probability", "mean over seeds"]
    return _table("Rank correlation of probability with scale", head, [*body, ["**mean**", *means]])


def _prompts(rows: list[Measurement]) -> list[str]:
    body = [[row["word"], _success(row)] for row in rows]
    return _table("Plain prompts (%)", ["word", "followed (95 %)"], body)


def _variants(rows: list[Measurement]) -> list[str]:
    return _grouped("Supports of the threshold", "support")(rows) + _grouped("Semantics", "semantics")(rows)


_TABLES: dict[str, Callable[[list[Measurement]], list[str]]] = {
    "edits": _edits,
    "several": _several,
    "monotonicity": _monotonicity,
    "curves": _grouped("Success and isolation over strength", "action", "method", "value"),
    "robustness": _grouped("Robustness: adding from other prompts", "prompt"),
    "told": _grouped("Removing what the prompt says", "method", "value"),
    "uniqueness": _grouped("Uniqueness: guidance of one picture replayed on others", "word"),
    "ablations": _grouped("Ablations", "setting", "value", "action"),
    "variants": _variants,
    "choices": _grouped("Choices, one at a time", "setting", "value"),
    "prompts": _prompts,
}


def plot_curves(rows: list[Measurement], path: Path) -> None:
    """Plots the share of other attributes kept against success for every method, with a point for each strength."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, action in zip(axes, ("add", "remove"), strict=True):
        chosen = [row for row in rows if row["action"] == action]
        for method in dict.fromkeys(row["method"] for row in chosen):
            own = [row for row in chosen if row["method"] == method]
            values = list(dict.fromkeys(row["value"] for row in own))
            points = [average((row for row in own if row["value"] == value), "success", "kept") for value in values]
            (line,) = axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=method)
            for value, point in zip(values, points, strict=True):
                axis.annotate(f"{value:g}", point, (3, 3), textcoords="offset points", fontsize=7, c=line.get_color())
        axis.set(title=action, xlabel="success", xlim=(0, 1.04))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("other attributes kept")
    _save(figure, path)


def plot_monotonicity(rows: list[Measurement], path: Path) -> None:
    """Plots the mean probability of every word against the scale."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for row in rows:
        axis.plot(row["scales"], row["probability"], "o-", markersize=3, label=row["word"])
    axis.set(xlabel="scale", ylabel="probability")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)


def plot_ablations(rows: list[Measurement], path: Path) -> None:
    """Plots success and the share of other attributes kept against every setting."""
    from matplotlib import pyplot

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = pyplot.subplots(2, -(-len(settings) // 2), figsize=(11, 6), sharey=True, layout="constrained")
    for axis, setting in zip(axes.flat, settings, strict=False):
        own = [row for row in rows if row["setting"] == setting]
        values = list(dict.fromkeys(row["value"] for row in own))
        for action in dict.fromkeys(row["action"] for row in own):
            for name, style in (("success", "o-"), ("kept", "s--")):
                chosen = [[row for row in own if (row["value"], row["action"]) == (value, action)] for value in values]
                heights = [average(group, name)[0] for group in chosen]
                axis.plot([str(value) for value in values], heights, style, markersize=4, label=f"{action}: {name}")
        axis.set(title=setting, ylim=(0, 1.04))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_PLOTS = {"curves": plot_curves, "monotonicity": plot_monotonicity, "ablations": plot_ablations}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folder: Path) -> None:
    """Makes tables and plots from FOLDER/results.json and writes them into FOLDER."""
    with plainly():
        results = json.loads((folder / "results.json").read_text())
        (folder / "tables.md").write_text(tables(results))
    try:
        import matplotlib
    except ImportError:
        click.echo('Plots need matplotlib, which is not installed: pip install "sega_jax[evaluate]"', err=True)
        return
    matplotlib.use("agg")
    for study, plot in _PLOTS.items():
        if study in results:
            plot(results[study]["found"], folder / f"{study}.png")


if __name__ == "__main__":
    main()
