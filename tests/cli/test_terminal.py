"""Tests of the helpers that the shell commands share."""

import pytest

from sega_jax.cli.terminal import writable


def test_a_folder_is_checked_without_creating_it(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        assert writable(folder) == folder
    assert not list(tmp_path.iterdir())


def test_unwritable_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/below/folder", "link", "link/folder", "x" * 300):
        with pytest.raises(ValueError, match=r"--out .* cannot be written to \(.*\); choose a different folder"):
            writable(tmp_path / name)
