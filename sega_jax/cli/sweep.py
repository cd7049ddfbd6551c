"""Defines `sega-jax sweep FILE`, and the command `measure` for a sweep's folder."""

import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax

from sega_jax import sweep as sweeps
from sega_jax.cli import sweep_format
from sega_jax.cli.options import not_empty
from sega_jax.cli.sweep_files import plot, report, sheet
from sega_jax.cli.sweep_status import status, time_left
from sega_jax.cli.terminal import echo, remember_compilations, writable
from sega_jax.method.checks import did_you_mean
from sega_jax.pipelines.help_pages import Group, write_section
from sega_jax.pipelines.progress import plainly
from sega_jax.sweep.running.records import arrow
from sega_jax.sweep.running.status import of_plan


class _FileOrCommand(Group):
    """A command group that runs `run` if a file is given instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names, "--example"):
            hint = did_you_mean(args[0], self.commands)
            if hint and not Path(args[0]).exists():
                raise click.UsageError(f"{args[0]} is neither a file nor a command{hint}", ctx)
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Describes the format of the file."""
        formatter.write_paragraph()
        formatter.write_text("`sega-jax sweep run --help` lists the options for FILE, such as --dry-run and --out.")
        for title, rows in sweep_format.sections().items():
            write_section(formatter, title, rows)


def _print_example(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(sweep_format.example(), nl=False)
        ctx.exit()


@click.group(cls=_FileOrCommand, options_metavar="", subcommand_metavar="FILE [OPTIONS] | COMMAND FOLDER [OPTIONS]")
@click.option(
    "--example",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_example,
    help="Print an example of a file and exit.",
)
def sweep() -> None:
    """Makes pictures with many combinations of settings.

    FILE lists the settings that vary. The same command continues an interrupted sweep. The other commands show and
    measure the pictures in the sweep's FOLDER.

    \b
    Example:
      sega-jax sweep --example > sweep.toml
      sega-jax sweep sweep.toml
      sega-jax sweep report sega-jax-out/sweep
    """


@sweep.command(context_settings={"show_default": True}, sections={"Speed and memory": ("rows", "share", "worker")})
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FOLDER",
    callback=not_empty,
    help="The folder for the pictures: a path, or a URL such as gs://...  [default: sega-jax-out/NAME for NAME.toml]",
)
@click.option(
    "--rows",
    type=int,
    help="The largest number of pictures that the model predicts at the same time, ideally a multiple of the number of"
    " devices.  [default: as many as fit into memory; range: at least 1]",
)
@click.option(
    "--share/--no-share",
    default=True,
    show_default=False,
    help="Compute the steps that several pictures have in common only once.  [default: on]",
)
@click.option(
    "--worker",
    metavar="I/N",
    help="If several machines make the pictures: this machine's number and the number of machines, such as 2/16."
    "  [default: the number of JAX's process, which is 1/1 on a single machine]",
)
@click.option("--dry-run", is_flag=True, help="Print the number of pictures, the work and the memory, then stop.")
def run(file: Path, out: str | None, rows: int | None, share: bool, worker: str | None, dry_run: bool) -> None:
    """Makes a sweep's missing pictures.

    `sega-jax sweep FILE` is short for `sega-jax sweep run FILE`.
    """
    with plainly():
        description, worker_of = sweeps.Sweep.read(file), _worker(worker)
        folder = f"sega-jax-out/{file.stem}" if out is None else out
        remember_compilations()
        make_plan = partial(_plan, description, sweeps.Facts.of(description), folder, rows, share)
        plan, where = make_plan(), sweeps.Folder(folder)
        sweeps.check(plan)
        for stage in plan.chain:
            echo(_labelled(stage, plan, _describe(stage)))
        if dry_run:
            for stage in plan.chain:
                echo(_labelled(stage, plan, _memory(stage, sweeps.needed(stage))))
            _agreed(plan, folder, make_plan, where.contains)
            if where.contains(plan):
                left = time_left(sweeps.seconds_left(folder))
                echo(left or "the remaining time is unknown until the first batch is done")
            return
        arrow()
        if "://" not in folder:
            writable(Path(folder))
        began = time.perf_counter()
        made: list[int] = []
        try:
            # A single worker writes the plan only after it has loaded the model.
            several = (worker_of or (1, jax.process_count()))[1] > 1
            plan = _agreed(plan, folder, make_plan, where.begin if several else where.contains)
            if (before := of_plan(plan, where)).done:
                echo(f"{before.done} of {before.pictures} pictures are already in {folder}")
            sweeps.run(plan, folder, worker=worker_of, checked=True, on_recorded=made.append)
        except KeyboardInterrupt:
            shows = f", and sega-jax sweep status {folder} shows progress" if where.store.has("plan.json") else ""
            echo(f"Interrupted; the same command continues the sweep{shows}")
            raise
        pictures = f"{sum(made)} picture{'' if sum(made) == 1 else 's'} in {time.perf_counter() - began:.1f} s"
        echo(f"Made {pictures}: {folder}/pictures, with records in {folder}/records")


def _plan(sweep: sweeps.Sweep, facts: sweeps.Facts, folder: str, rows: int | None, share: bool) -> sweeps.Plan:
    """Returns the plan of a sweep.

    Args:
        rows: the maximum number of rows in a batch. If None, the maximum is taken from the folder's plan, provided that
            this plan is for the same sweep; otherwise, it is the number that fits into memory.
    """
    kept = sweeps.kept(folder)
    if rows is None and kept is not None and kept.sweep == sweep:
        return _with_rows_of(kept, sweep, facts, share)
    if rows is None:
        return sweeps.fitted(sweep, facts, share=share)
    return sweeps.plan(sweep, facts, rows, share=share)


