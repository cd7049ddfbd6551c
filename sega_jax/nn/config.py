"""Reads a network's config.json into its NamedTuple, refusing what the network does not compute."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=tuple)


def build(
    cls: type[T],
    config: Mapping[str, Any],
    what: str,
    *,
    fixed: Mapping[str, tuple] = {},
    choices: Mapping[str, tuple] = {},
    ignored: tuple[str, ...] = (),
    strict: bool = True,
) -> T:
    """The fields of the NamedTuple `cls` from `config`; null and absent mean the default.

    `fixed` lists options that exist elsewhere, with the values under which they change nothing here;
    `choices` the values that a field may take; `ignored` options without an effect on inference. With
    `strict`, an option that is none of these is warned about, since it may name a part we do not have.

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
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, int | float) and not isinstance(default, bool):
            entries = value if isinstance(value, list | tuple) and value else [value]
            good = all(isinstance(e, int | float) and not isinstance(e, bool) and e >= 0 for e in entries)
            good = good and (number or key in _PER_LEVEL)
            if isinstance(default, int):
                good = good and all(isinstance(e, int) for e in entries)
        else:
            good = isinstance(value, list | tuple) if isinstance(default, tuple) else isinstance(value, type(default))
        if not good:
            raise ValueError(f"{what} config: {key}={value!r} should be like {default!r}")
        if key in choices:
            for entry in value if isinstance(value, list | tuple) else [value]:
                if entry not in choices[key]:
                    raise ValueError(f"{what} config: {key}={entry!r} is not supported, only {', '.join(choices[key])}")
    unknown = [
        key for key in config if not (key.startswith("_") or key in cls._fields or key in fixed or key in ignored)
    ]
    if strict and unknown:
        warnings.warn(f"{what} config: ignored the unknown options {', '.join(unknown)}", stacklevel=3)
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


# Numbers that a config may also give as one entry for each level.
_PER_LEVEL = (
    "attention_head_dim",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "sample_size",
)
