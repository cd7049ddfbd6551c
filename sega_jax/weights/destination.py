"""Writes files and folders atomically: they appear only when they are complete."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# The end of the names of hidden folders that are being written.
_PARTIAL = ".sega-jax-partial"
# Another process may remove a folder that is still empty, or a hidden folder that is not locked yet. Then it is created
# again.
_ATTEMPTS = 100
_PAUSE = 0.01  # in seconds


@contextmanager
def new_folder(path: Path, create: Callable[[], T]) -> Iterator[T]:
    """Creates a folder, its missing parents, and its first file. If the new folders are empty when the block ends, they
    are removed again.

    Several processes may do this at the same time, because only empty folders are removed. A process whose folder is
    removed before the first file exists creates the folder again.

    Args:
        path: the folder.
        create: a function that creates the first file or folder in it. It is called again after a `FileNotFoundError`.

    Yields:
        The value that `create` returns.

    Raises:
        OSError: a folder cannot be created.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        yield _with_folder(path, create)
    finally:
        for one in missing:
            with suppress(OSError):  # a folder that is not empty
                one.rmdir()


def _with_folder(path: Path, create: Callable[[], T]) -> T:
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            _make_folder(path)
            return create()
    _make_folder(path)
    return create()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # `mkdir` also raises this error if another process removes the folder at the same moment.
        if os.path.lexists(error.filename) and not os.path.isdir(error.filename):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), error.filename) from None


@contextmanager
def atomic_folder(dest: Path) -> Iterator[Path]:
    """Yields a hidden folder to write into. It becomes `dest` if the block succeeds and is removed if it fails.

    The hidden folder is next to `dest`. A killed process cannot remove its hidden folder, so the next call for any
    folder with the same parent removes it. A lock distinguishes such leftovers from folders that other processes are
    still writing to: the operating system releases a process's locks when the process ends. On file systems without
    locks, only the next call for the same `dest` removes the leftovers.

    Raises:
        FileExistsError: `dest` exists and is not an empty folder, or another process is writing to it.
        OSError: `dest` cannot be written to.
    """
    _check_free(dest)
    partial = dest.with_name(f".{dest.name}{_PARTIAL}")

    def create() -> int:
        _remove_leftovers(dest.parent)
        return _locked(partial, dest)

    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(new_folder(dest.parent, create))
        except OSError as error:
            if error.errno is None:  # it already has a message for users
                raise
            raise OSError(f"{dest} cannot be written to ({error.strerror}); choose a different folder") from None
        except KeyboardInterrupt:
            _remove_leftovers(dest.parent)  # Ctrl-C may have arrived after the hidden folder was created
            raise
        stack.callback(os.close, descriptor)
        try:
            _empty(partial)
            yield partial
            _sync(partial)
            partial.rename(dest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync_folder(dest.parent)


def _check_free(dest: Path) -> None:
    if os.path.lexists(dest) and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(f"{dest} exists and is not an empty folder; choose a new one")
    if os.path.ismount(dest):
        raise FileExistsError(f"{dest} is a mount point and cannot be replaced; choose a folder inside it")


def _remove_leftovers(parent: Path) -> None:
    """Removes the hidden folders of processes that have ended."""
    for path in parent.glob(f".*{_PARTIAL}"):
        with suppress(OSError):
            descriptor = _opened(path)
            try:
                # Another process may have given the folder its final name, and created a new hidden folder.
                if _lock(descriptor) and _is_same(descriptor, path):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _locked(partial: Path, dest: Path) -> int:
    """Creates the hidden folder and locks it. Returns its file descriptor, which holds the lock."""
    for _ in range(_ATTEMPTS):
        with suppress(FileExistsError):
            partial.mkdir()
        try:
            descriptor = _opened(partial)
        except FileNotFoundError:
            continue
        try:
            is_ours = _lock(descriptor) is not False and _is_same(descriptor, partial)
        except BaseException:
            os.close(descriptor)
            raise
        if is_ours:
            return descriptor
        os.close(descriptor)
        _check_free(dest)
        # A process that removes leftovers may hold the lock for a moment.
        time.sleep(_PAUSE)
    raise FileExistsError(
        f"another process is writing to {dest}; wait until it has finished, or choose a different folder"
    )


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _is_same(descriptor: int, path: Path) -> bool:
    """Returns whether a path still names the open folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
        raise FileNotFoundError(
            f"{path} cannot be written, because {path.parent} is not a folder; create it, or choose another"
        )
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


def _lock(folder: int) -> bool | None:
    """Returns whether the folder could be locked; None if the file system does not support locks."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
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
