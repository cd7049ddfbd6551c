"""`sega-jax sweep FILE`, and what is done with its folder: status, measure, sheet, plot and report."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax

from sega_jax import sweep as sweeps
from sega_jax.cli.terminal import remember_compilations, writable
from sega_jax.pipelines.progress import plainly


class _FileOrCommand(click.Group):
    """A group whose commands may go without the name `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_FileOrCommand, options_metavar="", subcommand_metavar="FILE [OPTIONS] | COMMAND FOLDER [OPTIONS]")
def sweep() -> None:
    """Makes the pictures of a sweep, a TOML file of prompts, seeds, edits and axes over their settings; or what is
    missing of them. `sega_jax/sweep/description/sweep_file.py` says what the file may hold."""


@sweep.command(context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", metavar="FOLDER", help="Its path, or gs://... and the like.  [default: sega-jax-out/ and the file's name]"
)
@click.option("--rows", type=int, help="Pictures in a batch; best a multiple of the devices.  [default: what fits]")
@click.option("--share/--no-share", default=True, help="Whether to compute once what pictures have in common.")
@click.option("--worker", metavar="I/N", help="Which of several that share the folder.  [default: JAX's process]")
@click.option("--dry-run", is_flag=True, help="Says how much it is, and runs nothing.")
def run(file: Path, out: str | None, rows: int | None, share: bool, worker: str | None, dry_run: bool) -> None:
    """Makes what is missing of a sweep's pictures. Without the word `run` it is the same."""
    with plainly():
        said, which = sweeps.Sweep.read(file), _worker(worker)
        folder = f"sega-jax-out/{file.stem}" if out is None else out
        remember_compilations()
        planned = partial(_plan, said, sweeps.Facts.of(said), folder, rows, share)
        plan = planned()
        sweeps.check(plan)
        for stage in plan.chain:
            click.echo(_of(stage, plan, _describe(stage)))
        if dry_run:
            for stage in plan.chain:
                click.echo(_of(stage, plan, _memory(stage, sweeps.needed(stage))))
            if sweeps.kept(folder) is not None:
                click.echo(_left(folder) or "no batch is timed yet")
            return
        if "://" not in folder:
            writable(Path(folder))
        began, before = time.perf_counter(), None
        try:
            try:
                sweeps.keep(plan, folder)
            except ValueError:
                # Another worker may have been first, with more memory or less.
                plan = planned()
                sweeps.keep(plan, folder)
            before = sweeps.status(folder)
            if before.done:
                click.echo(f"{before.done} of them are in {folder}")
            done = sweeps.run(plan, folder, worker=which)
        except KeyboardInterrupt:
            click.echo(f"Interrupted; the same command goes on, and sega-jax sweep status {folder} says how far it is")
            raise
        made, seconds = done.done - before.done, time.perf_counter() - began
        together = "" if which is None or which[1] == 1 else ", with the other workers"
        click.echo(
            f"Made {made} pictures in {seconds:.1f} s{together}: {folder}/pictures, with records in {folder}/records"
        )


def _plan(said: sweeps.Sweep, facts: sweeps.Facts, folder: str, rows: int | None, share: bool) -> sweeps.Plan:
    """The plan, with the rows of the one that is kept, if that is of the same sweep; else with those that fit."""
    kept = sweeps.kept(folder)
    if rows is None and kept is not None and kept.sweep == said:
        return _with_rows_of(kept, said, facts, share)
    if rows is None:
        return sweeps.fitted(said, facts, share=share)
    return sweeps.plan(said, facts, rows, share=share)


def _with_rows_of(kept: sweeps.Plan, said: sweeps.Sweep, facts: sweeps.Facts, share: bool) -> sweeps.Plan:
    """The plan with as many rows as one that is kept, in every stage."""
    earlier = None
    for facts_of_stage, stage in zip(facts.chain, kept.chain, strict=True):
        earlier = sweeps.plan(said, facts_of_stage, stage.rows, share=share, earlier=earlier)
    assert earlier is not None
    return earlier


def _of(stage: sweeps.Plan, plan: sweeps.Plan, text: str) -> str:
    """A text about a stage, which names it where there are several."""
    return text if plan.earlier is None else f"{stage.facts.stage}: {text}"


def _worker(said: str | None) -> tuple[int, int] | None:
    if said is None:
        return None
    number, _, workers = said.partition("/")
    if not (number.isdecimal() and workers.isdecimal() and 1 <= int(number) <= int(workers)):
        raise ValueError(f"--worker {said} should be its number and how many there are, as 2/16")
    return int(number), int(workers)


@sweep.command()
@click.argument("folder")
def status(folder: str) -> None:
    """Says how far a sweep is."""
    with plainly():
        found = sweeps.status(folder)
        for stage, one in (sweeps.stages(folder) or {"": found}).items():
            label = f"{stage}: " if stage else ""
            click.echo(f"{label}{one.done} of {one.pictures} pictures, {one.batches_done} of {one.batches} batches")
        if found.done < found.pictures and (left := _left(folder)):
            click.echo(left)


_FIXED = click.option(
    "--where", "where", multiple=True, metavar="AXIS=VALUE", help="Shows these alone; may be given again."
)


@sweep.command()
@click.argument("folder")
@click.option("--judge", "words", multiple=True, metavar="WORD", help="Of the demo model's judge; may be given again.")
@click.option("--distance", is_flag=True, help="To the pictures without edits.")
@click.option(
    "--clip", metavar="MODEL", type=click.Path(path_type=Path), help="A folder of a CLIP model, for its score."
)
@click.option("--text", help="What the CLIP score is of.  [default: each picture's prompt]")
def measure(folder: str, words: tuple[str, ...], distance: bool, clip: Path | None, text: str | None) -> None:
    """Measures all pictures that are there, and keeps the numbers: "judge WORD", "distance" and "clip"."""
    with plainly():
        results = sweeps.Results(folder)
        metrics = {f"judge {word}": sweeps.judge(word) for word in words}
        metrics |= {"distance": sweeps.distance(results)} if distance else {}
        metrics |= {"clip": sweeps.clip_score(clip, text)} if clip is not None else {}
        if not metrics:
            raise ValueError("nothing to measure; give --judge, --distance or --clip")
        found = sweeps.measure(folder, metrics)
        for name in metrics:
            values = [row[name] for row in found.rows if row.get(name) is not None]
            mean = f"mean {sum(values) / len(values):.4g}" if values else "none"
            click.echo(f"{name}: {len(values)} numbers, {mean}")


@sweep.command()
@click.argument("folder")
@click.option("--across", metavar="AXIS", help="As glasses.scale.")
@click.option("--down", metavar="AXIS")
@_FIXED
@click.option("--side", default=160, show_default=True, type=click.IntRange(16, 4096), help="Of a picture, in pixels.")
@click.option("--out", default="sheet.png", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
def sheet(folder: str, across: str | None, down: str | None, where: tuple[str, ...], side: int, out: Path) -> None:
    """Pictures over two axes, a file for each combination of the others' values."""
    with plainly():
        results = sweeps.Results(folder)
        pages = sweeps.sheets(results, across, down, _fixed(results, where), side=side)
        for number, page in enumerate(pages):
            path = out if len(pages) == 1 else out.with_stem(f"{out.stem}-{number + 1:0{len(str(len(pages)))}}")
            page.image.save(path)
            said = ", ".join(f"{key} = {sweeps.show(value)}" for key, value in page.fixed.items())
            click.echo(f"Wrote {path}" + (f": {said}" if said else ""))


@sweep.command()
@click.argument("folder")
@click.option("--y", required=True, metavar="COLUMN", help="A metric's name, or any column of numbers.")
@click.option("--x", required=True, metavar="AXIS")
@click.option("--by", metavar="AXIS", help="A line for each of its values.")
@_FIXED
@click.option("--out", default="plot.png", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
def plot(folder: str, y: str, x: str, by: str | None, where: tuple[str, ...], out: Path) -> None:
    """Means over an axis, with 95 % intervals; out may end in png, svg or pdf."""
    with plainly():
        results = sweeps.Results(folder)
        sweeps.plot(results, y, x, by, _fixed(results, where)).savefig(out)
        click.echo(f"Wrote {out}")


@sweep.command()
@click.argument("folder")
@click.option("--across", metavar="AXIS", help="Of the sheets.  [default: chosen]")
@click.option("--down", metavar="AXIS", help="Likewise.")
@click.option("--title", help="[default: the folder's name]")
@click.option("--out", default="report.html", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
def report(folder: str, across: str | None, down: str | None, title: str | None, out: Path) -> None:
    """One HTML file of the axes, curves of what was measured, and sheets."""
    with plainly():
        name = folder.rstrip("/").rpartition("/")[2] if title is None else title
        out.write_text(sweeps.report(sweeps.Results(folder), across, down, name), "utf-8")
        click.echo(f"Wrote {out}")


def _fixed(results: sweeps.Results, where: tuple[str, ...]) -> dict[str, Any]:
    """Values by the words that show them."""
    fixed = {}
    for said in where:
        key, equals, value = said.partition("=")
        if not equals:
            raise ValueError(f"--where {said} should be AXIS=VALUE")
        results.check(key)
        known = {sweeps.show(row.get(key)): row.get(key) for row in results.rows}
        if value not in known:
            raise ValueError(f"--where {said}: no picture has that; there are {', '.join(known)[:200]}")
        fixed[key] = known[value]
    return fixed


def _describe(plan: sweeps.Plan) -> str:
    counts = plan.counts
    return "\n".join(
        [
            f"pictures {counts.pictures}, of points {counts.points}; batches {counts.batches}, programs"
            f" {counts.programs}, rows at most {plan.rows}",
            f"{counts.evaluations} UNet evaluations, where {counts.shared} are the fewest possible: {counts.compared}",
        ]
    )


def _memory(plan: sweeps.Plan, memory: sweeps.Memory) -> str:
    share = -(-max(batch.program.rows for batch in plan.batches) // jax.local_device_count())
    total = memory.weights + share * memory.row
    there = "" if memory.there is None else f", of {memory.there / 2**30:.1f} GiB"
    return (
        f"{total / 2**30:.2f} GiB of memory on each device{there}: {memory.weights / 2**30:.2f} of weights and"
        f" {memory.row / 2**20:.0f} MiB for each of {share} rows"
    )


def _left(folder: str) -> str | None:
    """The time that is left, where batches were timed."""
    seconds = sweeps.seconds_left(folder)
    if seconds is None:
        return None
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"about {seconds / size:.3g} {unit} left for one worker"