def _agreed(
    plan: sweeps.Plan, folder: str, make_plan: Callable[[], sweeps.Plan], compare: Callable[[sweeps.Plan], Any]
) -> sweeps.Plan:
    """Returns the folder's plan, or `plan` if the folder has none.

    Args:
        compare: a function that raises an error if the folder contains a different plan. It may write the plan.

    Raises:
        ValueError: the folder contains a different plan.
    """
    try:
        compare(plan)
        return plan
    except ValueError:
        # Another worker may have written its plan first, with as many rows as fit into its own memory.
        plan = make_plan()
    try:
        compare(plan)
        return plan
    except ValueError:
        raise ValueError(
            f"{folder} contains a different sweep, or this sweep with a different model, --rows or --share, or its"
            " checkpoint recommends other settings now; choose a different --out, or use the original file and options"
        ) from None


def _with_rows_of(kept: sweeps.Plan, sweep: sweeps.Sweep, facts: sweeps.Facts, share: bool) -> sweeps.Plan:
    """Plans a sweep so that each stage has the same number of rows as in a stored plan."""
    earlier = None
    for facts_of_stage, stage in zip(facts.chain, kept.chain, strict=True):
        earlier = sweeps.plan(sweep, facts_of_stage, stage.rows, share=share, earlier=earlier)
    assert earlier is not None
    return earlier


def _labelled(stage: sweeps.Plan, plan: sweeps.Plan, text: str) -> str:
    """Prefixes a string with the stage's name if there are several stages."""
    return text if plan.earlier is None else f"{stage.facts.stage}: {text}"


def _worker(text: str | None) -> tuple[int, int] | None:
    """Parses text such as "2/16": the number of a worker and the total number of workers.

    Raises:
        ValueError: the text does not consist of two numbers separated by a slash.
    """
    if text is None:
        return None
    number, _, workers = text.partition("/")
    if not (number.isdecimal() and workers.isdecimal() and 1 <= int(number) <= int(workers)):
        raise ValueError(
            f"--worker {shlex.quote(text)} should be the worker's number and the number of workers, such as 2/16"
        )
    return int(number), int(workers)


sweep.add_command(status)


@sweep.command()
@click.argument("folder")
@click.option(
    "--judge",
    "words",
    multiple=True,
    metavar="WORD",
    help="A word that the demo model's judge looks for. May be given several times.",
)
@click.option(
    "--distance",
    is_flag=True,
    help="Measure the distance to the pictures without edits: the root mean square difference, from 0 to 1.",
)
@click.option(
    "--clip",
    metavar="MODEL",
    type=click.Path(path_type=Path),
    help="The folder of a CLIP model that compares each picture with its prompt.",
)
@click.option("--text", help="The text that CLIP compares the pictures with.  [default: each picture's prompt]")
def measure(folder: str, words: tuple[str, ...], distance: bool, clip: Path | None, text: str | None) -> None:
    """Measures a sweep's pictures.

    The results are stored in the sweep's folder, in the columns "judge WORD", "distance" and "clip".
    """
    with plainly():
        results = sweeps.Results(folder)
        metrics = {f"judge {word}": sweeps.judge(word) for word in words}
        metrics |= {"distance": sweeps.distance(results)} if distance else {}
        metrics |= {"clip": sweeps.clip_score(clip, text)} if clip is not None else {}
        if text is not None and clip is None:
            raise ValueError("--text is given without --clip; give the folder of a CLIP model with --clip")
        if not metrics:
            raise ValueError("nothing to measure; give --judge, --distance or --clip")
        measured = sweeps.measure(folder, metrics)
        for name in metrics:
            values = [row[name] for row in measured.rows if row.get(name) is not None]
            mean = f"mean {sum(values) / len(values):.4g}" if values else "none"
            echo(f"{name}: {len(values)} numbers, {mean}")
            if name == "distance" and not values:
                echo(
                    "  The sweep has no pictures without edits to compare with; add a scale of 0 for every edit, or"
                    " edits = [[], ...], to [grid]."
                )


for _command in (sheet, plot, report):
    sweep.add_command(_command)


def _describe(plan: sweeps.Plan) -> str:
    counts = plan.counts
    saved = 1 - counts.evaluations / counts.alone
    change = "the same as" if saved == 0 else f"{abs(saved):.1%} {'fewer' if saved > 0 else 'more'} than {counts.alone}"
    best = f" ({counts.shared} if all common model calls were shared and no batch was padded)"
    return "\n".join(
        [
            f"pictures: {counts.pictures} (from {counts.points} points); batches: {counts.batches};"
            f" predicted at a time: at most {_most_rows(plan)}; compiled programs: {counts.programs}",
            f"{counts.evaluations} UNet evaluations, {change} for making each picture separately"
            + best * (counts.shared < counts.evaluations),
        ]
    )


def _most_rows(plan: sweeps.Plan) -> int:
    return max(batch.program.rows for batch in plan.batches)


def _memory(plan: sweeps.Plan, memory: sweeps.Memory) -> str:
    rows = -(-_most_rows(plan) // jax.local_device_count())
    total = memory.weights + rows * memory.row
    available = "" if memory.there is None else f", of {memory.there / 2**30:.1f} GiB"
    return (
        f"{total / 2**30:.2f} GiB of memory on each device{available}: {memory.weights / 2**30:.2f} GiB for the"
        f" weights, plus {memory.row / 2**20:.0f} MiB for each picture that is predicted (at most {rows} at a time)"
    )
