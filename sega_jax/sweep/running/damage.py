"""Finds the damaged, missing and unknown files of a sweep."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.progress import bar
from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import (
    METRICS,
    PICTURES,
    RECORDS,
    Folder,
    Problem,
    Recorded,
    part,
    picture,
    unfinished_part,
)

_THREADS = 8  # that read files


def intact(folder: Folder, plan: Plan, recorded: Recorded, *, sizes: Mapping[str, int] | None = None) -> Recorded:
    """Returns the records of the intact pictures among a batch's recorded pictures.

    Args:
        recorded: the batch's records.
        sizes: {name: size} of the pictures' files, listed after the records were read, because a run that is in
            progress writes pictures before their records. The sizes are compared with the records. None reads the
            pictures.
    """
    rows, problems = {}, list(recorded.problems)
    for name, row in recorded.rows.items():
        file, problem = picture(plan, name), None
        if row["file"] is not None:
            if sizes is None:
                data, problem = folder.read(file)
                words = damage(row, data)
            else:
                words = wrong_size(row, sizes.get(Path(file).name))
            if words is not None:
                problems.append(problem or Problem(file, words))
                continue
        rows[name] = row
    return Recorded(rows, problems)


def damage(row: Mapping[str, Any], data: bytes | None) -> str | None:
    """Compares a picture's file with its record. Returns the words of a `Problem`, or None for an intact file."""
    words = wrong_size(row, None if data is None else len(data))
    if words is None and hashlib.sha256(data or b"").hexdigest() != row["file_digest"]:
        return "is damaged: its content does not match its record"
    return words


def wrong_size(row: Mapping[str, Any], size: int | None) -> str | None:
    """Compares the size of a picture's file with its record. Returns the same as `damage`."""
    if size == row["file_bytes"]:
        return None
    if size is None:
        return "is missing"
    if size == 0:
        return "is empty"
    return f"is damaged: it has {size} bytes instead of {row['file_bytes']}"


def remove_damaged(folder: Folder, plan: Plan, batches: Iterable[int], progress: bool | None) -> None:
    """Removes the damaged files of batches with a warning, so that they are made again.

    In folders, all files are read. At addresses, only the sizes of pictures are compared, because reading takes long.

    Raises:
        ValueError: a file cannot be read. It may be intact, so it is not removed.
    """
    damaged = _problems(folder, plan, batches, verify=folder.store.local, progress=progress)
    for problem in damaged:
        if problem.unreadable:
            raise ValueError(f"{folder}/{problem}")
    for problem in damaged:
        folder.store.remove(problem.file)
    if damaged:
        shown = "; ".join(map(str, damaged[:5])) + (f"; and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        warn(f"damaged files in {folder} are made again: {shown}")


def problems(folder: Folder, plan: Plan, *, verify: bool) -> Iterator[Problem]:
    """Yields each damaged, missing or unknown file of one stage.

    Args:
        folder: the stage's folder.
        plan: the stage's plan.
        verify: whether to read all pictures. Otherwise only their sizes are checked.
    """
    yield from _problems(folder, plan, range(len(plan.batches)), verify=verify, progress=False)
    for metric in sorted(folder.store.names(METRICS)):
        if not metric.startswith("."):
            _, problem = metric_numbers(folder, f"{METRICS}/{metric}")
            if problem is not None:
                yield problem
    known = {
        PICTURES: {Path(picture(plan, name)).name for batch in plan.batches for name in batch.names},
        RECORDS: {Path(file(i)).name for i in range(len(plan.batches)) for file in (part, unfinished_part)},
    }
    for kind, names in known.items():
        for name in sorted(folder.store.names(kind) - names):
            if not name.startswith("."):
                yield Problem(f"{kind}/{name}", "is not part of this sweep")


def _problems(
    folder: Folder, plan: Plan, batches: Iterable[int], *, verify: bool, progress: bool | None
) -> list[Problem]:
    """Returns the damaged and missing files of batches; see `problems`."""
    parts = folder.store.names(RECORDS)
    begun = [i for i in batches if not parts.isdisjoint(Path(file).name for file in (part(i), unfinished_part(i)))]
    problems: list[Problem] = []
    with (
        bar(len(begun), "batch", progress, desc="checking", leave=False) as progress_bar,
        ThreadPoolExecutor(_THREADS, "reads") as pool,
    ):
        recorded = list(pool.map(lambda number: folder.recorded(plan, number), begun))
        sizes = None if verify else folder.store.sizes(PICTURES)
        for one in pool.map(lambda one: intact(folder, plan, one, sizes=sizes), recorded):
            problems += one.problems
            progress_bar.update(1)
    return problems


def metric_numbers(folder: Folder, file: str) -> tuple[records.Numbers, Problem | None]:
    """Reads a metric. Returns its numbers, and a problem if the file is damaged."""
    data, problem = folder.read(file)
    if problem is not None:
        return records.Numbers({}), problem
    try:
        return records.numbers(data or b""), None
    except KeyError:
        return records.Numbers({}), Problem(file, "is not a metric; remove it")
    except ValueError as error:
        return records.Numbers({}), Problem(file, f"{error}; measure it again")
