"""The files in a sweep's folder:

    plan.json                    the plan, which contains the sweep
    pictures/0007-seed=2.png     one picture, which stores its settings; `sega_jax.sweep.planning.file_names` names it
    records/part-00012.parquet   the records of one batch, with a row for each picture
    records/part-00013-unfinished.parquet   the same for the finished pictures of a batch that is being made
    leases/share-2-of-16.json    the worker that is making a share of the batches
    metrics/NAME.parquet         a number for each measured picture
    stages/stage1/               in a cascade: the folder of an earlier stage, whose pictures are arrays of floats

Every file is either complete or absent. A picture is written as soon as it is made, and recorded as soon as the other
pictures of its call are written. A picture is done when it is recorded. If a batch is interrupted, its program runs
again, because pictures are the same bit for bit only in the same batch. The pictures that are already recorded are
kept. Several workers may share the folder. Two workers may make the same picture, but it is recorded once, because a
finished batch has one file of records.
"""

from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import records
from sega_jax.sweep.running.store import Store

PICTURES, RECORDS, LEASES, METRICS = "pictures", "records", "leases", "metrics"
_STAGES = "stages"
_UNFINISHED = "-unfinished.parquet"


class Problem(NamedTuple):
    """A damaged, missing or unknown file. As a string, it is a sentence."""

    file: str  # the path within the folder
    words: str  # the rest of the sentence, such as "is empty"
    unreadable: bool = False  # whether the file cannot be read, so it may be intact

    def __str__(self) -> str:
        return f"{self.file} {self.words}"


class Recorded(NamedTuple):
    """The recorded pictures of a batch."""

    rows: dict[str, dict[str, Any]]  # {picture name: its record}
    problems: list[Problem]


class Folder:
    """The folder of one plan.

    Args:
        path: the folder's path, or an address that fsspec supports, such as gs://bucket/sweep.

    Raises:
        ValueError: fsspec does not support the address.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.Folder("sega-jax-out/glasses").plan().counts.pictures  # made by the example of sweep.run
        2
    """

    def __init__(self, path: str | Path):
        self.store = Store(path)

    def __str__(self) -> str:
        return str(self.store)

    def of(self, stage: Plan, plan: Plan) -> "Folder":
        """Returns the folder of one stage of this folder's plan; for the last stage, this folder."""
        return self if stage is plan.chain[-1] else Folder(f"{self}/{_STAGES}/{stage.facts.stage}")

    def begin(self, plan: Plan) -> None:
        """Writes the plan, unless the folder already contains it.

        Raises:
            OSError: the folder cannot be written to.
            ValueError: the folder contains a different plan, or a damaged one.
        """
        if not self.contains(plan):
            try:
                self.store.create("plan.json", plan.to_json().encode())
            except FileExistsError:  # another worker was faster
                self.contains(plan)
        self.store.begin((PICTURES, RECORDS, LEASES))
        self.remove_superseded()

    def remove_superseded(self) -> None:
        """Removes the records of unfinished batches that are finished now. A killed process may leave both files, and
        programs that read all records would read its pictures twice."""
        names = self.store.names(RECORDS)
        for name in names:
            if name.endswith(_UNFINISHED) and name.replace(_UNFINISHED, ".parquet") in names:
                self.store.remove(f"{RECORDS}/{name}")

    def contains(self, plan: Plan) -> bool:
        """Returns whether the folder contains a plan. Returns false if it contains none.

        Raises:
            ValueError: the folder contains a different plan, or a damaged one.
        """
        text = self.store.read("plan.json")
        if text is None:
            return False
        if text != plan.to_json().encode():
            self.plan()  # raises an error if the plan is damaged
            raise ValueError(
                f"{self} contains a different sweep, or this sweep with a different model, number of rows or sharing;"
                " choose a different folder, or use the original settings"
            )
        return True

    def plan(self) -> Plan:
        """Reads the folder's plan.

        Raises:
            ValueError: the folder has no plan, or the plan cannot be read.
        """
        text = self.store.read("plan.json")
        if text is None:
            raise ValueError(f"{self} has no plan.json; give the folder of a sweep")
        try:
            return Plan.from_json(text.decode("utf-8", "replace"))
        except ValueError as error:
            raise ValueError(f"{self}/plan.json: {error}") from None

    def missing(self, plan: Plan) -> list[int]:
        """Returns the indices of the batches that are not done, judging only by which files exist."""
        parts, pictures = self.store.names(RECORDS), self.store.names(PICTURES)
        return [i for i in range(len(plan.batches)) if not self._has(plan, i, parts, pictures)]

    def _has(self, plan: Plan, number: int, parts: set[str], pictures: set[str]) -> bool:
        if Path(part(number)).name not in parts:
            return False
        if all(plan.files[name] in pictures for name in plan.batches[number].names):
            return True
        # Pictures that contain NaN or were flagged have no files.
        rows = self.recorded(plan, number, parts).rows
        names = plan.batches[number].names
        return all(name in rows and (not rows[name]["file"] or plan.files[name] in pictures) for name in names)

    def recorded(self, plan: Plan, number: int, parts: set[str] | None = None) -> Recorded:
        """Reads the records of a batch's pictures, whether the batch is finished or not.

        Args:
            parts: the names of all files of records. Only these are read. None reads the batch's files if they exist.
        """
        names, problems = plan.batches[number].names, []
        for file in (part(number), unfinished_part(number)):
            if parts is not None and Path(file).name not in parts:
                continue
            data, problem = self.read(file)
            if problem is not None:
                problems.append(problem)
            if data is None:
                continue
            try:
                rows = {row["name"]: row for row in records.rows(data)}
            except ValueError as error:
                problems.append(Problem(file, str(error)))
                continue
            if not rows.keys() <= set(names) or (file == part(number) and len(rows) < len(names)):
                problems.append(Problem(file, "is damaged: it does not hold the records of its batch"))
                continue
            return Recorded({name: rows[name] for name in names if name in rows}, problems)
        return Recorded({}, problems)

    def read(self, file: str) -> tuple[bytes | None, Problem | None]:
        """Reads a file. Returns its content, or None if there is no such file, and the reason if it cannot be read."""
        try:
            return self.store.read(file), None
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error}); remove it, or change its permissions"
            return None, Problem(file, reason, unreadable=True)


def part(number: int) -> str:
    """Returns the path, within the folder, of a finished batch's records."""
    return f"{RECORDS}/part-{number:05}.parquet"


def unfinished_part(number: int) -> str:
    """Returns the path, within the folder, of the records of a batch that is being made."""
    return f"{RECORDS}/part-{number:05}{_UNFINISHED}"


def picture(plan: Plan, name: str) -> str:
    """Returns the path, within the folder, of the picture with this name in the plan."""
    return f"{PICTURES}/{plan.files[name]}"
