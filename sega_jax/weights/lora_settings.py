"""The strength of LoRAs as peft and diffusers store it, apart from the matrices.

peft's `save_pretrained` writes a file adapter_config.json next to the weights. diffusers writes the same settings as
JSON into the header of the safetensors file: with the network's name in front of each setting (`save_lora_weights`), or
without it where the file is of one network (`save_lora_adapter`).
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
# What peft puts in front of a layer's name, and what it calls its file.
_PEFT, _PEFT_FILE = "base_model.model.", "adapter_model"
# Ways of peft to begin a training, which change the weights of the checkpoint.
_OF_CHANGED_WEIGHTS = ("pissa", "olora", "corda", "loftq")
# peft's own defaults, which hold where its settings name no alpha or no rank.
_ALPHA = _RANK = 8


class Settings(NamedTuple):
    """The settings of the LoRA of one network."""

    alpha: float | None = None  # None where it equals the rank
    patterns: Mapping[str, float] = {}  # alphas of layers by regular expressions of their names
    rslora: bool = False  # whether the difference is divided by the rank's square root
    rank: float | None = None  # of layers whose matrices do not have it; None makes their factor 1
    ranks: Mapping[str, float] = {}  # such ranks by regular expressions of the layers' names

    def factor(self, key: str, alpha: float | None, rank: int | None) -> float:
        """Returns what a layer's difference is multiplied by, alpha / rank or alpha / sqrt(rank).

        Args:
            key: of the layer's weight.
            alpha: as the file has it for this layer; None leaves it to the settings.
            rank: of the layer's matrices; None where they have none, as those of some LoKr.
        """
        divisor = _own(self.ranks, key, self.rank) if rank is None else rank
        if divisor is None:
            return 1.0
        if alpha is None:
            alpha = _own(self.patterns, key, self.alpha)
        return (divisor if alpha is None else alpha) / (math.sqrt(divisor) if self.rslora else divisor)


def _own(patterns: Mapping[str, float], key: str, otherwise: float | None) -> float | None:
    """Returns the value of the first pattern that matches a layer's name, as peft matches them."""
    name = key.removesuffix(".weight")
    return next((value for own, value in patterns.items() if re.match(rf"(.*\.)?({own})$", name)), otherwise)


def factors(
    path: Path, parts: Iterable[str], keys: Iterable[str]
) -> Callable[[str, str, float | None, int | None], float]:
    """Returns a function from a layer's network, key, alpha and rank to its factor; see `Settings.factor`.

    Args:
        path: the file of the LoRA.
        parts: the networks that it may be of.
        keys: the names of its tensors.

    Raises:
        CheckpointError: the settings in the header, or in the file next to it, cannot be read.
    """
    header = _header(path)
    if header is not None:
        where, said = f"{path}: {_HEADER} in its header", header
    elif (beside := settings_file(path, keys)) is not None:
        where, said = str(beside), _text(beside)
    else:
        return lambda part, key, alpha, rank: Settings().factor(key, alpha, rank)
    try:
        entries = json.loads(said)
        found = {part: _settings(entries, part) for part in parts}
    except (AttributeError, RecursionError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{where} cannot be used ({error}); fetch it again") from None
    return lambda part, key, alpha, rank: found[part].factor(key, alpha, rank)


def settings_file(path: Path, keys: Iterable[str]) -> Path | None:
    """Returns the file next to a LoRA with peft's settings for it; None for files of others and where there is none."""
    beside = path.parent / CONFIG
    own = path.stem == _PEFT_FILE or any(key.startswith(_PEFT) for key in keys)
    return beside if own and beside.is_file() else None


def lacks_settings(path: Path, keys: Iterable[str]) -> bool:
    """Tells whether peft wrote a file, and neither it nor a file next to it says how strong the LoRA is."""
    keys = list(keys)
    own = any(key.startswith(_PEFT) for key in keys) and not any(key.endswith("alpha") for key in keys)
    return own and _header(path) is None and settings_file(path, keys) is None


def _header(path: Path) -> str | None:
    """Returns the settings in the header of a safetensors file; None if it has none, or is of torch."""
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
    """Returns the settings of a network: those with its name in front, or those without a name.

    Raises:
        AttributeError, TypeError, ValueError, re.error: they are no settings.
    """
    own = {name.removeprefix(f"{part}."): value for name, value in entries.items() if name.startswith(f"{part}.")}
    own = own or {name: value for name, value in entries.items() if "." not in name}
    if not own:
        return Settings()
    start = own.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OF_CHANGED_WEIGHTS):
        raise ValueError(
            f"init_lora_weights={start[:40]!r} changes the weights that a LoRA is added to, so it does not suit the"
            " checkpoint's; save it with peft's path_initial_model_for_weight_conversion"
        )
    patterns, ranks = own.get("alpha_pattern") or {}, own.get("rank_pattern") or {}
    # LoHa and LoKr of peft call theirs "alpha".
    alpha, rank = own.get("lora_alpha", own.get("alpha", _ALPHA)), own.get("r", _RANK)
    if not all(map(is_number, (alpha, *patterns.values()))):
        raise ValueError("an alpha is no number")
    if not all(is_number(one) and one > 0 for one in (rank, *ranks.values())):
        raise ValueError("a rank is no positive number")
    for pattern in (*patterns, *ranks):
        re.compile(pattern)
        # Names have some hundred characters, and with two repetitions a hostile pattern would take minutes.
        if len(re.findall(r"[*+{]", pattern)) > 1:
            raise ValueError(f"the pattern {pattern[:80]!r} has more than one repetition, which is not supported")
    return Settings(alpha, patterns, own.get("use_rslora") is True, rank, ranks)


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
