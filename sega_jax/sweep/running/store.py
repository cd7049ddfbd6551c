"""Reads and writes a sweep's files, in a folder or at an address that fsspec supports, such as gs://bucket/sweep.

A file is either complete or absent, even if the process is killed, and only one process can create it. In folders, this
module ensures both. At addresses, the file system must ensure both, as the object stores of Google, Amazon and Azure
do.
"""

import contextlib
import hashlib
import os
import re
import socket
import uuid
from functools import cache, partial
from pathlib import Path

from sega_jax.weights.destination import new_folder, write_file


class Store:
    """The files in a folder or at an address. A file's name is its relative path, such as "records/part-00012.parquet".

    Args:
        path: a folder, or an address with "://".

    Attributes:
        local: whether the files are in a folder of this machine.

    Raises:
        ValueError: fsspec does not support the address, or the address needs a package that is not installed.
    """

    def __init__(self, path: str | Path):
        from fsspec.core import url_to_fs  # imported here because only sweeps need it
        from fsspec.implementations.local import LocalFileSystem

        if "://" in str(path):
            scheme, _, place = str(path).partition("://")
            if len(scheme) < 2 or not place.strip("/"):
                raise ValueError(f"{path} names no folder; give a path, or an address such as gs://bucket/folder")
            self._address = str(path).rstrip("/")
            try:
                self._files, self._root = url_to_fs(self._address)
            except (ImportError, ValueError) as error:
                raise ValueError(f"{path} cannot be reached ({error})") from None
        else:
            # A folder's name may contain "::", which url_to_fs would interpret as a chain of file systems.
            self._address = str(Path(path).expanduser())
            self._files, self._root = LocalFileSystem(), os.path.abspath(self._address)
        self.local = isinstance(self._files, LocalFileSystem)

    def __str__(self) -> str:
        return self._address

    def begin(self, folders: tuple[str, ...]) -> None:
        """Creates the folders, and removes unfinished files left behind by processes on this machine that have
        ended."""
        for folder in folders:
            self._files.makedirs(self._path(folder), exist_ok=True)
        if self.local:
            for folder in ("", *folders):
                for name in self.names(folder):
                    unfinished = re.fullmatch(rf"\..*\.{re.escape(host())}-(\d{{1,9}})-[0-9a-f]+", name)
                    if unfinished and not runs(int(unfinished[1])):
                        self.remove(f"{folder}/{name}")

    def read(self, name: str) -> bytes | None:
        """Returns a file's content, or None if there is no such file."""
        try:
            return self._files.cat_file(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, name: str) -> bool:
        """Returns whether a file exists."""
        self._files.invalidate_cache()
        return self._files.exists(self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, replacing an existing one."""
        if self.local:
            write_file(Path(self._path(name)), data, replace=True, owner=f"{host()}-")
        else:
            self._files.pipe_file(self._path(name), data)  # object stores show a file only when it is complete

    def create(self, name: str, data: bytes) -> None:
        """Writes a new file, and creates missing folders. If several processes create the same file at once, only one
        succeeds. If the file cannot be written, new folders that are empty are removed again.

        Raises:
            FileExistsError: the file already exists.
        """
        if self.local:
            path = Path(self._path(name))
            with new_folder(path.parent, partial(write_file, path, data, owner=f"{host()}-")):
                pass
        else:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._path(name), data, mode="create")

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def names(self, folder: str) -> set[str]:
        """Returns the names of a folder's entries. Names of unfinished files start with a dot."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in paths}

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns {name: size in bytes} of a folder's files."""
        self._files.invalidate_cache()
        try:
            entries = self._files.ls(self._path(folder), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        files = (entry for entry in entries if entry["type"] == "file")
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in files}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@cache
def host() -> str:
    """Returns a name for this machine or container, such as "node7-1a2b3c4d".

    Containers may have the same host name but do not see each other's processes, so the name also depends on the
    process namespace.
    """
    parts = []
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, partial(os.readlink, "/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(read())
    if not parts:  # not Linux
        parts.append(str(uuid.getnode()))
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]
    return f"{socket.gethostname().replace('.', '_')}-{digest}"


def runs(process: int) -> bool:
    """Returns whether the process with this id is running on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
