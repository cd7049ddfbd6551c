"""Reads a network's config.json into its NamedTuple, refusing what the network does not compute."""

import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T", bound=NamedTuple)
M = TypeVar("M")

# Levels, and layers of one: far beyond any network, and soon built.
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
    """The fields of the NamedTuple `cls` from `config`; null and absent mean the default.

    `fixed` lists options that exist elsewhere, with the values under which they change nothing here;
    `choices` the values that a field may take; `ignored` options without an effect on inference; `may_be_zero` fields
    whose numbers may be 0 although the default is not. With `strict`, an option that is none of these is warned about,
    since it may name a part we do not have.

    Raises:
        ValueError: an option has a value that is not supported, or a field is of the wrong type.
    """
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"{what} config: {key}={config[key]!r} is not supported, only {' or '.join(map(repr, allowed))}"
            )
    values = {key: config[key] for key in cls._fields if config.get(key) is not None}
    for key, value in values.items():
        default = cls._field_defaults[key]
        # Numbers are positive and lists not empty, but for those that are so by default.
        least = 1 if default and key not in may_be_zero else 0
        if not _is(value, cls.__annotations__[key], least):
            raise ValueError(f"{what} config: {key}={value!r} should be like {default!r}")
        entries = _flat(value)
        many = ("layers" in key or "blocks" in key) and max(entries, default=0) > _MOST
        if len(entries) > _MOST or many:
            raise ValueError(f"{what} config: {key}={str(value)[:40]} is more than the {_MOST} that are supported")
        for entry in entries:
            if key in choices and entry not in choices[key]:
                raise ValueError(f"{what} config: {key}={entry!r} is not supported, only {', '.join(choices[key])}")
    known = {*cls._fields, *fixed, *ignored}
    unknown = [key for key in config if not key.startswith("_") and key not in known]
    if strict and unknown:
        warnings.warn(f"{what} config: ignored the unknown options {', '.join(unknown)}", stacklevel=3)
    fields = cls._field_defaults | {key: _tuples(value) for key, value in values.items()}
    return cls._make(fields[key] for key in cls._fields)


def built(value: Mapping[str, Any] | M, module: Callable[..., M], config: Any, *options: Any) -> M:
    """A network without values from its config.json, whose fields `config.from_dict` reads; what is none, such as a
    network that is built, stays as it is.

    Raises:
        ValueError: the config is not supported.
    """
    return module(config.from_dict(value), *options) if isinstance(value, Mapping) else value


def written(config: Any) -> dict[str, Any]:
    """Returns the fields of a config's NamedTuple as config.json has them. 0, "" and () are left out where they are the
    default, and "" and () are null elsewhere."""
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
    """The entries of a value, which may be a list of lists."""
    return [one for entry in value for one in _flat(entry)] if type(value) in (list, tuple) else [value]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if type(value) in (list, tuple) else value


def _is(value: Any, kind: Any, least: int) -> bool:
    """Whether a JSON value is of the annotated type, its numbers at least `least`."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, option, least) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        entry, *more = typing.get_args(kind)
        right = isinstance(value, list | tuple) and (
            len(value) >= least if more == [...] else len(value) == 1 + len(more)
        )
        return right and all(_is(v, entry, least) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value) and value > 0
    return isinstance(value, kind) and (kind is not int or value >= least)
