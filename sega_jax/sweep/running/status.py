"""The progress of a sweep, and an estimate of its remaining time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import damage
from sega_jax.sweep.running.folder import PICTURES, RECORDS, Folder, Problem, Recorded, part


class Status(NamedTuple):
    """The progress of a sweep or of one of its stages.

    Attributes:
        pictures: the number of pictures.
        done: the number of finished pictures.
        batches: the number of batches.
        batches_done: the number of finished batches.
        evaluations_left: the UNet evaluations of all unfinished batches.

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
    """Returns the progress of the sweep in a folder; for a cascade, the progress of its last stage.

    Args:
        folder: the folder's path, or an address that fsspec supports.

    Raises:
        ValueError: the folder contains no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.status("sega-jax-out/glasses").done  # made by the example of sweep.run
        2
    """
    where = Folder(folder)
    return of_plan(where.plan(), where)


def stages(folder: str | Path) -> dict[str, Status]:
    """Returns {stage name: progress} for the cascade in a folder; {} for a single model.

    Args:
        folder: the folder's path, or an address that fsspec supports.

    Raises:
        ValueError: the folder contains no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.stages("sega-jax-out/glasses")  # made by the example of sweep.run; not a cascade
        {}
    """
    where = Folder(folder)
    plan = where.plan()
    if plan.earlier is None:
        return {}
    return {name: of_plan(stage, own) for name, (stage, own) in _stages(plan, where).items()}


def _stages(plan: Plan, where: Folder) -> dict[str, tuple[Plan, Folder]]:
    """Returns {stage name: its plan and its folder}. The only stage of a single model has the name ""."""
    return {str(stage.facts.stage or ""): (stage, where.of(stage, plan)) for stage in plan.chain}


def of_plan(plan: Plan, folder: Folder) -> Status:
    """Returns the progress of a plan in its folder."""
    missing = folder.missing(plan)
    total = sum(len(batch.points) for batch in plan.batches)
    present, parts = folder.store.names(PICTURES), folder.store.names(RECORDS)
    left = 0
    for i in missing:
        rows = folder.recorded(plan, i, parts).rows.values()
        done = sum(row["file"] is None or Path(row["file"]).name in present for row in rows)
        left += len(plan.batches[i].points) - done
    to_do = sum(map(plan.evaluations, missing))
    return Status(total, total - left, len(plan.batches), len(plan.batches) - len(missing), to_do)


def without_files(folder: str | Path) -> dict[str, int]:
    """Counts the finished pictures that have no file, by the reason; for a cascade, those of its last stage.

    Args:
        folder: the folder's path, or an address that fsspec supports.

    Returns:
        {"not finite": the number of pictures with NaN or infinite values, "flagged": the number of pictures that the
        safety checker flagged}.

    Raises:
        ValueError: the folder contains no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.without_files("sega-jax-out/glasses")  # made by the example of sweep.run
        {'not finite': 0, 'flagged': 0}
    """
    where = Folder(folder)
    return _without_files(where.plan(), where)


def _without_files(plan: Plan, where: Folder) -> dict[str, int]:
    parts = where.store.names(RECORDS)
    recorded = (where.recorded(plan, number, parts).rows.values() for number in range(len(plan.batches)))
    finite = [row["finite"] for rows in recorded for row in rows if row["file"] is None]
    return {"not finite": finite.count(False), "flagged": finite.count(True)}


def problems(folder: str | Path, *, verify: bool = False) -> list[str]:
    """Returns a sentence about each damaged, missing or unknown file of a sweep. `run` makes damaged and missing files
    again; unknown files are ignored.

    Args:
        folder: the folder's path, or an address that fsspec supports.
        verify: whether to read all pictures. Otherwise only their sizes are checked. Records and metrics are always
            read.

    Raises:
        ValueError: the folder contains no sweep, or its plan is damaged.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.problems("sega-jax-out/glasses", verify=True)  # made by the example of sweep.run
        []
    """
    where = Folder(folder)
    plan = where.plan()
    return [str(problem) for problem in _problems(plan, _stages(plan, where), verify)]


def _problems(plan: Plan, stages: Mapping[str, tuple[Plan, Folder]], verify: bool) -> list[Problem]:
    """Returns the problems of all stages, with their files' paths within the folder of the last stage's plan."""
    of_all_stages: list[Problem] = []
    for name, (stage, own) in stages.items():
        prefix = "" if stage is plan else f"stages/{name}/"
        of_stage = damage.problems(own, stage, verify=verify)
        of_all_stages += [problem._replace(file=f"{prefix}{problem.file}") for problem in of_stage]
    return of_all_stages


