"""Names of arguments in messages: Python's names, or the options of the shell command that runs."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

# The maximum number of characters that a message shows of a value, and of a string, which may be a path.
_MOST, _MOST_OF_STRINGS = 80, 250
_OPTION = re.compile(r"--[a-z0-9-]+")


class Option(NamedTuple):
    """An option of a shell command, such as "--share"."""

    name: str
    off: str = ""  # the option that turns a flag off, such as "--no-share"


_options: ContextVar[Mapping[str, Option] | None] = ContextVar("options", default=None)
_stage: ContextVar[str] = ContextVar("stage", default="")


def name_of(argument: str) -> str:
    """Returns the name of an argument for a message: the shell command's option if a command with such an option runs,
    otherwise the name in Python.

    Example:
        >>> from sega_jax.method.naming import Option, as_options, name_of
        >>> name_of("guidance_scale")
        'guidance_scale'
        >>> with as_options({"guidance_scale": Option("--guidance-scale")}):
        ...     name_of("guidance_scale")
        '--guidance-scale'
    """
    option = _option(argument)
    return _in_python(argument) if option is None else option.name


def assignment(argument: str, value: Any) -> str:
    """Returns an argument and its value for a message, in the spelling of Python or of the shell command that runs.

    Long values are shortened.

    Args:
        argument: The argument's name, an option such as "--steps", or a label such as "[call]: steps".
        value: Its value.

    Example:
        >>> from sega_jax.method.naming import Option, as_options, assignment
        >>> assignment("dtype", "float32")
        "dtype='float32'"
        >>> with as_options({"dtype": Option("--dtype"), "share": Option("--share", "--no-share")}):
        ...     print(assignment("dtype", "float32"), assignment("share", False))
        --dtype float32 --no-share
    """
    option = _option(argument)
    if option is None:
        shown = _shortened(repr(value), _MOST_OF_STRINGS) if isinstance(value, str) else brief(value)
        return f"{_in_python(argument)}={shown}"
    if value is True or (value is False and option.off):
        return option.name if value else option.off
    return f"{option.name} {_shell_text(value)}"


def brief(value: Any) -> str:
    """Returns the value's repr, shortened to at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python cannot print integers with more than 4300 digits
        text = f"<{type(value).__name__}>"
    return _shortened(text, _MOST)


def in_python(text: str) -> str:
    """Returns a part of a message that only makes sense in Python, such as the name of an attribute; "" in the
    shell."""
    return text if _options.get() is None else ""


@contextmanager
def as_options(options: Mapping[str, Option]) -> Iterator[None]:
    """Names arguments as options of a shell command inside a `with` block.

    Args:
        options: {argument: option} for the command's options. Other arguments keep their names.
    """
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


@contextmanager
def of_stage(stage: str) -> Iterator[None]:
    """Names arguments of a stage of a cascade inside a `with` block, such as "stage2's steps" or "--stage2-steps"."""
    token = _stage.set(stage)
    try:
        yield
    finally:
        _stage.reset(token)


def _option(argument: str) -> Option | None:
    if _OPTION.fullmatch(argument):
        return Option(argument)
    options, stage = _options.get() or {}, _stage.get()
    names = [f"{stage}_{argument}", *([stage] if argument == "source" else []), argument]
    return next((options[name] for name in names if name in options), None)


def _in_python(argument: str) -> str:
    return f"{_stage.get()}'s {argument}" if _stage.get() and argument.isidentifier() else argument


def _shell_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(map(_shell_text, value))
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")
    if isinstance(value, str | os.PathLike):
        return shlex.quote(_shortened(str(value), _MOST_OF_STRINGS))
    return brief(value)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
