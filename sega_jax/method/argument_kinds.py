"""The kinds of argument values. A kind checks values, reads them from the command line and stores them in tables."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.method.checks import check_bool, check_choice, check_float, check_int, is_sequence
from sega_jax.method.naming import assignment

_HUGE = 2**20


class Kind:
    """The type and range of an argument's values.

    Subclasses define how values are checked, read from the command line and stored in tables. The base class accepts
    any value.

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

    column = "string"  # the column's type in a table of records
    metavar = "TEXT"  # the placeholder for the value in the command-line help
    shell_hint = ""  # a sentence that explains how to write the shell option; it follows the help text
    flag_value: str | None = None  # the value to use if the option is given alone; None if a value is required
    of_files = False  # whether the values are file names
    range = ""  # the values' range for the command-line help, such as "0 to 1"; empty if there is none

    @property
    def noun(self) -> str:
        """A description of the values for documentation and error messages; subclasses may define it as a plain
        attribute.
        """
        return "a value"

    def check(self, name: str, value: Any) -> Any:
        """Returns the checked value, converted to the type that the library uses.

        Args:
            name: The argument's name; error messages start with it.

        Raises:
            TypeError, ValueError: The value has the wrong type or is out of range.
        """
        return value

    def check_one(self, name: str, value: Any) -> Any:
        """Checks a value for a sweep. The value must apply to a single picture and be of a type that a table can store.

        Raises:
            TypeError, ValueError: See `check`.
        """
        return self.check(name, value)

    def located(self, name: str, value: Any, folder: Path) -> Any:
        """Returns a value with its relative paths resolved against `folder`, the folder of the file that contains the
        value.

        Raises:
            TypeError, ValueError: See `check`.
        """
        return value

    def files(self, value: Any) -> list[str]:
        """Returns the paths in a value that `check_one` returned."""
        return []

    def label(self, value: Any) -> Any:
        """Returns a label for a value, for sheets and plots. File names are shown without their folders."""
        return value

    def known(self, path: str) -> dict[str, Any]:
        """Reads a file and returns the facts that plans store about it: its SHA-256 and, for a picture, its height and
        width.

        Raises:
            FileNotFoundError, ValueError: The file does not exist or cannot be read.
        """
        raise NotImplementedError

    def several(self, value: Any) -> bool:
        """Returns whether a value is a sequence with one entry for each prompt or picture."""
        return is_sequence(value) or getattr(value, "ndim", 0) == 1

    def parse(self, name: str, text: str) -> Any:
        """Reads and checks a value from the command line.

        Raises:
            TypeError, ValueError: See `check`.
        """
        return self.check(name, text)

    def show(self, value: Any) -> str:
        """Returns a value as text that `parse` can read."""
        return repr(value) if isinstance(value, float) else str(value)

    def columns(self, name: str) -> dict[str, str]:
        """Returns the names and types of the table columns that store the argument."""
        return {name: self.column}

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        """Returns a value's entries in the argument's columns, as {column: entry}."""
        return {name: value}


def _range(low: float, high: float) -> str:
    """Describes a range for help pages. Upper ends that no sensible value reaches are omitted."""
    if low == -math.inf:
        return ""
    return f"{low} to {high}" if high < _HUGE else f"at least {low}"


@dataclasses.dataclass(frozen=True)
class Integer(Kind):
    """Integers in [low, high].

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
        return (
            f"a whole number from {self.low} to {self.high}"
            if self.high < math.inf
            else f"a whole number of at least {self.low}"
        )

    @property
    def range(self) -> str:  # type: ignore[override]
        return _range(self.low, self.high)

    def check(self, name: str, value: Any) -> int:
        return check_int(name, value, self.low, self.high)

    def parse(self, name: str, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{assignment(name, text)} should be {self.noun}") from None
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
    hint: str = ""  # a remedy that is appended to error messages
    column = "float64"
    metavar = "NUMBER"

    @property
    def noun(self) -> str:
        if self.low == -math.inf:
            return "a number"
        return f"a number in [{self.low}, {self.high}]" if self.high < math.inf else f"a number of at least {self.low}"

    @property
    def range(self) -> str:  # type: ignore[override]
        return _range(self.low, self.high)

    def check(self, name: str, value: Any) -> float:
        try:
            return check_float(name, value, self.low, self.high)
        except ValueError as error:
            raise ValueError(f"{error}; {self.hint}" if self.hint else str(error)) from None

    def parse(self, name: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{assignment(name, text)} should be {self.noun}") from None
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
    """A string.

    Example:
        >>> from sega_jax import Words
        >>> Words().check("variant", "fp16")
        'fp16'
    """

    noun = "a string"

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{assignment(name, value)} should be a string")
        return value


@dataclasses.dataclass(frozen=True)
class Pair(Kind):
    """Two numbers of the same kind. If `alone` is true, a single number is used for both.

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

    @property
    def range(self) -> str:  # type: ignore[override]
        return self.of.range

    def check(self, name: str, value: Any) -> tuple[Any, Any]:
        pair = value.tolist() if isinstance(value, np.ndarray) and value.ndim else value
        if self.alone and not isinstance(pair, list | tuple):
            pair = (pair, pair)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise (TypeError if not self.alone else ValueError)(f"{assignment(name, value)} should be {self.noun}")
        first, second = (self.of.check(name, number) for number in pair)
        return first, second

    def several(self, value: Any) -> bool:
        entries = value.tolist() if isinstance(value, np.ndarray) else value
        return isinstance(entries, list | tuple) and any(isinstance(entry, list | tuple) for entry in entries)

    def parse(self, name: str, text: str) -> tuple[Any, Any]:
        parts = text.split(",")
        if len(parts) not in ((1, 2) if self.alone else (2,)):
            example = "64,32" if isinstance(self.of, Integer) else "1.2,0.2"
            raise ValueError(f"{assignment(name, text)} should be {self.noun}, such as {example}")
        return self.check(name, tuple(self.of.parse(name, part) for part in parts * (3 - len(parts))))

    def show(self, value: Any) -> str:
        return ",".join(map(self.of.show, value))

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        return {name: None if value is None else self.show(value)}


@dataclasses.dataclass(frozen=True)
class Opaque(Kind):
    """Values such as arrays, which the library checks elsewhere and the command line cannot read."""

    noun: str = "a value"
