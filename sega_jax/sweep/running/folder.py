"""The files in a sweep's folder:

    plan.json                    the plan, which contains the sweep
    pictures/NAME.png            one picture, which stores its settings
    records/part-00012.parquet   the records of one batch, with a row for each picture
    leases/share-2-of-16.json    the worker that is making a share of the batches
    metrics/NAME.parquet         a number for each measured picture
    stages/stage1/               in a cascade: the folder of an earlier stage, whose pictures are arrays of floats

Every file is either complete or absent, and the records of a batch are written after its pictures. A batch is therefore
done when its records exist. A batch that was interrupted before that is made again, with the same pictures. Several
workers may share the folder. Two workers may make the same picture, but it is recorded once, because a batch has one
file of records.
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
        return self if stage is plan.chain[-1] else Folder(f"{self}/stages/{stage.facts.stage}")

    def begin(self, plan: Plan) -> None:
        """Writes the plan, unless the folder already contains it.

        Raises:
            OSError: the folder cannot be written to.
            ValueError: the folder contains a different plan.
        """
        self.store.begin((PICTURES, RECORDS, LEASES))
        text = plan.to_json().encode()
        try:
            self.store.create("plan.json", text)
        except FileExistsError:
            if self.store.read("plan.json") != text:
                raise ValueError(
                    f"{self} contains a different sweep, or this sweep with a different model, number of rows or"
                    " sharing; choose a different folder, or use the original settings"
                ) from None

    def plan(self) -> Plan:
        """Reads the folder's plan.

        Raises:
            ValueError: the folder has no plan, or the plan cannot be read.
        """
        text = self.store.read("plan.json")
        if text is None:
            raise ValueError(f"{self} has no plan.json; give the folder of a sweep")
        try:
            return Plan.from_json(text.decode())
        except ValueError as error:
            raise ValueError(f"{self}/plan.json: {error}") from None

    def missing(self, plan: Plan) -> list[int]:
        """Returns the indices of the batches that are not done."""
        parts, pictures = self.store.names(RECORDS), self.store.names(PICTURES)
        return [i for i, batch in enumerate(plan.batches) if not self._has(i, batch.names, parts, pictures)]

    def _has(self, number: int, names: Iterable[str], parts: set[str], pictures: set[str]) -> bool:
        if part(number).rpartition("/")[2] not in parts:
            return False
        if all({f"{name}.{kind}" for kind in KINDS} & pictures for name in names):
            return True
        records = self.store.read(part(number))
        assert records is not None
        # Pictures that contain NaN or were flagged have no files.
        files = read_part(records, ["file"])["file"]
        return all(Path(file).name in pictures for file in files if file is not None)


def part(number: int) -> str:
    """Returns the path of a batch's records within the folder."""
    return f"{RECORDS}/part-{number:05}.parquet"
