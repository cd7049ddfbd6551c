"""A sweep's folder, in which nothing is ever half there:

    plan.json               the plan, with the sweep in it
    pictures/NAME.png       a picture each, which knows how it was made
    records/part-00012.parquet   the records of a batch, a row for each picture

Every file is written under another name and renamed when it is whole, the records of a batch after its pictures. So a
batch is done when its records are there; whatever happens before, it is made again, to the same pictures. Two runs
may share the folder: they may make a picture twice, and record it once.
"""

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from sega_jax.sweep.plan import Plan
from sega_jax.sweep.records import read_part


class Folder:
    """The folder of one plan."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.pictures, self.records = self.path / "pictures", self.path / "records"

    def begin(self, plan: Plan) -> None:
        """Keeps the plan, or finds it kept.

        Raises:
            OSError: the folder cannot be written to.
            ValueError: the folder has another plan.
        """
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(exist_ok=True)
        self._tidy()
        text = plan.to_json()
        try:
            self._write_new(self.path / "plan.json", text.encode())
        except FileExistsError:
            if (self.path / "plan.json").read_text("utf-8") != text:
                raise ValueError(
                    f"{self.path} holds another sweep, or this one with another model or other rows; name another"
                    " folder, or take the sweep, the model and the rows that it began with"
                ) from None

    def plan(self) -> Plan:
        """The plan that is kept.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        try:
            text = (self.path / "plan.json").read_text("utf-8")
        except FileNotFoundError:
            raise ValueError(f"{self.path} has no plan.json; name the folder of a sweep") from None
        try:
            return Plan.from_json(text)
        except ValueError as error:
            raise ValueError(f"{self.path / 'plan.json'}: {error}") from None

    def missing(self, plan: Plan) -> list[int]:
        """The numbers of the batches that are to be made."""
        parts = {path.name for path in self.records.glob("part-*.parquet")}
        there = {path.name for path in self.pictures.iterdir()} if self.pictures.is_dir() else set()
        return [i for i, batch in enumerate(plan.batches) if not self._has(i, batch.names, parts, there)]

    def _has(self, number: int, names: Iterable[str], parts: set[str], there: set[str]) -> bool:
        part = self.part(number)
        if part.name not in parts:
            return False
        if all({f"{name}.png", f"{name}.webp"} & there for name in names):
            return True
        # A picture that could not be made has no file.
        return all(Path(file).name in there for file in read_part(part, ["file"])["file"] if file is not None)

    def part(self, number: int) -> Path:
        """The records of a batch."""
        return self.records / f"part-{number:05}.parquet"

    def write(self, path: Path, data: bytes) -> None:
        """A whole file, or none; over one that is there."""
        temporary = self._temporary(path)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_new(self, path: Path, data: bytes) -> None:
        """Likewise, but FileExistsError where one is there."""
        temporary = self._temporary(path)
        try:
            temporary.write_bytes(data)
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{os.urandom(4).hex()}")

    def _tidy(self) -> None:
        """Removes what processes of this machine left that are no more."""
        for folder in (self.path, self.pictures, self.records):
            for path in folder.glob(f".*.{_host()}-*"):
                process = path.name.split("-")[-2]
                if process.isdigit() and not _runs(int(process)):
                    path.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
