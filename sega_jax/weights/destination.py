"""Writes files and folders atomically: they appear only when they are complete."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_folder(dest: Path) -> Iterator[Path]:
    """Yields a hidden folder to write into. It becomes `dest` if the block succeeds and is removed if it fails.

    The hidden folder is next to `dest`. Files that a killed process left in the hidden folder are removed. A lock
    distinguishes such leftovers from a folder that another process is still writing to: the operating system releases a
    process's locks when the process ends.

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
        _sync_folder(dest.parent)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, replace: bool = False, owner: str = "") -> None:
    """Writes a file, and flushes both the file and its directory entry to the disk.

    Args:
        path: the file. With `replace`, a link stays a link, and a device such as /dev/stdout is written to directly.
        data: the file's content.
        replace: whether an existing file is replaced.
        owner: a prefix for the process in the name of the hidden file, `.NAME.OWNERPROCESS-RANDOM`, which is written
            first.

    Raises:
        FileExistsError: the file exists, and `replace` is false. If several processes create it, only one succeeds.
        OSError: the file cannot be written, for example because the disk is full. No partial file remains.
    """
    if replace:
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
    if not path.parent.is_dir():
        raise OSError(f"{path} cannot be written, because {path.parent} is not a folder; create it, or choose another")
    unfinished = path.with_name(f".{path.name}.{owner}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with _full_disk(path, len(data)):
            unfinished.write_bytes(data)
            _sync_entry(unfinished)
        if replace:
            unfinished.replace(path)
        else:
            _link(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _link(unfinished: Path, path: Path) -> None:
    """Gives a finished file its name. Unlike a rename, a link never replaces an existing file."""
    try:
        path.hardlink_to(unfinished)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; remove it, or choose a different name") from None
    except OSError:
        # Buckets that are mounted as folders do not support links. Two processes may both succeed there.
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it, or choose a different name") from None
        unfinished.rename(path)


@contextmanager
def _full_disk(path: Path, size: int) -> Iterator[None]:
    """Explains a full-disk error that is raised inside a `with` block.

    Args:
        path: the file that the block writes.
        size: the file's size in bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        full = OSError(
            f"{path} needs {size:,} bytes, but the disk or a quota is full ({free:,} bytes are free on the disk); free"
            " some space, or choose a different folder"
        )
        full.errno = error.errno
        raise full from None


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
        _sync_folder(Path(path))


def _sync_folder(path: Path) -> None:
    """Flushes the entries of a folder to the disk, if its file system supports this."""
    with suppress(OSError):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
