"""Reads a network's config.json into a NamedTuple and raises errors for unsupported values."""

import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T", bound=NamedTuple)
M = TypeVar("M")

# The maximum number of levels, and the maximum number of layers in a level. All known networks have fewer of both, and
# building a network of this size is still quick.
_MOST = 100


def build(
    cls: type[T],
    config: Mapping[str, Any],
    what: str,
    *,
    fixed: Mapping[str, tuple] = types.MappingProxyType({}),
    choices: Mapping[str, tuple] = types.MappingProxyType({}),
    ignored: tuple[str, ...] = (),
    may_be_zero: tuple[str, ...] = (),
    strict: bool = True,
) -> T:
    """Returns the NamedTuple `cls` with the fields of a config. Options that are null or missing get their default
    values.

    Args:
        cls: A NamedTuple with defaults.
        config: The contents of a config.json.
        what: The name of the network, for error messages.
        fixed: {option: supported values} for options that are not fields.
        choices: {field: supported values}.
        ignored: Options that do not affect inference.
        may_be_zero: Fields that may be 0 even though their default is not 0.
        strict: Whether to warn about unknown options, which may indicate an unsupported part of the network.

    Raises:
        ValueError: An option has an unsupported value, or a field has the wrong type.
    """
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"{what} config: {key}={config[key]!r} is not supported; supported values:"
                f" {' or '.join(map(repr, allowed))}"
            )
    values = {key: config[key] for key in cls._fields if config.get(key) is not None}
    for key, value in values.items():
        default = cls._field_defaults[key]
        # Numbers must be positive and lists must not be empty, unless the default is 0 or empty.
        least = 1 if default and key not in may_be_zero else 0
        if not _is(value, cls.__annotations__[key], least):
            raise ValueError(f"{what} config: {key}={value!r} is invalid; use a value such as {default!r}")
        entries = _flat(value)
        many = ("layers" in key or "blocks" in key) and max(entries, default=0) > _MOST
        if len(entries) > _MOST or many:
            raise ValueError(
                f"{what} config: {key}={str(value)[:40]} exceeds the supported maximum of {_MOST} levels or layers"
            )
        for entry in entries:
            if key in choices and entry not in choices[key]:
                raise ValueError(
                    f"{what} config: {key}={entry!r} is not supported; supported values: {', '.join(choices[key])}"
                )
    known = {*cls._fields, *fixed, *ignored}
    unknown = [key for key in config if not key.startswith("_") and key not in known]
    if strict and unknown:
        warnings.warn(f"{what} config: ignored the unknown options {', '.join(unknown)}", stacklevel=3)
    fields = cls._field_defaults | {key: _tuples(value) for key, value in values.items()}
    return cls._make(fields[key] for key in cls._fields)


def built(value: Mapping[str, Any] | M, module: Callable[..., M], config: Any, *options: Any) -> M:
    """Returns `value` if it is a network; if it is a config, builds the network, with parameters that are only shapes.

    Args:
        value: The contents of the network's config.json, or a network.
        module: The class of the network.
        config: The class of the network's config, whose `from_dict` reads `value`.
        options: Further arguments of `module`.

    Raises:
        ValueError: The config is not supported.
    """
    return module(config.from_dict(value), *options) if isinstance(value, Mapping) else value


def written(config: Any) -> dict[str, Any]:
    """Returns the fields of a config's NamedTuple as the contents of a config.json.

    Fields whose default is 0, "" or () are omitted if they have their default value. In other fields, "" and () become
    null.
    """
    fields = {
        name: written(value) if isinstance(value, tuple) and hasattr(value, "_fields") else value
        for name, value in config._asdict().items()
    }
    return {
        name: None if value in ("", ()) else value
        for name, value in fields.items()
        if isinstance(value, bool) or value not in (0, "", ()) or value != config._field_defaults[name]
    }


def _flat(value: Any) -> list[Any]:
    """Returns the entries of a nested list as a flat list, or [value] for a single value."""
    return [leaf for entry in value for leaf in _flat(entry)] if type(value) in (list, tuple) else [value]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if type(value) in (list, tuple) else value


def _is(value: Any, kind: Any, least: int) -> bool:
    """Returns whether a JSON value has the annotated type, and its integers and lengths are at least `least`."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, option, least) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        entry, *more = typing.get_args(kind)
        has_length = isinstance(value, list | tuple) and (
            len(value) >= least if more == [...] else len(value) == 1 + len(more)
        )
        return has_length and all(_is(v, entry, least) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value) and value > 0
    return isinstance(value, kind) and (kind is not int or value >= least)
