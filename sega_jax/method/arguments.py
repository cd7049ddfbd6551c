"""Declarations of arguments as fields of frozen dataclasses.

    @dataclass(frozen=True, kw_only=True, eq=False)
    class MyCall(Call):
        wobble: float = argument(0.0, Real(0, 1), "how far pictures tremble", varies="row", sweep=True, shell=True)

Each argument is declared once. Checks, documentation, signatures, shell options, sweep axes, picture metadata and
record columns are derived from the declaration.
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
        kind: The type and range of its values.
        help: Its effect, as a lower-case phrase without a full stop.
        unit: The unit of its values, such as "pixels".
        varies: "row" if each picture in a batch may have its own value, "call" if all pictures share one value,
            "program" if each new value requires a new compiled program.
        sweep: Whether a sweep may vary it.
        shell: Whether the command line has an option for it.
        shell_help: The help of the shell option, in the form of `help`. If empty, the option has the same help.
        of_edits: Whether it has no effect on pictures without edits.
        of_text: Whether it changes how texts are encoded.
        of_negative: Whether an argument with `of_text` also applies to negative prompts.
        recommendable: Whether a checkpoint can recommend a value. Such an argument does not depend on others.
        later: Whether it was added when existing sweeps had already named pictures by hashes of their arguments. The
            hashes omit such an argument if it has its default value, so that existing pictures keep their names.
        name: The name of the field.
        default: The default of the field, or REQUIRED.
        default_text: The text that documentation shows for the default if the value itself is unsuitable, such as a
            path on this machine, or None for a value that depends on the checkpoint.

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
    shell_help: str = ""
    of_edits: bool = False
    of_text: bool = False
    of_negative: bool = True
    recommendable: bool = False
    later: bool = False
    name: str = ""
    default: Any = REQUIRED
    default_text: str = ""

    @property
    def option(self) -> str:
        """The command-line option of the argument."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, name: str | None = None) -> Any:
        """Returns the checked value, converted to the type that the library uses.

        If `value` is a sequence with one value for each row, the result is a list.

        Args:
            name: The name to show in error messages; defaults to the argument's name.

        Raises:
            TypeError, ValueError: The value has the wrong type or is out of range.
        """
        name = name or self.name
        if value is None and self.default is None:
            return None
        if self.varies == "row" and self.kind.several(value):
            return [self.kind.check(name, entry) for entry in value]
        return self.kind.check(name, value)

    @property
    def documentation(self) -> str:
        """The sentences that describe the argument in docstrings: its effect, type, range, unit and default."""
        parts = [f"{self.help[:1].upper()}{self.help[1:]}"]
        noun = f"{self.kind.noun}, in {self.unit}" if self.unit else self.kind.noun
        parts += [] if noun == "a value" else [f"{noun[:1].upper()}{noun[1:]}"]
        parts += (
            ["One value for all pictures, or a list with a value for each prompt or picture"]
            if self.varies == "row"
            else []
        )
        if self.default_text or (self.default is not REQUIRED and self.default not in (None, ())):
            parts.append(f"Default: {self.default_text or repr(self.default)}")
        return ". ".join(parts) + "."


def argument(default: Any, kind: Kind, help: str, **declared: Any) -> Any:
    """Declares a dataclass field as an argument.

    Args:
        default: The default of the field.
        kind: The type and range of its values.
        help: Its effect, as a lower-case phrase without a full stop.
        declared: Further attributes of `Argument`.

    Returns:
        The field to put in the body of the dataclass.

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
    """Returns the metadata of an argument without a default, for `dataclasses.field(metadata=required(...))`."""
    return {"argument": Argument(kind, help, **declared)}


def changed(cls: type, name: str, default: Any, **declared: Any) -> Any:
    """Redeclares an inherited argument with a different default.

    Args:
        cls: The dataclass that declares the argument.
        name: The name of the argument.
        default: Its new default.
        declared: Other attributes of `Argument` to replace.

    Returns:
        The field to put in the body of the subclass.

    Raises:
        KeyError: `cls` has no such argument.

    Example:
        >>> import dataclasses
        >>> from sega_jax import Call, changed
        >>> @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
        ... class QuickCall(Call):
        ...     steps: int = changed(Call, "steps", 4)
        >>> QuickCall(prompt="a cat").steps
        4
    """
    inherited = arguments(cls)[name]
    if default != inherited.default:
        declared = {"default_text": "", **declared}
    again = dataclasses.replace(inherited, name="", default=default, **declared)
    return dataclasses.field(default=default, metadata={"argument": again})


def arguments(cls: type) -> Mapping[str, Argument]:
    """Returns the declared arguments of a dataclass by name, in the order of their fields.

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
    """Replaces the arguments of a frozen dataclass with their checked values. Call this function in `__post_init__`.

    Raises:
        TypeError, ValueError: A value has the wrong type or is out of range.
    """
    for name, spec in arguments(type(declared)).items():
        value = getattr(declared, name)
        if value is not spec.default or value is None:
            object.__setattr__(declared, name, spec.check(value))


