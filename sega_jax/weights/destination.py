"""Writes folders atomically: a folder appears only when it is complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(dest: Path) -> Iterator[Path]:
    """Yields a hidden folder to write into. It becomes `dest` if the block succeeds and is removed if it fails.

    The hidden folder is next to `dest`. Files that a killed process left in it are removed. A lock distinguishes such
    leftovers from a folder that another process is still writing: the operating system releases a process's locks when
    the process ends.

    Raises:
        FileExistsError: `dest` exists and is not an empty folder, or another process is writing to it.
        OSError: `dest` cannot be written to.
    """
    if os.path.lexists(dest) and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(f"{dest} exists and is not an empty folder; choose a new one")
    if os.path.ismount(dest):
        raise FileExistsError(f"{dest} is a mount point and cannot be replaced; choose a folder inside it")
    partial = dest.with_name(f".{dest.name}.sega-jax-partial")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise OSError(f"{dest} cannot be written to ({error.strerror}); choose a different folder") from None
    try:
        if not _lock(descriptor) or not os.path.samestat(os.fstat(descriptor), os.stat(partial)):
            raise FileExistsError(
                f"another process is writing to {dest}; wait until it has finished, or choose a different folder"
            )
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
        os.close(descriptor)


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks; continue, because concurrent writers are rare
        return True
    return True


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sync(folder: Path) -> None:
    """Flushes all files to the disk, so that a power failure cannot leave an incomplete folder with the final name."""
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
