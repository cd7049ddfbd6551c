"""Tests the checks of the files that commands write."""

import os
import re
import threading

import click
import pytest
from click.testing import CliRunner

from sega_jax.cli.named_files import check_names, out_option, write


def test_all_existing_files_are_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    check_names(paths, force=False)
    for path in paths[1:]:
        path.touch()
    with pytest.raises(ValueError, match=re.escape(f"{paths[1]}, {paths[2]}, ")) as error:
        check_names(paths, force=False)
    assert str(error.value).endswith(
        "and 2 more exist; add --force to replace them, or choose a different name with --out"
    )
    check_names(paths, force=True)


def test_links_are_existing_files(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"link\.png exists; add --force to replace it"):
        check_names([tmp_path / "link.png"], force=False)


@pytest.mark.parametrize("force", [False, True])
def test_the_folder_must_exist(tmp_path, force):
    with pytest.raises(ValueError, match=r"a\.png cannot be written, because .* is not a folder; create it"):
        check_names([tmp_path / "no" / "a.png"], force)


def test_pipes_are_written_without_force(tmp_path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    check_names([pipe], force=False)
    write(pipe, b"data", force=False)
    reader.join()
    assert received == [b"data"]


def named(*words):
    """Returns the output of a command that prints the file name in its option --out."""

    @click.command()
    @out_option("page.html", "The file.")
    def command(out):
        click.echo(out, nl=False)

    return CliRunner().invoke(command, list(map(str, words))).output


def test_names_without_an_extension_get_that_of_the_default(tmp_path):
    assert named() == "page.html"
    given = ["a", "a.png", "b.c/a", ".a"]
    assert [named("--out", one) for one in given] == ["a.html", "a.png", "b.c/a.html", ".a.html"]
    os.mkfifo(tmp_path / "pipe")
    assert named("--out", tmp_path / "pipe") == str(tmp_path / "pipe")
    assert "Invalid value for '--out': it is empty; give a path" in named("--out", "")
    assert "A name without an extension gets .html." in " ".join(named("--help").split())


def test_a_file_that_appears_during_the_work_is_kept(tmp_path):
    path = tmp_path / "a.png"
    check_names([path], force=False)
    path.write_text("other")
    with pytest.raises(FileExistsError):
        write(path, b"data", force=False)
    assert path.read_text() == "other"
    write(path, b"data", force=True)
    assert path.read_bytes() == b"data"
    assert [one.name for one in tmp_path.iterdir()] == ["a.png"]