def unknown_arguments(
    cls: type, names: Sequence[str], what: str, elsewhere: Callable[[str], str | None] = lambda name: None
) -> None:
    """Checks that all names are arguments of a dataclass.

    Args:
        cls: The dataclass.
        names: The names to check.
        what: The function or object that takes the arguments, as named in error messages.
        elsewhere: A function that takes a name and returns a hint if another function has an argument of that name, and
            None otherwise.

    Raises:
        TypeError: A name is unknown. The message contains the hint, a similar name, or all known names.
    """
    known = list(arguments(cls))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            hint = elsewhere(name) or hint
            raise TypeError(f"{name} is not an argument of {what}; {hint}")


def takes(
    declaration: Callable[P, D],
    what: str,
    elsewhere: Callable[[str], str | None] = lambda name: None,
    defaults: Callable[[Any], Mapping[str, Any]] = lambda instance: {},
) -> Callable[[Callable[[S, D], R]], Callable[Concatenate[S, P], R]]:
    """Decorates a method whose only parameter is a declaration. The decorated method takes the declaration's arguments.

    Editors and `help` show all arguments, because the signature and the docstring are derived from the dataclass.

    Args:
        declaration: A dataclass whose fields are declared with `argument`.
        what, elsewhere: See `unknown_arguments`.
        defaults: A function that takes the method's instance, and returns {keyword argument: value} for arguments whose
            defaults differ for this instance.
    """

    declared = inspect.signature(declaration)

    def decorate(method: Callable[[S, D], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(method)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            unknown_arguments(declaration, list(kwargs), what, elsewhere)  # type: ignore[arg-type]
            return method(self, declaration(*args, **{**defaults(self), **kwargs}))

        obj, *_ = inspect.signature(method).parameters.values()
        parameters = list(declared.parameters.values())
        result = inspect.signature(method).return_annotation
        call.__signature__ = inspect.Signature([obj, *parameters], return_annotation=result)  # type: ignore[attr-defined]
        call.__doc__ = documented(method.__doc__ or "", declaration)  # type: ignore[arg-type]
        return call

    return decorate


def declared_by(declaration: Callable[P, D], what: str) -> Callable[[Callable[[D], R]], Callable[P, R]]:
    """Decorates a function whose only parameter is a declaration. The decorated function takes the declaration's
    arguments.

    This is the counterpart of `takes` for functions.
    """

    declared = inspect.signature(declaration)

    def decorate(function: Callable[[D], R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            unknown_arguments(declaration, list(kwargs), what)  # type: ignore[arg-type]
            return function(declaration(*args, **kwargs))

        result = inspect.signature(function).return_annotation
        signature = declared.replace(return_annotation=result)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = documented(function.__doc__ or "", declaration)  # type: ignore[arg-type]
        return call

    return decorate


def documented(text: str, cls: type) -> str:
    """Adds an "Args" section for the arguments of a dataclass to a docstring, before the docstring's other sections."""
    text = inspect.cleandoc(text)
    sections = [text.find(f"\n{name}:") for name in ("Returns", "Yields", "Raises", "Example")]
    end = min((start for start in sections if start >= 0), default=len(text))
    lines = [
        textwrap.fill(f"{name}: {spec.documentation}", 116, initial_indent="    ", subsequent_indent="        ")
        for name, spec in arguments(cls).items()
    ]
    section = "\n".join(["Args:", *lines])
    return f"{text[:end].rstrip()}\n\n{section}\n{text[end:]}"
