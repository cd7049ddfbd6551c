"""Makes the pictures of `sega-jax edit` group by group, and writes each group before the next one begins."""

import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from sega_jax.cli.concepts import DEMO_WORDS, format_edit
from sega_jax.cli.edit_sheet import Cell, Sheet
from sega_jax.cli.options import MOST_SEEDS, parsed
from sega_jax.cli.terminal import compilations, echo, pictures_reported_elsewhere
from sega_jax.method.guidance import Edit
from sega_jax.pipelines import png
from sega_jax.pipelines.messages import muted
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.progress import styled
from sega_jax.systems.call import Call
from sega_jax.weights.destination import new_folder

T = TypeVar("T")

_KINDS = ("original", "edited")
SEEDS = ("seed", "images_per_prompt")
# The number of seeds per device in a group when the networks are loaded again for every group.
_LOW_MEMORY_SEEDS = 16
_LARGEST_SEED = 2**32 - 1


class Picture(NamedTuple):
    """A picture that was made, as `sega-jax edit --json` lists it."""

    file: str | None  # None for a picture that is not finite, because it is not written
    seed: int
    kind: str  # "original", "edited" or "animation"
    flagged: bool | None  # None if there is no safety checker
    finite: bool


class Result(NamedTuple):
    """The pictures and files of a run, and its times."""

    pictures: list[Picture]
    sheet: str | None
    settings: dict[str, Any]
    compile_seconds: float
    run_seconds: float
    missing: list[str]  # the names of the pictures or frames that contain non-finite values

    def as_dict(self) -> dict[str, Any]:
        """Returns the result for `sega-jax edit --json`."""
        listed = {**self._asdict(), "pictures": [one._asdict() for one in self.pictures]}
        del listed["missing"]
        return listed


class Job(NamedTuple):
    """The pictures to make, and the settings to store in them."""

    prompt: str
    concepts: list[Edit]
    seeds: list[int]
    known: Mapping[str, Any]  # the settings that all pictures share
    ran: str = "ran"  # the verb for sampling in the time report
    source: Image.Image | None = None  # the picture that the call starts from or enlarges


def seeds_of(given: Mapping[str, str]) -> list[int]:
    """Returns the seed of each picture that is requested with --seed and --images-per-prompt.

    Raises:
        ValueError: an option is malformed or out of range, the options contradict each other, or there are too many
            pictures.
    """
    values = parsed(Call, {name: given[name] for name in SEEDS if name in given})
    seed, count = values.get("seed", 0), values.get("images_per_prompt")
    if isinstance(seed, list):
        if count not in (None, len(seed)):
            raise ValueError(
                f"--seed {given['seed']} gives {len(seed)} seeds, but --images-per-prompt is {count}; leave"
                " --images-per-prompt out, or give one seed"
            )
        seeds: Sequence[int] = seed
    else:
        last = seed + (count or 1) - 1
        if last > _LARGEST_SEED:
            raise ValueError(
                f"--seed {seed} with --images-per-prompt {count} needs seeds up to {last}, but the largest is"
                f" {_LARGEST_SEED}; give a smaller seed"
            )
        seeds = range(seed, last + 1)
    if len(seeds) > MOST_SEEDS:
        raise ValueError(
            f"the options request pictures from {len(seeds)} seeds, but sega-jax edit makes at most {MOST_SEEDS} at a"
            " time; give fewer seeds, or write a sweep"
        )
    return list(seeds)


def stored_seed(seeds: Sequence[int]) -> int | list[int]:
    """Returns the seeds as they are stored in settings: one number, or a list if there are several."""
    return seeds[0] if len(seeds) == 1 else list(seeds)


