"""Finds the damaged, missing and unknown files of a sweep."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.progress import bar
from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import METRICS, PICTURES, RECORDS, Folder, Recorded, part, unfinished_part


def intact(folder: Folder, plan: Plan, number: int) -> Recorded:
    """Reads all files of a batch, and returns the records of its intact pictures."""
    rows, problems = folder.recorded(plan, number)
    whole = {}
    for name, row in rows.items():
        if problem := picture_problem(row, folder.store.read(row["file"]) if row["file"] else None):
            problems.append(problem)
        else:
            whole[name] = row
    return Recorded(whole, problems)


def remove_damaged(folder: Folder, plan: Plan, batches: Iterable[int], progress: bool | None) -> None:
    """Reads all files of batches, and removes the damaged ones with a warning, so that they are made again."""
    parts = folder.store.names(RECORDS)
    begun = [i for i in batches if not parts.isdisjoint(Path(file).name for file in (part(i), unfinished_part(i)))]
    problems: list[str] = []
    with bar(len(begun), "batch", progress, desc="checking", leave=False) as progress_bar:
        for number in begun:
            found = intact(folder, plan, number).problems
            for problem in found:
                folder.store.remove(problem.split()[0])
            problems += found
            progress_bar.update(1)
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        warn(f"damaged files in {folder} are made again: {shown}")


def picture_problem(row: Mapping[str, Any], data: bytes | None) -> str | None:
    """Compares a picture's file with its record. Returns a sentence about the damage, or None for an intact file and
    for a picture without a file."""
    problem = size_problem(row, None if data is None else len(data))
    if problem is None and data is not None and hashlib.sha256(data).hexdigest() != row["file_digest"]:
        return f"{row['file']} is damaged: its content does not match its record"
    return problem


def size_problem(row: Mapping[str, Any], size: int | None) -> str | None:
    """Compares the size of a picture's file with its record, and returns the same as `picture_problem`."""
    if row["file"] is None or size == row["file_bytes"]:
        return None
    if size is None:
        return f"{row['file']} is missing"
    if size == 0:
        return f"{row['file']} is empty"
    return f"{row['file']} is damaged: it has {size} bytes instead of {row['file_bytes']}"


def problems(folder: Folder, plan: Plan, *, verify: bool) -> Iterator[str]:
    """Yields a sentence about each damaged, missing or unknown file of one stage.

    Args:
        folder: the stage's folder.
        plan: the stage's plan.
        verify: whether to read all pictures. Otherwise only their sizes are checked.
    """
    sizes, parts = folder.store.sizes(PICTURES), folder.store.names(RECORDS)
    known = {f"{name}.{plan.format}" for batch in plan.batches for name in batch.names}
    known_parts = set()
    for number in range(len(plan.batches)):
        names = {Path(file).name for file in (part(number), unfinished_part(number))}
        known_parts |= names
        if not names & parts:
            continue
        if verify:
            yield from intact(folder, plan, number).problems
        else:
            rows, broken = folder.recorded(plan, number)
            yield from broken
            found = (size_problem(row, sizes.get(Path(row["file"] or "").name)) for row in rows.values())
            yield from (problem for problem in found if problem)
    for metric in sorted(folder.store.names(METRICS)):
        if not metric.startswith("."):
            try:
                records.rows(folder.store.read(f"{METRICS}/{metric}") or b"")
            except ValueError as error:
                yield f"{METRICS}/{metric} {error}; measure again"
    for kind, unknown in ((PICTURES, set(sizes) - known), (RECORDS, parts - known_parts)):
        for name in sorted(unknown):
            if not name.startswith("."):
                yield f"{kind}/{name} is not part of this sweep"
