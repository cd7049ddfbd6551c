"""What the commands of the shell share: mistakes as messages, compilations that are remembered, places to write."""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from sega_jax import __version__
from sega_jax.pipelines.run import PictureWarning


def writable(folder: Path) -> Path:
    """The folder, made if need be and tried, so that no picture is lost for want of a place.

    Raises:
        ValueError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written to ({error.strerror}); name another folder") from None
    return folder


def versions(device: str) -> dict[str, str]:
    return {"device": device, "sega_jax": __version__, "jax": jax.__version__}


def remember_compilations() -> None:
    """Keeps compiled programs from run to run, unless JAX was told where to keep them."""
    # JAX adds its options to this object at run time.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "sega_jax" / "xla"))


@contextmanager
def pictures_reported_elsewhere() -> Iterator[None]:
    """Hides the library's warnings about missing and black pictures, which count the rows of a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        yield


@contextmanager
def compilations() -> Iterator[Any]:
    """Counts the seconds in which something was traced or compiled (or read from the cache)."""
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
