"""What a terminal shows while commands run: a progress bar, warnings as lines, and mistakes as messages."""

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
    """A tqdm bar with its options; None shows it in terminals and notebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets gets the plain bar
        from tqdm.auto import tqdm
    shown = ("ipykernel" in sys.modules or sys.stderr.isatty()) if progress is None else progress
    return tqdm(**{"total": total, "unit": unit, **options, **_style.get()}, disable=not shown)


@contextmanager
def styled(**options: Any) -> Iterator[None]:
    """Gives the bars of a block these options of tqdm, such as `desc` and `leave`."""
    token = _style.set(options)
    try:
        yield
    finally:
        _style.reset(token)


@contextmanager
def plainly() -> Iterator[None]:
    """Warnings as lines, mistakes as messages without a traceback."""
    import click  # of no use outside the shell

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
            # An interrupted compilation goes on in its thread, and an ordinary exit would crash on it.
            os._exit(130)
