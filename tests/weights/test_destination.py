"""Tests that files and folders appear only when they are complete."""

import errno
import subprocess
import sys
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
    with suppress(ValueError), new_folder(tmp_path / "old" / "new" / "folder"):
        assert (tmp_path / "old" / "new" / "folder").is_dir()
        if not succeeds:
            raise ValueError
        (tmp_path / "old" / "new" / "file").touch()
    assert sorted(tmp_path.rglob("*")) == [
        tmp_path / "old",
        *[tmp_path / "old/new", tmp_path / "old/new/file"] * succeeds,
    ]


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
