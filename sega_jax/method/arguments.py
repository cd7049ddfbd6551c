"""How arguments are declared: once, as the fields of a frozen dataclass.

    @dataclass(frozen=True, kw_only=True, eq=False)
    class MyCall(Call):
        wobble: float = argument(0.0, Real(0, 1), "how far pictures tremble", varies="row", sweep=True, shell=True)

Validation, documentation, signatures, shell options, axes of sweeps, metadata of pictures and columns of records are
derived from such fields.
"""

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from sega_jax.method.argument_kinds import Kind

P = ParamSpec("P")
S = TypeVar("S")
D = TypeVar("D")
R = TypeVar("R")


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclasses.dataclass(frozen=True)
class Argument:
    """The declaration of one argument.

    Attributes:
        kind: its type and range.
        help: what it does, a phrase in lower case without a final stop.
        unit: of its values, such as "pixels".
        varies: "row" where each picture of a batch may have its own value; "call" where a batch has one; "program"
            where another value is another compiled program.
        sweep: whether a sweep may vary it.
        shell: whether the shell has an option for it.
        of_edits: whether pictures without edits do not depend on it.
        of_text: whether it says how texts are read.
        of_negative: whether such an argument also says how negative prompts are read.
        later: whether it came after pictures of sweeps had been named by the other arguments; names leave it out at its
            default, so that pictures on disk keep theirs.
        name, default: as the dataclass says; REQUIRED for no default.

    Example:
        >>> from sega_jax import Argument, Real
        >>> strength = Argument(Real(0, 1), "how far the picture changes", name="strength", default=0.8, shell=True)
        >>> strength.option
        '--strength'
        >>> strength.documentation
        'How far the picture changes. A number in [0, 1]. Default: 0.8.'
    """

    kind: Kind
    help: str
    unit: str = ""
    varies: Literal["row", "call", "program"] = "call"
    sweep: bool = False
    shell: bool = False
    of_edits: bool = False
    of_text: bool = False
    of_negative: bool = True
    later: bool = False
    name: str = ""
    default: Any = REQUIRED

    @property
    def option(self) -> str:
        """The name of the shell option."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, name: str | None = None) -> Any:
        """Returns the value as the library uses it, or a list of such values where each row has its own.

        Raises:
            TypeError, ValueError: the value is not of this kind.
        """
        name = name or self.name
        if value is None and self.default is None:
            return None
        if self.varies == "row" and self.kind.several(value):
            return [self.kind.check(name, one) for one in value]
        return self.kind.check(name, value)

    @property
    def documentation(self) -> str:
        """A sentence or two about the argument."""
        parts = [f"{self.help[:1].upper()}{self.help[1:]}"]
        noun = f"{self.kind.noun} in {self.unit}" if self.unit else self.kind.noun
        parts += [] if noun == "a value" else [f"{noun[:1].upper()}{noun[1:]}"]
        parts += ["One for all pictures, or one for each prompt or picture"] if self.varies == "row" else []
        if self.default is not REQUIRED and self.default not in (None, ()):
            parts.append(f"Default: {self.default!r}")
        return ". ".join(parts) + "."


def argument(default: Any, kind: Kind, help: str, **declared: Any) -> Any:
    """Declares a field of a dataclass as an argument; `declared` are the further attributes of `Argument`.

    Example:
        >>> import dataclasses
        >>> from sega_jax import Call, Integer, argument
        >>> @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
        ... class MyCall(Call):
        ...     humps: int = argument(1, Integer(1, 9), "how many humps it has", varies="row", sweep=True)
        >>> MyCall(prompt="a camel", humps=[1, 2]).humps
        [1, 2]
    """
    return dataclasses.field(default=default, metadata={"argument": Argument(kind, help, **declared)})


def required(kind: Kind, help: str, **declared: Any) -> dict[str, Argument]:
    """The metadata of a field without a default: `dataclasses.field(metadata=required(...))`."""
    return {"argument": Argument(kind, help, **declared)}


def changed(cls: type, name: str, default: Any, **declared: Any) -> Any:
    """Declares an inherited argument again with another default, and other attributes of `Argument` where given.

    Example:
        >>> import dataclasses
        >>> from sega_jax import Call, changed
        >>> @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
        ... class QuickCall(Call):
        ...     steps: int = changed(Call, "steps", 4)
        >>> QuickCall(prompt="a cat").steps
        4
    """
    again = dataclasses.replace(arguments(cls)[name], name="", default=default, **declared)
    return dataclasses.field(default=default, metadata={"argument": again})


def arguments(cls: type) -> Mapping[str, Argument]:
    """Returns the declared arguments of a dataclass by their names, in their order.

    Example:
        >>> from sega_jax import Call
        >>> from sega_jax.method.arguments import arguments
        >>> arguments(Call)["steps"].default
        50
    """
    return _arguments(cls)


@cache
def _arguments(cls: type) -> Mapping[str, Argument]:
    fields = {field.name: field for field in dataclasses.fields(cls) if "argument" in field.metadata}
    return {
        name: dataclasses.replace(
            field.metadata["argument"],
            name=name,
            default=REQUIRED if field.default is dataclasses.MISSING else field.default,
        )
        for name, field in fields.items()
    }


def check_arguments(declared: Any) -> None:
    """Checks every declared argument of a frozen dataclass and keeps the checked values; call it in `__post_init__`.

    Raises:
        TypeError, ValueError: a value is not of its argument's kind.
    """
    for name, one in arguments(type(declared)).items():
        value = getattr(declared, name)
        if value is not one.default or value is None:
            object.__setattr__(declared, name, one.check(value))


def unknown_arguments(
    cls: type, names: Sequence[str], what: str, elsewhere: Callable[[str], str | None] = lambda name: None
) -> None:
    """Refuses names that are no arguments of a dataclass.

    Args:
        what: what takes its arguments, for errors.
        elsewhere: returns what takes an argument of this name, for errors; None where nothing does.

    Raises:
        TypeError: a name is unknown; the message has similar ones.
    """
    known = list(arguments(cls))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            hint = elsewhere(name) or hint
            raise TypeError(f"{name} is not an argument of {what}; {hint}")


def takes(
    declaration: Callable[P, D], what: str, elsewhere: Callable[[str], str | None] = lambda name: None
) -> Callable[[Callable[[S, D], R]], Callable[Concatenate[S, P], R]]:
    """Makes a method of an object and a declaration take the declaration's arguments.

    Editors and `help` show all arguments: the signature and the documentation come from the dataclass.

    Args:
        declaration: a dataclass whose fields are declared by `argument`.
        what, elsewhere: as of `unknown_arguments`.
    """

    shown = inspect.signature(declaration)

    def decorate(method: Callable[[S, D], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(method)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            unknown_arguments(declaration, list(kwargs), what, elsewhere)  # type: ignore[arg-type]
            return method(self, declaration(*args, **kwargs))

        own, *_ = inspect.signature(method).parameters.values()
        parameters = list(shown.parameters.values())
        result = inspect.signature(method).return_annotation
        call.__signature__ = inspect.Signature([own, *parameters], return_annotation=result)  # type: ignore[attr-defined]
        call.__doc__ = documented(method.__doc__ or "", declaration)  # type: ignore[arg-type]
        return call

    return decorate


def declared_by(declaration: Callable[P, D], what: str) -> Callable[[Callable[[D], R]], Callable[P, R]]:
    """Makes a function of a declaration take the declaration's arguments; see `takes`, which is for methods."""

    shown = inspect.signature(declaration)

    def decorate(function: Callable[[D], R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            unknown_arguments(declaration, list(kwargs), what)  # type: ignore[arg-type]
            return function(declaration(*args, **kwargs))

        result = inspect.signature(function).return_annotation
        signature = shown.replace(return_annotation=result)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = documented(function.__doc__ or "", declaration)  # type: ignore[arg-type]
        return call

    return decorate


def documented(text: str, cls: type) -> str:
    """Returns a docstring with the arguments of a dataclass in it, before what it returns and raises."""
    text = inspect.cleandoc(text)
    sections = [text.find(f"\n{name}:") for name in ("Returns", "Yields", "Raises", "Example")]
    end = min((start for start in sections if start >= 0), default=len(text))
    lines = [
        textwrap.fill(f"{name}: {one.documentation}", 116, initial_indent="    ", subsequent_indent="        ")
        for name, one in arguments(cls).items()
    ]
    listed = "\n".join(["Args:", *lines])
    return f"{text[:end].rstrip()}\n\n{listed}\n{text[end:]}"
