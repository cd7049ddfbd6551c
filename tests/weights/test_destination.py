"""Tests that files and folders appear only when they are complete."""

import errno
from pathlib import Path

import pytest

from sega_jax.weights.destination import atomic_folder, write_file


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
