"""Where a sweep's files are: a folder, or what fsspec reaches by an address, such as gs://bucket/sweep. Whatever ends
while it writes, a file is there whole or not at all."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """Files by their names, "records/part-00012.parquet"."""

    def begin(self, folders: tuple[str, ...]) -> None:
        """Makes the folders, and removes what processes of this machine left that are no more."""

    def read(self, name: str) -> bytes | None:
        """A file, or None for none."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def write(self, name: str, data: bytes) -> None:
        """A file, over one that is there."""

    def create(self, name: str, data: bytes) -> None:
        """Likewise, but FileExistsError where one is there."""

    def remove(self, name: str) -> None:
        """A file, if it is there."""

    def names(self, folder: str) -> set[str]:
        """Of the files in a folder, without the folder's; those that are being written begin with a dot."""


def store(path: str | Path) -> Store:
    """Of a folder's path, or an address.

    Raises:
        ValueError: fsspec knows no such address, or lacks what it needs for it.
    """
    return _Remote(str(path)) if "://" in str(path) else _Local(Path(path).expanduser())


class _Local:
    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def begin(self, folders: tuple[str, ...]) -> None:
        for folder in folders:
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for folder in ("", *folders):
            for path in (self.path / folder).glob(f".*.{host()}-*"):
                process = path.name.split("-")[-2]
                if process.isdigit() and not runs(int(process)):
                    path.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def write(self, name: str, data: bytes) -> None:
        self._place(name, data, os.replace)

    def create(self, name: str, data: bytes) -> None:
        self._place(name, data, self._link)

    @staticmethod
    def _link(temporary: Path, path: Path) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # Buckets that are mounted have no links.
            if path.exists():
                raise FileExistsError(path) from None
            os.replace(temporary, path)

    def _place(self, name: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
        path = self.path / name
        temporary = path.with_name(f".{path.name}.{host()}-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            temporary.write_bytes(data)
            place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def names(self, folder: str) -> set[str]:
        path = self.path / folder
        return {entry.name for entry in path.iterdir()} if path.is_dir() else set()


class _Remote:
    """Object stores, whose writes are whole in themselves."""

    def __init__(self, address: str):
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        try:
            self._fs, self._root = url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{address} cannot be reached ({error})") from None

    def __str__(self) -> str:
        return self.address

    def begin(self, folders: tuple[str, ...]) -> None:
        for folder in folders:
            self._fs.makedirs(f"{self._root}/{folder}", exist_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return self._fs.exists(f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        if self.has(name):
            raise FileExistsError(name)
        self.write(name, data)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def names(self, folder: str) -> set[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in found}


def host() -> str:
    return socket.gethostname().replace(".", "_")


def runs(process: int) -> bool:
    """Whether a process of this machine does."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
