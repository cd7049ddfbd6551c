"""Reads the settings that peft and diffusers store for a LoRA: alphas, ranks and the scaling rule.

peft's `save_pretrained` writes them to adapter_config.json next to the weights. diffusers writes the same settings, as
JSON, to the header of the safetensors file. `save_lora_weights` prefixes each setting with the network's name;
`save_lora_adapter`, which saves one network, does not.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from sega_jax.text.files import CheckpointError
from sega_jax.weights.tensors import looks_like

_HEADER, CONFIG = "lora_adapter_metadata", "adapter_config.json"
# peft's prefix for layer names, and the stem of its weight file.
_PEFT, _PEFT_FILE = "base_model.model.", "adapter_model"
# peft's initialisation methods that change the weights of the checkpoint.
_CHANGE_WEIGHTS = ("pissa", "olora", "corda", "loftq")
# The alpha and rank that peft assumes if the settings omit them.
_ALPHA = _RANK = 8


class Settings(NamedTuple):
    """The LoRA settings of one network."""

    alpha: float | None = None  # None means that alpha equals the rank
    patterns: Mapping[str, float] = {}  # {regular expression for layer names: alpha}
    rslora: bool = False  # whether to divide by the square root of the rank instead of the rank
    rank: float | None = None  # the rank of layers whose matrices do not determine it; None means factor 1
    ranks: Mapping[str, float] = {}  # like `rank`, but {regular expression for layer names: rank}

    def factor(self, key: str, alpha: float | None, rank: int | None) -> float:
        """Returns the factor of a layer's difference, alpha / rank or alpha / sqrt(rank).

        Args:
            key: the key of the layer's weight.
            alpha: the alpha that the file stores for this layer. None uses the alpha in the settings.
            rank: the rank of the layer's matrices, or None if they have none, as in some LoKr files.
        """
        divisor = _matching(self.ranks, key, self.rank) if rank is None else rank
        if divisor is None:
            return 1.0
        if alpha is None:
            alpha = _matching(self.patterns, key, self.alpha)
        return (divisor if alpha is None else alpha) / (math.sqrt(divisor) if self.rslora else divisor)


def _matching(patterns: Mapping[str, float], key: str, otherwise: float | None) -> float | None:
    """Returns the value of the first pattern that matches a layer's name under peft's rule, or `otherwise`."""
    name = key.removesuffix(".weight")
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)


def factors(
    path: Path, parts: Iterable[str], keys: Iterable[str]
) -> Callable[[str, str, float | None, int | None], float]:
    """Returns a function that maps a layer's network, key, alpha and rank to its factor; see `Settings.factor`.

    Args:
        path: the file of the LoRA.
        parts: the networks that the LoRA may change.
        keys: the names of its tensors.

    Raises:
        CheckpointError: the settings in the header, or in the file next to the LoRA, cannot be read.
    """
    header = _header(path)
    if header is not None:
        source, text = f"{path}: {_HEADER} in its header", header
    elif (config := settings_file(path, keys)) is not None:
        source, text = str(config), _text(config)
    else:
        return lambda part, key, alpha, rank: Settings().factor(key, alpha, rank)
    try:
        entries = json.loads(text)
        settings = {part: _settings(entries, part) for part in parts}
    except (AttributeError, RecursionError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{source} cannot be used ({error}); fetch it again") from None
    return lambda part, key, alpha, rank: settings[part].factor(key, alpha, rank)


def settings_file(path: Path, keys: Iterable[str]) -> Path | None:
    """Returns the file with peft's settings next to a LoRA, or None if it is missing or the LoRA is not from peft."""
    config = path.parent / CONFIG
    by_peft = path.stem == _PEFT_FILE or any(key.startswith(_PEFT) for key in keys)
    return config if by_peft and config.is_file() else None


def lacks_settings(path: Path, keys: Iterable[str]) -> bool:
    """Returns whether a LoRA is from peft and its alpha is missing both from its file and from settings next to it."""
    keys = list(keys)
    lacks_alpha = any(key.startswith(_PEFT) for key in keys) and not any(key.endswith("alpha") for key in keys)
    return lacks_alpha and _header(path) is None and settings_file(path, keys) is None


def _header(path: Path) -> str | None:
    """Returns the settings in the header of a safetensors file, or None if there are none or the file is a pickle."""
    if looks_like(path) in ("a zip file", "a pickle"):
        return None
    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get(_HEADER)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable ({error}); fetch it again") from None


def _settings(entries: Mapping[str, Any], part: str) -> Settings:
    """Returns a network's settings: entries prefixed with its name or, if there are none, entries without a prefix.

    Raises:
        AttributeError, TypeError, ValueError, re.error: the entries are not valid settings.
    """
    options = {name.removeprefix(f"{part}."): value for name, value in entries.items() if name.startswith(f"{part}.")}
    options = options or {name: value for name, value in entries.items() if "." not in name}
    if not options:
        return Settings()
    method = options.get("init_lora_weights")
    if isinstance(method, str) and method.startswith(_CHANGE_WEIGHTS):
        raise ValueError(
            f"init_lora_weights={method[:40]!r} also changed the weights of the network, so the LoRA does not fit the"
            " original checkpoint; save it with peft's option path_initial_model_for_weight_conversion"
        )
    patterns, ranks = options.get("alpha_pattern") or {}, options.get("rank_pattern") or {}
    # peft's LoHa and LoKr settings call `lora_alpha` "alpha".
    alpha, rank = options.get("lora_alpha", options.get("alpha", _ALPHA)), options.get("r", _RANK)
    if not all(map(is_number, (alpha, *patterns.values()))):
        raise ValueError("an alpha is not a finite number")
    if not all(is_number(value) and value > 0 for value in (rank, *ranks.values())):
        raise ValueError("a rank is not a positive number")
    for pattern in (*patterns, *ranks):
        re.compile(pattern)
        # Matching a hostile pattern with two repetitions against names of about a hundred characters could take
        # minutes.
        if len(re.findall(r"[*+{]", pattern)) > 1:
            raise ValueError(f"the pattern {pattern[:80]!r} has more than one repetition, which is not supported")
    return Settings(alpha, patterns, options.get("use_rslora") is True, rank, ranks)


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
