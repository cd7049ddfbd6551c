"""Checks and writes files whose names the user gives. A command checks the names before it begins its work."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from sega_jax.weights.destination import write_file

force_option = click.option("--force", is_flag=True, help="Replace files that already exist.")


def out_option(default: str, help: str) -> Any:
    """Returns the --out option of a command that writes a file. A name without an extension gets the default's."""
    extension = Path(default).suffix

    def complete(ctx: click.Context, parameter: click.Parameter, path: Path) -> Path:
        if not path.name:
            raise click.BadParameter("it is empty; give a path", ctx, parameter)
        return path if path.suffix or _is_device(path) else path.with_name(f"{path.name}{extension}")

    return click.option(
        "--out",
        default=default,
        show_default=True,
        type=click.Path(path_type=Path, dir_okay=False),
        callback=complete,
        help=f"{help} A name without an extension gets {extension}.",
    )


def check_names(paths: Iterable[Path], force: bool) -> None:
    """Checks that files with these names may be written.

    Args:
        paths: the files.
        force: whether existing files may be replaced.

    Raises:
        ValueError: a file exists and `force` is false, or its folder does not exist.
    """
    paths = list(paths)
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(
                f"--out {path} cannot be written, because {path.parent} is not a folder; create it, or choose another"
            )
    existing = [str(path) for path in paths if os.path.lexists(path) and not _is_device(path)]
    if existing and not force:
        listed = ", ".join(existing[:5]) + (f" and {len(existing) - 5} more" if len(existing) > 5 else "")
        raise ValueError(
            f"{listed} {'exists' if len(existing) == 1 else 'exist'}; add --force to replace"
            f" {'it' if len(existing) == 1 else 'them'}, or choose a different name with --out"
        )


def write(path: Path, data: bytes, force: bool) -> None:
    """Writes a file completely or not at all.

    Args:
        path: the file, which may be a device such as /dev/stdout.
        data: its content.
        force: whether an existing file may be replaced.

    Raises:
        FileExistsError: the file exists and `force` is false.
        OSError: the file cannot be written, for example because the disk is full.
    """
    write_file(path, data, replace=force or _is_device(path))


def _is_device(path: Path) -> bool:
    """Returns whether a path is a device or a pipe, which writing does not replace."""
    return path.exists() and not path.is_file() and not path.is_dir()
