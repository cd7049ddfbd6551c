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


def intact(folder: Folder, plan: Plan, number: int, *, sizes: Mapping[str, int] | None = None) -> Recorded:
    """Returns the records of a batch's intact pictures.

    Args:
        sizes: {name: size} of the files of pictures, which are compared with the records. None reads all pictures.
    """
    rows, problems = folder.recorded(plan, number)
    whole = {}
    for name, row in rows.items():
        file = picture(plan, name)
        problem, words = None, None
        if row["file"] is not None and sizes is None:
            data, problem = folder.read(file)
            words = damage(row, data)
        elif row["file"] is not None and sizes is not None:
            words = wrong_size(row, sizes.get(Path(file).name))
        if words is None:
            whole[name] = row
        else:
            problems.append(problem or Problem(file, words))
    return Recorded(whole, problems)


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
    """
    parts = folder.store.names(RECORDS)
    begun = [i for i in batches if not parts.isdisjoint(Path(file).name for file in (part(i), unfinished_part(i)))]
    sizes = None if folder.store.local else folder.store.sizes(PICTURES)
    problems: list[Problem] = []
    with (
        bar(len(begun), "batch", progress, desc="checking", leave=False) as progress_bar,
        ThreadPoolExecutor(_THREADS, "reads") as pool,
    ):
        for found in pool.map(lambda number: intact(folder, plan, number, sizes=sizes).problems, begun):
            problems += found
            progress_bar.update(1)
    for problem in problems:
        try:
            folder.store.remove(problem.file)
        except OSError as error:
            raise ValueError(
                f"{folder}/{problem.file} cannot be removed ({error.strerror or error}); remove it"
            ) from None
    if problems:
        shown = "; ".join(map(str, problems[:5])) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        warn(f"damaged files in {folder} are made again: {shown}")


def problems(folder: Folder, plan: Plan, *, verify: bool) -> Iterator[Problem]:
    """Yields each damaged, missing or unknown file of one stage.

    Args:
        folder: the stage's folder.
        plan: the stage's plan.
        verify: whether to read all pictures. Otherwise only their sizes are checked.
    """
    # A run may write files at the same time. It writes pictures before their records, so the records are read first.
    parts = folder.store.names(RECORDS)
    numbers = {Path(file(i)).name: i for i in range(len(plan.batches)) for file in (part, unfinished_part)}
    begun = sorted({numbers[name] for name in parts if name in numbers})
    with ThreadPoolExecutor(_THREADS, "reads") as pool:
        if verify:
            found = [one.problems for one in pool.map(lambda number: intact(folder, plan, number), begun)]
            sizes = folder.store.sizes(PICTURES)
        else:
            recorded = list(pool.map(lambda number: folder.recorded(plan, number), begun))
            sizes = folder.store.sizes(PICTURES)
            found = [[*one.problems, *_wrong_sizes(plan, one, sizes)] for one in recorded]
    for some in found:
        yield from some
    for metric in sorted(folder.store.names(METRICS)):
        if not metric.startswith("."):
            _, problem = metric_values(folder, f"{METRICS}/{metric}")
            if problem is not None:
                yield problem
    known = {f"{name}.{plan.format}" for batch in plan.batches for name in batch.names}
    for kind, unknown in ((PICTURES, set(sizes) - known), (RECORDS, parts - set(numbers))):
        for name in sorted(unknown):
            if not name.startswith("."):
                yield Problem(f"{kind}/{name}", "is not part of this sweep")


def metric_values(folder: Folder, file: str) -> tuple[dict[str, float | None], Problem | None]:
    """Reads a metric. Returns {picture name: number}, and a problem if the file is damaged."""
    data, problem = folder.read(file)
    if problem is not None:
        return {}, problem
    try:
        return {row["name"]: row["value"] for row in records.rows(data or b"")}, None
    except KeyError:
        return {}, Problem(file, "is not a metric; remove it")
    except ValueError as error:
        return {}, Problem(file, f"{error}; measure it again")


def _wrong_sizes(plan: Plan, recorded: Recorded, sizes: Mapping[str, int]) -> Iterator[Problem]:
    for name, row in recorded.rows.items():
        file = picture(plan, name)
        if row["file"] and (words := wrong_size(row, sizes.get(Path(file).name))):
            yield Problem(file, words)
