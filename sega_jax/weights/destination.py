"""A folder that is there as a whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_nothing(dest: Path) -> Iterator[Path]:
    """A hidden folder beside `dest` to write into; it takes that name when the block ends, and goes when it fails.

    What a killed process left in the hidden folder is removed. A lock, which the system drops with its process,
    tells leftovers of a dead process from a folder that is being written.

    Raises:
        FileExistsError: `dest` is there and no empty folder, or another process is writing it.
        OSError: it cannot be written to.
    """
    if os.path.lexists(dest) and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(f"{dest} exists and is no empty folder; name a new one")
    if os.path.ismount(dest):
        raise FileExistsError(f"{dest} is where a disk is mounted and cannot be replaced; name a folder inside it")
    partial = dest.with_name(f".{dest.name}.sega-jax-partial")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise OSError(f"{dest} cannot be written to ({error.strerror}); name another folder") from None
    try:
        if not _lock(held) or not os.path.samestat(os.fstat(held), os.stat(partial)):
            raise FileExistsError(f"another process is writing {dest}; wait for it, or name another folder")
        try:
            _empty(partial)
            yield partial
            _sync(partial)
            partial.rename(dest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync_entry(dest.parent)
    finally:
        os.close(held)


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; two writers of one folder are rare
        return True
    return True


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sync(folder: Path) -> None:
    """Has the disk hold everything before the folder gets its name, in case the power fails."""
    for path, _, names in os.walk(folder):
        for name in names:
            _sync_entry(Path(path, name))
        _sync_entry(Path(path))


def _sync_entry(path: Path) -> None:
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
