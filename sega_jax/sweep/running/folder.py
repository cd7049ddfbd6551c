"""A sweep's folder, in which nothing is ever half there:

    plan.json               the plan, with the sweep in it
    pictures/NAME.png       a picture each, which knows how it was made
    records/part-00012.parquet   the records of a batch, a row for each picture
    leases/share-2-of-16.json    of a share that a worker is at
    metrics/NAME.parquet    a number for each picture, once it was measured

Every file is written under another name and renamed when it is whole, the records of a batch after its pictures. So a
batch is done when its records are there; whatever happens before, it is made again, to the same pictures. Several runs
may share the folder: they may make a picture twice, and record it once, because a batch has one file of records.
"""

from collections.abc import Iterable
from pathlib import Path

from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running.records import read_part
from sega_jax.sweep.running.store import store

PICTURES, RECORDS, LEASES, METRICS = "pictures", "records", "leases", "metrics"


class Folder:
    """The folder of one plan, by its path, or an address that fsspec knows."""

    def __init__(self, path: str | Path):
        self.store = store(path)

    def __str__(self) -> str:
        return str(self.store)

    def begin(self, plan: Plan) -> None:
        """Keeps the plan, or finds it kept.

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
        """The plan that is kept.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        text = self.store.read("plan.json")
        if text is None:
            raise ValueError(f"{self} has no plan.json; name the folder of a sweep")
        try:
            return Plan.from_json(text.decode())
        except ValueError as error:
            raise ValueError(f"{self}/plan.json: {error}") from None

    def missing(self, plan: Plan) -> list[int]:
        """The numbers of the batches that are to be made."""
        parts, there = self.store.names(RECORDS), self.store.names(PICTURES)
        return [i for i, batch in enumerate(plan.batches) if not self._has(i, batch.names, parts, there)]

    def _has(self, number: int, names: Iterable[str], parts: set[str], there: set[str]) -> bool:
        if part(number).rpartition("/")[2] not in parts:
            return False
        if all({f"{name}.png", f"{name}.webp"} & there for name in names):
            return True
        records = self.store.read(part(number))
        assert records is not None
        # A picture that could not be made has no file.
        files = read_part(records, ["file"])["file"]
        return all(Path(file).name in there for file in files if file is not None)


def part(number: int) -> str:
    """The file of a batch's records."""
    return f"{RECORDS}/part-{number:05}.parquet"
