"""Collects warnings during a call and emits each once, pointing to the line of the user's code that made the call."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_ignored: ContextVar[tuple[type[Warning], ...]] = ContextVar("ignored", default=())
_collected: ContextVar[dict[tuple[str, type[Warning]], None] | None] = ContextVar("collected", default=None)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Emits a warning when the surrounding `collected` block ends, or immediately if there is no such block."""
    messages = _collected.get()
    if issubclass(category, _ignored.get()):
        return
    if messages is None:
        warnings.warn(message, category, stacklevel=_level())
    else:
        messages[message, category] = None


@contextmanager
def collected() -> Iterator[None]:
    """Emits each distinct warning from a `with` block once, when the outermost block ends, even after an error.

    Warnings from other threads are also collected if these threads run in a copy of this thread's context
    (`contextvars.copy_context`).
    """
    if _collected.get() is not None:
        yield
        return
    messages: dict[tuple[str, type[Warning]], None] = {}
    token = _collected.set(messages)
    try:
        yield
    finally:
        _collected.reset(token)
        for message, category in messages:
            warnings.warn(message, category, stacklevel=_level())


@contextmanager
def muted() -> Iterator[None]:
    """Suppresses warnings that are emitted through `warn` inside a `with` block."""
    token = _collected.set({})
    try:
        yield
    finally:
        _collected.reset(token)


@contextmanager
def ignored(category: type[Warning]) -> Iterator[None]:
    """Suppresses warnings of a category that are emitted through `warn` inside a `with` block."""
    token = _ignored.set((*_ignored.get(), category))
    try:
        yield
    finally:
        _ignored.reset(token)


def _level() -> int:
    """Returns the `stacklevel` that makes the caller's warning point to the first line outside the library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) and not name.endswith("contextlib.py"):
            break
        frame, level = frame.f_back, level + 1
    return level
