"""Loads a checkpoint's text encoders, which the stages of a cascade share, separately from the other networks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from sega_jax.pipelines.adapters import lora_changes, new_words
from sega_jax.pipelines.device_defaults import pick_dtype
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import EmbeddingCache
from sega_jax.pipelines.loading import describe, filled, load
from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.sources import Source, find
from sega_jax.systems.base import Encode
from sega_jax.systems.registry import CHECKER
from sega_jax.text.files import CheckpointError
from sega_jax.weights.lora import merged


def load_text(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | Devices | None = None,
    lora: str | Path | Mapping[str | Path, float] | None = None,
) -> Callable[[Sequence[str]], Any]:
    """Loads only the text encoders of a checkpoint.

    Args:
        source, dtype, variant, devices: As for `load`.
        lora: The LoRAs, as for `load`; only their text-encoder parts are merged.

    Returns:
        A function that encodes a list of strings as the family's text conditioning.

    Raises:
        CheckpointError: The checkpoint has no text encoder; `load` lists further cases.
        FileNotFoundError, TypeError, ValueError: As for `load`.
    """
    where = devices if isinstance(devices, Devices) else Devices(devices)
    checkpoint = find(source)
    reader = checkpoint.system.text
    parts, tokenizer = load_readers(source, dtype=dtype, variant=variant, devices=where, lora=lora)
    networks = reader.networks(
        checkpoint.system.checkpoint.models(**dict.fromkeys(checkpoint.system.checkpoint.networks) | parts)
    )
    cache = EmbeddingCache(reader.encode, where)

    def encode(words: Sequence[str]) -> Any:
        texts = reader.read(list(words), tokenizer, Encode(networks, cache), warn)
        return reader.join(texts, lambda: texts[0])

    return encode


def load_readers(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | Devices | None = None,
    lora: str | Path | Mapping[str | Path, float] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Loads only the text encoders and the tokenizer of a checkpoint.

    Args:
        source, revision, dtype, variant, devices, lora: As for `load`.

    Returns:
        {folder: text encoder}, and the tokenizer.

    Raises:
        CheckpointError: The checkpoint has no text encoder; `load` lists further cases.
        FileNotFoundError, TypeError, ValueError: As for `load`.
    """
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = pick_dtype(dtype, where)
    checkpoint = find(source, revision)
    check_reads(checkpoint)
    reader = checkpoint.system.text
    others = [part for part in checkpoint.system.checkpoint.networks if part not in reader.parts]
    # The configs of all networks are needed to check that the networks fit together.
    folder = checkpoint.fetch(variant, without=[CHECKER], configs_of=others)
    description = describe(folder, tokenizer=checkpoint.vocabulary(), safety_checker=False)
    readers = {part: module for part, module in description.networks.items() if part in reader.parts}
    changes = [] if lora is None else lora_changes(description.models, lora)
    filled_in = {
        part: filled(checkpoint.weights(part, module, variant), module, dtype, where)
        for part, module in readers.items()
    }
    text_only = type(description.models)(**dict.fromkeys(description.models._fields) | filled_in)
    networks = merged(text_only, changes)._asdict()
    return {part: networks[part] for part in readers}, description.tokenizer


def load_without_text(
    source: str | Path, *, lora: str | Path | Mapping[str | Path, float] | None = None, **options: Any
) -> Pipeline:
    """Loads a checkpoint without its text encoder. The text-encoder part of a LoRA is left to `load_text`.

    Args:
        source, lora, options: As for `load`.

    Raises:
        FileNotFoundError, TypeError, ValueError, CheckpointError: As for `load`.
    """
    pipe = load(source, text_encoder=False, **options)
    if lora is not None:
        checkpoint = find(source, options.get("revision"), options.get("config"))
        folder = checkpoint.fetch(without=[CHECKER], configs_of=checkpoint.parts)
        all_networks = describe(folder, tokenizer=checkpoint.vocabulary(), safety_checker=False).models
        pipe.models = merged(pipe.models, lora_changes(all_networks, lora))
    return pipe


def check_adapter_files(folder: Path, has_text_encoder: bool, lora: Any, textual_inversion: Any) -> None:
    """Checks LoRAs and new words against a checkpoint before its weights are read.

    Args:
        folder: The checkpoint's folder.
        has_text_encoder: Whether the folder contains the text encoder.
        lora, textual_inversion: As for `load`.

    Raises:
        TypeError, ValueError, CheckpointError: As for `load`.
    """
    if lora is None and textual_inversion is None:
        return
    description = describe(folder, safety_checker=False, replaced={} if has_text_encoder else {"text_encoder": None})
    if lora is not None:
        lora_changes(description.models, lora)
    if textual_inversion is not None:
        new_words(description.models, description.tokenizer, textual_inversion)


def check_reads(source: Source) -> None:
    """Checks that a checkpoint contains its family's text encoders.

    Raises:
        CheckpointError: One of them is missing.
    """
    missing = [part for part in source.system.text.parts if part not in source.parts]
    if missing:
        raise CheckpointError(
            f"{source.name} is {source.system.title} without {' and '.join(missing)}, so it cannot encode words;"
            " give a complete checkpoint"
        )
