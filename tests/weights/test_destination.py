"""Tests that files and folders appear only when they are complete."""

import errno
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from sega_jax.weights import destination
from sega_jax.weights.destination import atomic_folder, new_folder, write_file


@pytest.fixture
def full(monkeypatch):
    """Simulates a disk that is full after three more bytes."""
    write = Path.write_bytes

    def fails(path, data):
        write(path, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)


def test_a_file_is_written(tmp_path):
    write_file(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    with pytest.raises(FileExistsError, match="a exists; remove it, or choose a different name"):
        write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    write_file(tmp_path / "a", b"two", replace=True)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_leaves_no_truncated_file(tmp_path, full, replace):
    with pytest.raises(OSError, match=r"a needs 5,000 bytes, but the disk or a quota is full \([\d,]+ bytes are"):
        write_file(tmp_path / "a", b"x" * 5000, replace=replace)
    assert not list(tmp_path.iterdir())


def test_file_systems_without_links(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", unsupported)
    write_file(tmp_path / "a", b"one")
    with pytest.raises(FileExistsError, match="a exists"):
        write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_a_failed_folder_is_removed(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "file").write_bytes(b"x")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("succeeds", [False, True])
def test_new_folders_are_removed_if_they_stay_empty(tmp_path, succeeds):
    (tmp_path / "old").mkdir()
    file = tmp_path / "old" / "new" / "folder" / "file"
    with suppress(ValueError), new_folder(file.parent, file.touch):
        assert file.exists()
        file.unlink()
        if not succeeds:
            raise ValueError
        (tmp_path / "old" / "new" / "file").touch()
    assert sorted(tmp_path.rglob("*")) == [
        tmp_path / "old",
        *[tmp_path / "old/new", tmp_path / "old/new/file"] * succeeds,
    ]


def test_new_folders_survive_processes_that_remove_them(tmp_path, monkeypatch):
    """Another process removes the folders after each step of creating them."""
    mkdir, removed = Path.mkdir, []

    def interrupted(path, *arguments, **options):
        if len(removed) < 3 and path.parent.name == "new":
            removed.append(path)
            if path.parent.exists():
                path.parent.rmdir()
        mkdir(path, *arguments, **options)

    def create():
        if len(removed) < 5:
            removed.append(folder)
            folder.rmdir()
            folder.parent.rmdir()
        (folder / "file").touch()

    folder = tmp_path / "new" / "folder"
    monkeypatch.setattr(Path, "mkdir", interrupted)
    with new_folder(folder, create):
        pass
    assert len(removed) == 5
    assert (folder / "file").exists()


def test_a_folder_that_is_removed_while_it_is_created(tmp_path, monkeypatch):
    """`mkdir` finds a folder that another process then removes, and reports that the folder exists."""
    mkdir, failures = Path.mkdir, iter(range(2))

    def late(path, *arguments, **options):
        if next(failures, None) is not None:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    with new_folder(tmp_path / "new", (tmp_path / "new" / "file").touch):
        pass
    assert (tmp_path / "new" / "file").exists()


def test_a_file_in_place_of_a_new_folder(tmp_path):
    (tmp_path / "file").touch()
    for path, error in ((tmp_path / "file", FileExistsError), (tmp_path / "file" / "below", NotADirectoryError)):
        with pytest.raises(error), new_folder(path, lambda: pytest.fail("created")):
            pass


PROCESS = """
import runpy, sys
from pathlib import Path

new_folder = runpy.run_path(sys.argv[1])["new_folder"]
folder = Path(sys.argv[2]) / "new" / "folder"
file = folder / sys.argv[3]
for _ in range(300):
    with new_folder(folder, file.touch):
        file.unlink()
"""


def test_processes_that_create_and_remove_a_folder_do_not_disturb_each_other(tmp_path):
    command = [sys.executable, "-c", PROCESS, destination.__file__, tmp_path]
    processes = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "abc"]
    errors = [process.communicate()[1].decode() for process in processes]
    assert errors == [""] * 3
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_parents_are_removed_if_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "a" / "b" / "folder"):
        raise ValueError("no")
    with (
        pytest.raises(OSError, match=r"cannot be written to .*; choose a different"),
        atomic_folder(tmp_path / "a" / ("x" * 250)),
    ):
        pass
    assert not list(tmp_path.iterdir())


