"""Terminal output: progress bars, and short warnings and errors for commands."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

_style: ContextVar[Any] = ContextVar("style", default=MappingProxyType({}))


def bar(total: int, unit: str, progress: bool | None, **options: Any) -> Any:
    """Creates a tqdm progress bar.

    Args:
        total: The total number of units.
        unit: The name of a unit.
        progress: Whether to show the bar; None shows it in terminals and notebooks.
        options: Further options for tqdm.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in notebooks without widgets, tqdm emits a warning and shows a plain bar
        from tqdm.auto import tqdm
    shown = ("ipykernel" in sys.modules or sys.stderr.isatty()) if progress is None else progress
    return tqdm(**{"total": total, "unit": unit, **options, **_style.get()}, disable=not shown)


@contextmanager
def styled(**options: Any) -> Iterator[None]:
    """Sets tqdm options, such as `desc` and `leave`, for the bars inside a `with` block."""
    token = _style.set(options)
    try:
        yield
    finally:
        _style.reset(token)


@contextmanager
def plainly() -> Iterator[None]:
    """Shows the warnings in a `with` block as single lines, and errors as messages without a traceback."""
    import click  # only needed on the command line

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {message}", err=True)
        try:
            yield
        except (ValueError, TypeError, OSError, MemoryError, FloatingPointError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Aborted!", err=True)
            sys.stdout.flush()
            sys.stderr.flush()
            # A normal exit would crash, because an interrupted compilation is still running in its thread.
            os._exit(130)