def seconds_left(folder: str | Path) -> float | None:
    """Estimates the seconds that one worker needs to finish a sweep, including earlier stages of a cascade.

    Args:
        folder: the folder's path, or an address that fsspec supports.

    Returns:
        The seconds, or None if an unfinished stage has no timed batch yet.

    Raises:
        ValueError: the folder contains no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.seconds_left("sega-jax-out/glasses")  # made by the example of sweep.run
        0.0
    """
    where = Folder(folder)
    return _total(_seconds_by_stage(_stages(where.plan(), where)).values())


def _total(seconds: Iterable[float | None]) -> float | None:
    total = 0.0
    for one in seconds:
        if one is None:
            return None
        total += one
    return total


def _seconds_by_stage(stages: Mapping[str, tuple[Plan, Folder]]) -> dict[str, float | None]:
    """Returns {stage name: the same as `seconds_left`, for one stage}."""
    left: dict[str, float | None] = {}
    needed = True
    for name, (stage, own) in reversed(list(stages.items())):
        to_do = of_plan(stage, own).evaluations_left
        needed = needed and to_do > 0  # the stages before a finished stage are no longer needed
        seconds = _pace(stage, own) if needed else 0.0
        left[name] = None if seconds is None else seconds * to_do
    return left


def pace(folder: str | Path) -> float | None:
    """Returns one worker's seconds per UNet evaluation, from a sweep's records; for a cascade, from the records of its
    last stage.

    Args:
        folder: the folder's path, or an address that fsspec supports.

    Returns:
        The seconds, or None if there are no records yet.

    Raises:
        ValueError: the folder contains no sweep.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.pace("sega-jax-out/glasses") > 0  # made by the example of sweep.run
        True
    """
    where = Folder(folder)
    return _pace(where.plan(), where)


def _pace(plan: Plan, where: Folder) -> float | None:
    # The time of a program's first batch includes compilation, so it is used only if no other batch is timed.
    first: list[tuple[float, int]] = []
    timed: list[tuple[float, int]] = []
    recorded = where.store.names(RECORDS)
    seen = set()
    for number, batch in enumerate(plan.batches):
        if part(number).rpartition("/")[2] in recorded:
            rows = where.recorded(plan, number, recorded).rows.values()
            # The calls of a batch that was interrupted ran more than once, so its time is not used.
            if len({row["seconds"] for row in rows}) != 1:
                continue
            seconds = sum(row["seconds"] for row in rows)
            (timed if batch.compiled in seen else first).append((seconds, plan.evaluations(number)))
            seen.add(batch.compiled)
    samples = timed or first
    return sum(seconds for seconds, _ in samples) / sum(count for _, count in samples) if samples else None


class Overview(NamedTuple):
    """Everything that `sega-jax sweep status` prints.

    Attributes:
        stages: {stage name: its progress}, in the order in which the stages run. The only stage of a single model has
            the name "".
        seconds: {stage name: the same as `seconds_left`, for one stage}.
        seconds_left: the same as the function `seconds_left`.
        without_files: the same as the function `without_files`.
        problems: the damaged, missing and unknown files.
    """

    stages: dict[str, Status]
    seconds: dict[str, float | None]
    seconds_left: float | None
    without_files: dict[str, int]
    problems: list[Problem]


def overview(folder: str | Path, *, verify: bool = False) -> Overview:
    """Returns the progress and the problems of a sweep. Reads each file of records once.

    Args:
        folder: the folder's path, or an address that fsspec supports.
        verify: whether to read all pictures. Otherwise only their sizes are checked.

    Raises:
        ValueError: the folder contains no sweep, or its plan is damaged.
    """
    where = Folder(folder)
    plan = where.plan()
    stages = {name: (stage, _ReadOnce(str(own))) for name, (stage, own) in _stages(plan, where).items()}
    progress = {name: of_plan(stage, own) for name, (stage, own) in stages.items()}
    seconds = _seconds_by_stage(stages)
    without_files = _without_files(*list(stages.values())[-1])
    return Overview(progress, seconds, _total(seconds.values()), without_files, _problems(plan, stages, verify))


class _ReadOnce(Folder):
    """A stage's folder that remembers the records that it has read."""

    def __init__(self, path: str):
        super().__init__(path)
        self._read: dict[int, Recorded] = {}

    def recorded(self, plan: Plan, number: int, parts: set[str] | None = None) -> Recorded:
        if number not in self._read:
            self._read[number] = super().recorded(plan, number, parts)
        return self._read[number]