WRITER = """
import runpy, sys, time
from pathlib import Path

atomic_folder = runpy.run_path(sys.argv[1])["atomic_folder"]
with atomic_folder(Path(sys.argv[2])) as folder:
    (folder / "part").mkdir()
    (folder / "part" / "half").write_bytes(b"x")
    print("writing", flush=True)
    time.sleep(1000)
"""


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """The next call removes the hidden folders of killed processes, but not those of running ones."""
    names = ("killed", "running")
    command = [sys.executable, "-c", WRITER, destination.__file__]
    writers = [subprocess.Popen([*command, tmp_path / name], stdout=subprocess.PIPE) for name in names]
    try:
        assert [writer.stdout.readline() for writer in writers] == [b"writing\n"] * 2
        writers[0].kill()
        writers[0].wait()
        (tmp_path / ".mine").mkdir()
        assert (tmp_path / ".killed.sega-jax-partial" / "part" / "half").exists()
        with atomic_folder(tmp_path / "other"):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {".mine", ".running.sega-jax-partial", "other"}
        assert (tmp_path / ".running.sega-jax-partial" / "part" / "half").exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_without_locks_other_folders_are_kept(tmp_path, monkeypatch):
    """Without locks, a leftover cannot be distinguished from a folder that another process is writing to."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(destination.fcntl, "flock", unsupported)
    for name in (".a.sega-jax-partial", ".b.sega-jax-partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with atomic_folder(tmp_path / "a") as folder:
        assert not list(folder.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".b.sega-jax-partial"}


def test_a_hidden_folder_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    opened, left = destination._opened, iter(range(2))

    def late(folder):
        if next(left, None) is not None:
            folder.rmdir()
        return opened(folder)

    monkeypatch.setattr(destination, "_opened", late)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert (tmp_path / "folder" / "file").exists()


def test_a_hidden_folder_that_another_process_is_removing_is_made_again(tmp_path, monkeypatch):
    """A process that removes leftovers locks the new hidden folder first. It is not mistaken for a writer."""
    lock, opened, cleaner = destination._lock, destination._opened, []

    def locked_late(folder):
        if not cleaner:
            cleaner.append(opened(tmp_path / ".folder.sega-jax-partial"))
            assert lock(cleaner[0])
            threading.Timer(0.1, remove).start()
        return lock(folder)

    def remove():
        (tmp_path / ".folder.sega-jax-partial").rmdir()
        destination.os.close(cleaner[0])

    monkeypatch.setattr(destination, "_lock", locked_late)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert (tmp_path / "folder" / "file").exists()


def test_an_interrupt_while_the_hidden_folder_is_created(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    lock = destination._lock
    interruptions = iter([interrupted])
    monkeypatch.setattr(destination, "_lock", lambda folder: next(interruptions, lock)(folder))
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_hidden_folder_of_another_process_is_not_a_leftover(tmp_path, monkeypatch):
    """The other process finishes and begins again, after this process has opened its first hidden folder."""
    partial, opened = tmp_path / ".other.sega-jax-partial", destination._opened
    partial.mkdir()

    def early(folder):
        descriptor = opened(folder)
        if folder == partial and not (tmp_path / "other").exists():
            partial.rename(tmp_path / "other")
            partial.mkdir()
            (partial / "half").touch()
        return descriptor

    monkeypatch.setattr(destination, "_opened", early)
    with atomic_folder(tmp_path / "folder"):
        pass
    assert (partial / "half").exists()


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path):
    with (
        atomic_folder(tmp_path / "folder"),
        pytest.raises(FileExistsError, match=r"another process is writing to .*folder; wait until it has finished"),
        atomic_folder(tmp_path / "folder"),
    ):
        pass
    assert (tmp_path / "folder").is_dir()