def groups(entries: Sequence[T], most: int) -> Iterator[tuple[list[T], int]]:
    """Splits seeds or frames into the fewest groups possible. All groups have the same size, so they run the same
    compiled programs.

    Args:
        most: the maximum size of a group.

    Yields:
        The entries of a group, and how many of them to keep. The last group is padded by repeating its last entry.
    """
    number = -(-len(entries) // most)
    size = -(-len(entries) // number)
    for start in range(0, len(entries), size):
        group = list(entries[start : start + size])
        yield group + group[-1:] * (size - len(group)), len(group)


def most_seeds(devices: int, low_memory: bool) -> int:
    """Returns the maximum number of seeds in a group.

    A group with one seed per device needs no more memory on a device than a run with a single seed. If there is only
    one device, the group and the run use the same compiled programs. With `low_memory`, every group loads the networks
    again, so groups are larger.
    """
    return devices * (_LOW_MEMORY_SEEDS if low_memory else 1)


def run(make: Callable[..., Output], call: Mapping[str, Any], job: Job, folder: Path, most: int) -> Result:
    """Makes the pictures, writes each group as soon as it is done, and finally writes the sheet.

    Args:
        make: a function that makes pictures, given prompts, lists of edits and the arguments of a call.
        most: the maximum number of seeds in a group.
    """
    rows = [[], job.concepts] if job.concepts else [[]]
    signed = [f"{'-' if one.scale < 0 else '+'} {one.concept}" for one in job.concepts]
    sheet, done = Sheet(job.prompt, signed, len(job.seeds), job.source), 0
    pictures: list[Picture] = []
    last: Path | None = None
    settings = {**job.known, "seed": stored_seed(job.seeds)}
    began = time.perf_counter()
    with compilations() as compiling, numbered(folder) as number, pictures_reported_elsewhere():
        for group, size in groups(job.seeds, most):
            seeds = [seed for seed in group for _ in rows]
            # Later groups would repeat the first group's warnings.
            quiet = muted() if done else nullcontext()
            with quiet, styled(**_bar(group[:size], len(job.seeds))):
                result = make([job.prompt] * len(seeds), rows * len(group), **{**call, "seed": seeds})
            for i, seed in enumerate(group[:size]):
                cells = _cells(result, i * len(rows), len(rows))
                sheet.add(seed, cells)
                done += 1
                written = _write_seed(folder, number, job, seed, cells, _flags(result, i * len(rows), len(rows)))
                pictures += written
                if paths := [Path(one.file) for one in written if one.file is not None]:
                    counted = f" ({done} of {len(job.seeds)})" if len(job.seeds) > 1 else ""
                    echo(f"Wrote {' and '.join([str(paths[0]), *(path.name for path in paths[1:])])}{counted}")
                    last = paths[-1]
        seconds = time.perf_counter() - began
        echo(f"Compiled in {compiling():.1f} s, {job.ran} in {seconds - compiling():.1f} s")
        if sheet.compares:
            last = folder / f"{number}-sheet.png"
            png.save(sheet.draw(), last, {"picture": "sheet", **settings})
            echo(f"Wrote {last}")
    written_sheet = str(last) if sheet.compares else None
    missing = [_name(one.kind, one.seed, len(job.seeds) > 1) for one in pictures if not one.finite]
    made = Result(pictures, written_sheet, settings, compiling(), seconds - compiling(), missing)
    if last is not None:
        echo(f"To print the settings and the command that reproduces the file: sega-jax info {shlex.quote(str(last))}")
    if not made.missing:
        advise(job)
    return made


def advise(job: Job) -> None:
    """Prints options that are worth trying next."""
    ideas = []
    if not job.concepts:
        ideas.append('--edit "glasses" to add a concept')
    if all(one.scale >= 0 for one in job.concepts):
        ideas.append('--edit "-beard" to remove a concept')
    else:
        first = next(one for one in job.concepts if one.scale != 0)
        stronger = Edit(first.concept, scale=math.copysign(math.ceil(1.5 * abs(first.scale)), first.scale))
        ideas.append(f"a stronger effect, as in --edit {shlex.quote(format_edit(stronger))}")
    if len(job.seeds) == 1:
        ideas.append("--seed 1-8 for eight pictures")
    echo(f"Try next: {', or '.join(ideas)}")
    if job.known["model"] is None:
        echo(f"The demo model knows {', '.join(DEMO_WORDS)} and more")


def _bar(group: Sequence[int], count: int) -> dict[str, Any]:
    """Returns the options of a group's progress bar."""
    if count == 1:
        return {}
    return {"desc": f"seed {group[0]}" if len(group) == 1 else f"seeds {group[0]} to {group[-1]}", "leave": False}


def _cells(result: Output, start: int, count: int) -> list[Cell]:
    """Returns a seed's cells for the sheet, with notes on missing and flagged pictures."""
    cells = []
    for row in range(start, start + count):
        flagged = result.flagged is not None and bool(result.flagged[row])
        image = result.images[row]
        cells.append(Cell(image, "not finite" if image is None else "flagged by the safety checker" if flagged else ""))
    return cells


def _flags(result: Output, start: int, count: int) -> list[bool | None]:
    """Returns whether the safety checker flagged each of a seed's pictures; None without a safety checker."""
    flagged = result.flagged
    return [None if flagged is None else bool(flagged[row]) for row in range(start, start + count)]


def _name(kind: str, seed: int, several: bool) -> str:
    return f"seed {seed} {kind}" if several else kind


def _write_seed(
    folder: Path, number: str, job: Job, seed: int, cells: Sequence[Cell], flags: Sequence[bool | None]
) -> list[Picture]:
    """Writes a seed's pictures, except non-finite ones."""
    several = len(job.seeds) > 1
    stem = f"{number}-seed{seed}" if several else number
    pictures = []
    for kind, cell, flagged in zip(_KINDS, cells, flags, strict=False):
        path = None
        if cell.image is not None:
            if flagged:
                echo(f"Flagged by the safety checker: {_name(kind, seed, several)}")
            path = folder / f"{stem}-{kind}.png"
            png.save(cell.image, path, {"picture": kind, **job.known, "seed": seed})
        pictures.append(Picture(None if path is None else str(path), seed, kind, flagged, path is not None))
    return pictures


@contextmanager
def numbered(folder: Path) -> Iterator[str]:
    """Creates a folder, and yields the first number that no file name in it starts with, such as "0001".

    A hidden file reserves the number until the `with` block ends, so that no other run writing to the folder uses it.
    New folders that are then empty are removed again.
    """
    with new_folder(folder, partial(_reserve, folder)) as number:
        try:
            yield number
        finally:
            _reservation(folder, number).unlink(missing_ok=True)


def _reserve(folder: Path) -> str:
    """Reserves a number with a hidden file, and returns the number."""
    taken = {begin[1] for path in folder.iterdir() if (begin := re.match(r"([0-9]{4,})-", path.name))}
    count = 0
    while True:
        count += 1
        number = f"{count:04}"
        if number in taken:
            continue
        reservation = _reservation(folder, number)
        try:
            reservation.open("x").close()
        except FileExistsError:
            continue
        # Another run may have used this number and ended after the folder was read.
        if not any(folder.glob(f"{number}-*")):
            return number
        reservation.unlink(missing_ok=True)


def _reservation(folder: Path, number: str) -> Path:
    return folder / f".{number}-running"
