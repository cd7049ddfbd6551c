"""Terminal output: progress bars, and short warnings and errors for commands."""

import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar, cast

from sega_jax.method.naming import Option, as_options
from sega_jax.pipelines.compiling import compiling_shown
from sega_jax.pipelines.interrupts import reliable_interrupts

_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
T = TypeVar("T")
# {argument of the library: the commands' parameter with the same meaning but another name}.
_SAME = {"source": "model", "stage1": "model", "clean": "clean_captions", "fixed": "where"}
_style: ContextVar[Any] = ContextVar("style", default=MappingProxyType({}))
_in_command: ContextVar[bool] = ContextVar("in_command", default=False)


@contextmanager
def bar(total: int, unit: str, progress: bool | None, **options: Any) -> Iterator[Any]:
    """Shows a tqdm progress bar during a `with` block. While a program compiles, the bar shows for how long.

    Without a terminal, commands write one line if a program compiles.

    Args:
        total: The total number of units.
        unit: The name of a unit.
        progress: Whether to show the bar; None shows it in terminals and notebooks.
        options: Further options for tqdm.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in notebooks without widgets, tqdm emits a warning and shows a plain bar
        from tqdm.auto import tqdm
    is_live = "ipykernel" in sys.modules or sys.stderr.isatty()
    is_shown = is_live if progress is None else progress
    with ExitStack() as stack:
        one = stack.enter_context(
            tqdm(**{"total": total, "unit": unit, **options, **_style.get()}, disable=not is_shown)
        )
        if is_shown or (progress is None and _in_command.get()):
            stack.enter_context(compiling_shown(one if is_shown else None))
        yield one


def counted(items: Iterable[T], verb: str, total: int | None = None) -> Iterator[T]:
    """Yields items. In commands, a bar counts them in terminals if they take more than a second.

    Args:
        items: The items.
        verb: The description of the bar, such as "planning".
        total: The number of items; None means `len(items)`.
    """
    total = len(cast(Sized, items)) if total is None else total
    options = {"desc": verb, "leave": False, "delay": 1.0}
    with bar(total, "point", None if _in_command.get() else False, **options) as shown:
        for item in items:
            yield item
            shown.update(1)


@contextmanager
def styled(**options: Any) -> Iterator[None]:
    """Sets tqdm options, such as `desc` and `leave`, for the bars inside a `with` block."""
    token = _style.set({**_style.get(), **options})
    try:
        yield
    finally:
        _style.reset(token)


def printable(text: str) -> str:
    """Replaces a text's control characters, which could change the terminal, with escape sequences. Line breaks and
    tabs are kept.

    Example:
        >>> from sega_jax.pipelines.progress import printable
        >>> print(printable("a" + chr(27) + "[31mcat"))
        a\\x1b[31mcat
    """
    return "".join(_escaped(ord(c)) if _changes_terminals(c) else c for c in text)


def _changes_terminals(c: str) -> bool:
    """Returns whether a character is a control character (except line breaks and tabs), a surrogate, a line separator,
    or a control of the writing direction."""
    return (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t") or c in _DIRECTIONS


def _escaped(code: int) -> str:
    # In bash, \x stands for a byte, whereas \u and \U stand for a character.
    return f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


@contextmanager
def plainly() -> Iterator[None]:
    """Runs a command in a `with` block: shows warnings as single lines, and errors as messages without a traceback.

    Messages name arguments as the options of the click command that runs.
    """
    import click  # only needed on the command line

    with warnings.catch_warnings(), as_options(_options(click.get_current_context(silent=True))):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {printable(str(message))}", err=True)
        token = _in_command.set(True)
        try:
            with reliable_interrupts():
                yield
        except (ValueError, TypeError, OSError, MemoryError, FloatingPointError, ImportError) as error:
            raise click.ClickException(printable(str(error))) from error
        except KeyboardInterrupt:
            click.echo("Aborted!", err=True)
            sys.stdout.flush()
            sys.stderr.flush()
            # A normal exit would crash, because an interrupted compilation is still running in its thread.
            os._exit(130)
        finally:
            _in_command.reset(token)


def _options(context: Any) -> dict[str, Option]:
    """Returns {argument: option} for the command in a click context."""
    options = {}
    for one in [] if context is None else context.command.get_params(context):
        is_option = one.opts[0].startswith("-")
        off = one.secondary_opts[0] if one.secondary_opts else ""
        options[one.name] = Option(max(one.opts, key=len), off) if is_option else Option(one.name.upper())
    same = {argument: options[name] for argument, name in _SAME.items() if name in options}
    return same | options
