"""The files in a sweep's folder:

    plan.json                    the plan, which contains the sweep
    pictures/NAME.png            one picture, which stores its settings
    records/part-00012.parquet   the records of one batch, a row for each picture
    leases/share-2-of-16.json    says which worker is busy with a share
    metrics/NAME.parquet         a number for each picture that was measured
    stages/stage1/               of a cascade: the folder of an earlier stage, whose pictures are arrays of floats

Every file is there whole or not at all, and the records of a batch are written after its pictures. So a batch is done
when its records are there. A batch that was interrupted before that is made again, with the same pictures. Several
workers may share the folder. They may make a picture twice, but record it once, because a batch has one file of
records.
"""

from collections.abc import Iterable
from pathlib import Path

from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running.records import read_part
from sega_jax.sweep.running.store import Store

PICTURES, RECORDS, LEASES, METRICS = "pictures", "records", "leases", "metrics"
KINDS = ("png", "webp", "npy")


class Folder:
    """The folder of one plan.

    Args:
        path: the folder, or an address that fsspec knows.

    Raises:
        ValueError: the address cannot be reached.

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
        """Returns the folder of a stage of this folder's plan: for the last one it is this folder."""
        return self if stage is plan.chain[-1] else Folder(f"{self}/stages/{stage.facts.stage}")

    def begin(self, plan: Plan) -> None:
        """Writes the plan, unless the folder has it already.

        Raises:
            OSError: the folder cannot be written to.
            ValueError: the folder has another plan.
        """
        self.store.begin((PICTURES, RECORDS, LEASES))
        text = plan.to_json().encode()
        try:
            self.store.create("plan.json", text)
        except FileExistsError:
            if self.store.read("plan.json") != text:
                raise ValueError(
                    f"{self} holds another sweep, or this one with another model, other rows or other sharing; name"
                    " another folder, or take what it began with"
                ) from None

    def plan(self) -> Plan:
        """Reads the folder's plan.

        Raises:
            ValueError: the folder has no plan, or a broken one.
        """
        text = self.store.read("plan.json")
        if text is None:
            raise ValueError(f"{self} has no plan.json; name the folder of a sweep")
        try:
            return Plan.from_json(text.decode())
        except ValueError as error:
            raise ValueError(f"{self}/plan.json: {error}") from None

    def missing(self, plan: Plan) -> list[int]:
        """Returns the numbers of the batches that are not done."""
        parts, there = self.store.names(RECORDS), self.store.names(PICTURES)
        return [i for i, batch in enumerate(plan.batches) if not self._has(i, batch.names, parts, there)]

    def _has(self, number: int, names: Iterable[str], parts: set[str], there: set[str]) -> bool:
        if part(number).rpartition("/")[2] not in parts:
            return False
        if all({f"{name}.{kind}" for kind in KINDS} & there for name in names):
            return True
        records = self.store.read(part(number))
        assert records is not None
        # Pictures with NaN and flagged pictures have no files.
        files = read_part(records, ["file"])["file"]
        return all(Path(file).name in there for file in files if file is not None)


def part(number: int) -> str:
    """Returns the name of the file with a batch's records."""
    return f"{RECORDS}/part-{number:05}.parquet"
