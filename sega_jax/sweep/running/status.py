"""How far a sweep is, and how long the rest takes."""

from pathlib import Path
from typing import NamedTuple

from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import RECORDS, Folder, part


class Status(NamedTuple):
    """How far a sweep is, or a stage of it.

    Example:
        >>> from sega_jax import sweep
        >>> done = sweep.Status(pictures=8, done=6, batches=4, batches_done=3, evaluations_left=300)
        >>> f"{done.done} of {done.pictures}"
        '6 of 8'
    """

    pictures: int
    done: int
    batches: int
    batches_done: int
    evaluations_left: int


def status(folder: str | Path) -> Status:
    """Tells how far the sweep in a folder is; of a cascade, its last stage.

    Raises:
        ValueError: the folder has no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.status("sega-jax-out/glasses").done  # made by the example of sweep.run
        2
    """
    where = Folder(folder)
    return of_plan(where.plan(), where)


def stages(folder: str | Path) -> dict[str, Status]:
    """Tells how far each stage of the cascade in a folder is, by its name; {} where the sweep is of one model.

    Raises:
        ValueError: the folder has no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.stages("sega-jax-out/glasses")  # made by the example of sweep.run; no cascade
        {}
    """
    where = Folder(folder)
    plan = where.plan()
    if plan.earlier is None:
        return {}
    return {str(stage.facts.stage): of_plan(stage, where.of(stage, plan)) for stage in plan.chain}


def of_plan(plan: Plan, folder: Folder) -> Status:
    """Tells how far a plan is in its folder."""
    missing = folder.missing(plan)
    pictures = [len(batch.points) for batch in plan.batches]
    left = sum(pictures[i] for i in missing)
    to_do = sum(map(plan.evaluations, missing))
    return Status(sum(pictures), sum(pictures) - left, len(pictures), len(pictures) - len(missing), to_do)


def seconds_left(folder: str | Path) -> float | None:
    """Returns the seconds that one worker needs for the rest, with those of earlier stages; None where no batch of a
    stage that is not done was timed.

    Raises:
        ValueError: the folder has no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.seconds_left("sega-jax-out/glasses")  # made by the example of sweep.run
        0.0
    """
    where = Folder(folder)
    plan = where.plan()
    total = 0.0
    for stage in reversed(plan.chain):
        own = where.of(stage, plan)
        to_do = of_plan(stage, own).evaluations_left
        if not to_do:
            break  # what comes before is needed no more
        seconds = _pace(stage, own)
        if seconds is None:
            return None
        total += seconds * to_do
    return total


def pace(folder: str | Path) -> float | None:
    """Returns the seconds for an evaluation, of one worker, by what a sweep's folder has recorded, of a cascade for its
    last stage; None for nothing.

    Raises:
        ValueError: the folder has no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.pace("sega-jax-out/glasses") > 0  # made by the example of sweep.run
        True
    """
    where = Folder(folder)
    return _pace(where.plan(), where)


def _pace(plan: Plan, where: Folder) -> float | None:
    # A program's first batch has its compilation in it, and counts only where there is no other.
    first: list[tuple[float, int]] = []
    timed: list[tuple[float, int]] = []
    there = where.store.names(RECORDS)
    seen = set()
    for number, batch in enumerate(plan.batches):
        if part(number).rpartition("/")[2] in there:
            data = where.store.read(part(number))
            assert data is not None
            seconds = sum(records.read_part(data, ["seconds"])["seconds"])
            (timed if batch.compiled in seen else first).append((seconds, plan.evaluations(number)))
            seen.add(batch.compiled)
    some = timed or first
    return sum(seconds for seconds, _ in some) / sum(count for _, count in some) if some else None
