"""`sega-jax sweep status`: prints a sweep's progress and its damaged, missing and unknown files."""

import click

from sega_jax import sweep as sweeps
from sega_jax.cli.terminal import echo
from sega_jax.pipelines.help_pages import Command
from sega_jax.pipelines.progress import plainly


@click.command(cls=Command)
@click.argument("folder")
@click.option("--verify", is_flag=True, help="Read every file and compare it with its record.")
def status(folder: str, verify: bool) -> None:
    """Prints a sweep's progress, and lists its damaged, missing and unknown files.

    Without --verify, only the records and the sizes of the picture files are checked.
    """
    with plainly():
        total = sweeps.status(folder)
        for stage, one in (sweeps.stages(folder) or {"": total}).items():
            label = f"{stage}: " if stage else ""
            echo(f"{label}{one.done} of {one.pictures} pictures, {one.batches_done} of {one.batches} batches")
        if total.done < total.pictures and (left := time_left(folder)):
            echo(left)
        problems = sweeps.problems(folder, verify=verify)
        for problem in problems:
            echo(problem)
        if problems:
            echo(f"problems: {len(problems)}; sega-jax sweep FILE makes damaged and missing pictures and records again")
        elif verify:
            echo("all files are intact")


def time_left(folder: str) -> str | None:
    """Describes the remaining time, or returns None if no batch has been timed yet."""
    seconds = sweeps.seconds_left(folder)
    if seconds is None:
        return None
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"about {seconds / size:.3g} {unit} left for one worker"
