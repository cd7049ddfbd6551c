"""`sega-jax sweep FILE` and `sega-jax sweep status FOLDER`."""

import time
from pathlib import Path
from typing import Any

import click

from sega_jax import sweep as sweeps
from sega_jax.shell import plainly, remember_compilations, writable

ROWS = 8


class _FileOrCommand(click.Group):
    """A group whose commands may go without the name `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_FileOrCommand, options_metavar="", subcommand_metavar="FILE [OPTIONS] | status FOLDER")
def sweep() -> None:
    """Makes the pictures of a sweep, a TOML file of prompts, seeds, edits and axes over their settings; or what is
    missing of them. `sega_jax/sweep/description.py` says what the file may hold."""


@sweep.command(context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", metavar="FOLDER", help="Its path, or gs://... and the like.  [default: sega-jax-out/ and the file's name]"
)
@click.option("--rows", type=int, help="Pictures in a batch; best a multiple of the devices.  [default: 8]")
@click.option("--share/--no-share", default=True, help="Whether to compute once what pictures have in common.")
@click.option("--worker", metavar="I/N", help="Which of several that share the folder.  [default: JAX's process]")
@click.option("--dry-run", is_flag=True, help="Says how much it is, and runs nothing.")
def run(file: Path, out: str | None, rows: int | None, share: bool, worker: str | None, dry_run: bool) -> None:
    """Makes what is missing of a sweep's pictures. Without the word `run` it is the same."""
    with plainly():
        said, which = sweeps.Sweep.read(file), _worker(worker)
        folder = f"sega-jax-out/{file.stem}" if out is None else out
        kept = sweeps.kept(folder)
        if rows is None:
            rows = kept.rows if kept is not None and kept.sweep == said else ROWS
        plan = sweeps.plan(said, sweeps.Facts.of(said), rows, share=share)
        click.echo(_describe(plan.counts))
        if dry_run:
            return
        if "://" not in folder:
            writable(Path(folder))
        remember_compilations()
        began, before = time.perf_counter(), None
        try:
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
        click.echo(f"{found.done} of {found.pictures} pictures, {found.batches_done} of {found.batches} batches")


def _describe(counts: Any) -> str:
    return "\n".join(
        [
            f"{counts.pictures} pictures of {counts.points} points, in {counts.batches} batches of"
            f" {counts.programs} programs",
            f"{counts.evaluations} UNet evaluations, {1 - counts.evaluations / counts.alone:.1%} fewer than the"
            f" {counts.alone} of the pictures one by one; the fewest possible are {counts.shared}",
        ]
    )
