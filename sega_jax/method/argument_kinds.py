"""The kinds of values that arguments take: how a value is checked, read from the shell, and kept in tables."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.method.checks import brief, check_bool, check_choice, check_float, check_int, is_sequence


class Kind:
    """What values an argument takes. A subclass states the checks, and how values are read from the shell and kept in
    tables.

    Example:
        >>> from sega_jax import Kind
        >>> class Even(Kind):
        ...     noun = "an even number"
        ...
        ...     def check(self, name, value):
        ...         if value % 2:
        ...             raise ValueError(f"{name}={value} should be even")
        ...         return value
        >>> Even().check("legs", 4)
        4
    """

    column = "string"  # the type in a table of records
    metavar = "TEXT"  # of the shell option
    shell_hint = ""  # a sentence about how the shell option is written, after its help text
    flag_value: str | None = None  # what the shell option means without a value; None where it needs one
    of_files = False  # whether values name files

    @property
    def noun(self) -> str:
        """The values in words, for documentation; a subclass may have a plain attribute instead."""
        return "a value"

    def check(self, name: str, value: Any) -> Any:
        """Returns the value as the library uses it.

        Raises:
            TypeError, ValueError: the value is of another type or out of range; the message begins with `name`.
        """
        return value

    def check_one(self, name: str, value: Any) -> Any:
        """As `check`, but refuses what stands for several pictures, or for what no table can keep; for sweeps.

        Raises:
            TypeError, ValueError: as `check`.
        """
        return self.check(name, value)

    def located(self, name: str, value: Any, folder: Path) -> Any:
        """Returns a value that a file in a folder gives, in which relative paths start from that folder.

        Raises:
            TypeError, ValueError: as `check`.
        """
        return value

    def files(self, value: Any) -> list[str]:
        """Returns the paths in a value that `check_one` returned."""
        return []

    def label(self, value: Any) -> Any:
        """Returns the label of a value in sheets and plots. Files are named without their folders."""
        return value

    def known(self, path: str) -> dict[str, Any]:
        """Returns what plans keep of a file, which is read: its SHA-256, and of a picture its height and width.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it cannot be read.
        """
        raise NotImplementedError

    def several(self, value: Any) -> bool:
        """Tells whether a value is a sequence with one entry for each prompt or picture."""
        return is_sequence(value) or getattr(value, "ndim", 0) == 1

    def parse(self, name: str, text: str) -> Any:
        """Reads a value from the shell's text and checks it.

        Raises:
            TypeError, ValueError: as `check`.
        """
        return self.check(name, text)

    def show(self, value: Any) -> str:
        """Writes a value as `parse` reads it."""
        return repr(value) if isinstance(value, float) else str(value)

    def columns(self, name: str) -> dict[str, str]:
        """Returns the columns that keep the argument in a table, with their types."""
        return {name: self.column}

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        """Returns what these columns hold for a value."""
        return {name: value}


@dataclasses.dataclass(frozen=True)
class Integer(Kind):
    """Whole numbers in [low, high].

    Example:
        >>> from sega_jax import Integer
        >>> Integer(1, 9).check("steps", 10)
        Traceback (most recent call last):
        ValueError: steps=10 should be from 1 to 9
    """

    low: float = -math.inf
    high: float = math.inf
    column = "int64"
    metavar = "INTEGER"

    @property
    def noun(self) -> str:
        if self.low == -math.inf:
            return "a whole number"
        return f"a whole number from {self.low} to {self.high}" if self.high < math.inf else f"at least {self.low}"

    def check(self, name: str, value: Any) -> int:
        return check_int(name, value, self.low, self.high)

    def parse(self, name: str, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} should be a whole number") from None
        return self.check(name, number)


@dataclasses.dataclass(frozen=True)
class Real(Kind):
    """Finite numbers in [low, high].

    Example:
        >>> from sega_jax import Real
        >>> Real(0, 1).check("strength", 0.5)
        0.5
        >>> Real(0, 1).noun
        'a number in [0, 1]'
    """

    low: float = -math.inf
    high: float = math.inf
    hint: str = ""  # a remedy, at the end of errors
    column = "float64"
    metavar = "NUMBER"

    @property
    def noun(self) -> str:
        if self.low == -math.inf:
            return "a number"
        return f"a number in [{self.low}, {self.high}]" if self.high < math.inf else f"at least {self.low}"

    def check(self, name: str, value: Any) -> float:
        try:
            return check_float(name, value, self.low, self.high)
        except ValueError as error:
            raise ValueError(f"{error}; {self.hint}" if self.hint else str(error)) from None

    def parse(self, name: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} should be a number") from None
        return self.check(name, number)


class Flag(Kind):
    """True or False.

    Example:
        >>> from sega_jax import Flag
        >>> Flag().parse("tiled", "true")
        True
    """

    noun = "True or False"
    column = "bool"

    def check(self, name: str, value: Any) -> bool:
        return check_bool(name, value)

    def parse(self, name: str, text: str) -> bool:
        return check_choice(name, text, ("true", "false")) == "true"

    def show(self, value: Any) -> str:
        return "true" if value else "false"


class Choice(Kind):
    """One of several names.

    Example:
        >>> from sega_jax import Choice
        >>> Choice("pil", "latent").check("output", "pil")
        'pil'
    """

    def __init__(self, *names: str):
        self.names = names

    @property
    def noun(self) -> str:
        *others, last = (f'"{name}"' for name in self.names)
        return f"{', '.join(others)} or {last}" if others else last

    def check(self, name: str, value: Any) -> str:
        return check_choice(name, value, self.names)


class Words(Kind):
    """Text in words.

    Example:
        >>> from sega_jax import Words
        >>> Words().check("variant", "fp16")
        'fp16'
    """

    noun = "words"

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name}={brief(value)} should be words")
        return value


@dataclasses.dataclass(frozen=True)
class Pair(Kind):
    """Two numbers of one kind; with `alone`, one number stands for both.

    Example:
        >>> from sega_jax import Integer, Pair
        >>> Pair(Integer(1)).parse("size", "64,32")
        (64, 32)
        >>> Pair(Integer(1), alone=True).check("size", 64)
        (64, 64)
    """

    of: Kind
    noun: str = "two numbers"
    alone: bool = False
    metavar = "A,B"

    def check(self, name: str, value: Any) -> tuple[Any, Any]:
        pair = value.tolist() if isinstance(value, np.ndarray) and value.ndim else value
        if self.alone and not isinstance(pair, list | tuple):
            pair = (pair, pair)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise (TypeError if not self.alone else ValueError)(f"{name}={brief(value)} should be {self.noun}")
        first, second = (self.of.check(name, one) for one in pair)
        return first, second

    def several(self, value: Any) -> bool:
        entries = value.tolist() if isinstance(value, np.ndarray) else value
        return isinstance(entries, list | tuple) and any(isinstance(one, list | tuple) for one in entries)

    def parse(self, name: str, text: str) -> tuple[Any, Any]:
        parts = text.split(",")
        if len(parts) not in ((1, 2) if self.alone else (2,)):
            raise ValueError(f"{name}={text!r} should be {self.noun}, as 1.2,0.2")
        return self.check(name, tuple(self.of.parse(name, part) for part in parts * (3 - len(parts))))

    def show(self, value: Any) -> str:
        return ",".join(map(self.of.show, value))

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        return {name: None if value is None else self.show(value)}


@dataclasses.dataclass(frozen=True)
class Opaque(Kind):
    """Values that the library checks elsewhere, such as arrays; they have no text of their own."""

    noun: str = "a value"
