"""`sega-jax sweep status`: prints a sweep's progress and its damaged, missing and unknown files."""

from typing import Any

import click

from sega_jax import sweep as sweeps
from sega_jax.cli.terminal import echo, json_on_stdout, json_option
from sega_jax.pipelines.help_pages import Command
from sega_jax.pipelines.progress import plainly
from sega_jax.sweep.running.status import overview


@click.command(cls=Command)
@click.argument("folder")
@click.option("--verify", is_flag=True, help="Read every file and compare it with its record.")
@json_option(
    "pictures, done, batches, batches_done, evaluations_left, seconds_left (null until a batch is timed), stages (the"
    " same for each stage of a cascade, by its name), without_files (how many finished pictures are not_finite or"
    " flagged) and problems (file and problem of each file)"
)
def status(folder: str, verify: bool, as_json: bool) -> None:
    """Prints a sweep's progress, and lists its damaged, missing and unknown files.

    Without --verify, only the records and the sizes of the picture files are checked.
    """
    with plainly(), json_on_stdout(as_json) as write_json:
        whole = overview(folder, verify=verify)
        total = list(whole.stages.values())[-1]
        for stage, one in whole.stages.items():
            label = f"{stage}: " if stage else ""
            echo(f"{label}{one.done} of {one.pictures} pictures, {one.batches_done} of {one.batches} batches")
        for reason, count in whole.without_files.items():
            if count:
                echo(f"{count} of them {'is' if count == 1 else 'are'} {reason}, without a file")
        if total.done < total.pictures and (left := time_left(whole.seconds_left)):
            echo(left)
        for problem in whole.problems:
            echo(str(problem))
        if count := len(whole.problems):
            echo(f"problems: {count}; sega-jax sweep FILE makes damaged and missing pictures and records again")
        elif verify:
            echo("all files are intact")
        document = _progress(total, whole.seconds_left)
        document["stages"] = {name: _progress(one, whole.seconds[name]) for name, one in whole.stages.items() if name}
        document["without_files"] = {reason.replace(" ", "_"): count for reason, count in whole.without_files.items()}
        document["problems"] = [{"file": one.file, "problem": one.words} for one in whole.problems]
        write_json(document)


def _progress(status: sweeps.Status, seconds: float | None) -> dict[str, Any]:
    return {**status._asdict(), "seconds_left": seconds}


def time_left(seconds: float | None) -> str | None:
    """Describes the remaining time in seconds. Returns None if it is unknown, because no batch has been timed yet."""
    if seconds is None:
        return None
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"about {seconds / size:.3g} {unit} left for one worker"
