"""Helpers that the shell commands share: printed text and JSON, output folders, the compilation cache, and the time
spent compiling."""

import json
import math
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click
import jax
import jax.monitoring

from sega_jax import __version__
from sega_jax.pipelines.progress import printable
from sega_jax.pipelines.run import PictureWarning


def echo(text: str) -> None:
    """Prints a text. Control characters from prompts, metadata and file names are escaped."""
    click.echo(printable(text))


def json_option(keys: str) -> Callable[[Any], Any]:
    """Returns the option --json of a command, as a decorator.

    Args:
        keys: the keys of the document, as text for the help page.
    """
    help = f"Print one JSON document, and all other text on standard error. Its keys are {keys}."
    return click.option("--json", "as_json", is_flag=True, help=help)


@contextmanager
def json_on_stdout(wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Reserves standard output for a JSON document if one is wanted. Other text then goes to standard error.

    Yields:
        A function that prints the document if it is wanted.
    """
    if not wanted:
        yield lambda document: None
        return
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield lambda document: click.echo(as_json(document), file=stdout)


def as_json(value: Any) -> str:
    """Returns a value as strictly valid JSON in ASCII. NaN and infinity become null, and all characters other than
    printable ASCII are escaped.

    Example:
        >>> from sega_jax.cli.terminal import as_json
        >>> print(as_json({"seconds": float("nan"), "prompt": "caf" + chr(233)}))
        {
          "seconds": null,
          "prompt": "caf\\u00e9"
        }
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False).replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quoted(words: Iterable[str]) -> str:
    """Returns a shell command of words. Words with control characters are quoted in bash's $'...' form."""
    return " ".join(_shell_word(word) for word in words)


def _shell_word(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def writable(folder: Path) -> Path:
    """Checks that files can be written to a folder, or to the nearest existing parent of a missing folder.

    Returns:
        The folder, which may be missing.

    Raises:
        ValueError: the folder is not writable.
    """
    try:
        _check_writable(folder)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written to ({error.strerror}); choose a different folder") from None
    return folder


def _check_writable(folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except FileNotFoundError:
        if folder.is_symlink() or folder == folder.parent:  # a link to a missing folder, or the last parent
            raise
        _check_writable(folder.parent)


def versions(device: str) -> dict[str, str]:
    """Returns the device and the software versions, as they are stored in pictures."""
    return {"device": device, "sega_jax": __version__, "jax": jax.__version__}


def remember_compilations() -> None:
    """Caches compiled programs on disk, unless JAX is already configured with a cache."""
    # mypy does not know JAX's options, which JAX adds to this object at run time.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "sega_jax" / "xla"))


@contextmanager
def pictures_reported_elsewhere() -> Iterator[None]:
    """Hides warnings about missing and black pictures, because these warnings name rows of a batch instead of seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        yield


@contextmanager
def compilations() -> Iterator[Any]:
    """Measures the time spent on tracing and compiling, and on reading compiled programs from the cache.

    Yields:
        A function that returns the time measured so far, in seconds.
    """
    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((time.perf_counter() - duration_secs, time.perf_counter()))

    def seconds() -> float:
        total, reached = 0.0, 0.0
        for start, end in sorted(spans):
            total += max(end - max(start, reached), 0)
            reached = max(reached, end)
        return total

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
