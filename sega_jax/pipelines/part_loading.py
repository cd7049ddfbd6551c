"""Loads parts of a checkpoint: the networks that read text, which the stages of a cascade share, and the others."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from sega_jax.pipelines.adapters import lora_changes, new_words
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import EmbeddingCache
from sega_jax.pipelines.load_options import pick_dtype
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
    """Loads the networks of a checkpoint that read text, alone: a function of words to the family's text conditioning.

    Args:
        source, dtype, variant, devices: as of `load`.
        lora: as of `load`; the text encoder takes its share.

    Raises:
        CheckpointError: the checkpoint has no text encoder; or as `load`.
    """
    where = devices if isinstance(devices, Devices) else Devices(devices)
    found = find(source)
    reader = found.system.text
    parts, tokenizer = load_readers(source, dtype=dtype, variant=variant, devices=where, lora=lora)
    networks = reader.networks(
        found.system.checkpoint.models(**dict.fromkeys(found.system.checkpoint.networks) | parts)
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
    """Loads the networks of a checkpoint that read text, by the names of their folders, and its tokenizer.

    Args:
        source, revision, dtype, variant, devices, lora: as of `load`.

    Raises:
        CheckpointError: the checkpoint has no text encoder; or as `load`.
    """
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = pick_dtype(dtype, where)
    found = find(source, revision)
    check_reads(found)
    reader = found.system.text
    others = [part for part in found.system.checkpoint.networks if part not in reader.parts]
    # Networks are checked against each other by their configs, also those that are not filled.
    folder = found.fetch(variant, without=[CHECKER], configs_of=others)
    description = describe(folder, tokenizer=found.vocabulary(), safety_checker=False)
    readers = {part: module for part, module in description.networks.items() if part in reader.parts}
    changes = [] if lora is None else lora_changes(description.models, lora)
    filled_in = {
        part: filled(found.weights(part, module, variant), module, dtype, where) for part, module in readers.items()
    }
    alone = type(description.models)(**dict.fromkeys(description.models._fields) | filled_in)
    networks = merged(alone, changes)._asdict()
    return {part: networks[part] for part in readers}, description.tokenizer


def load_without_text(
    source: str | Path, *, lora: str | Path | Mapping[str | Path, float] | None = None, **options: Any
) -> Pipeline:
    """Loads a checkpoint without its text encoder, which takes its share of a LoRA in `load_text`.

    Args:
        source, lora, options: as of `load`.

    Raises:
        TypeError, ValueError, CheckpointError: as `load`.
    """
    pipe = load(source, text_encoder=False, **options)
    if lora is not None:
        found = find(source, options.get("revision"), options.get("config"))
        folder = found.fetch(without=[CHECKER], configs_of=found.parts)
        whole = describe(folder, tokenizer=found.vocabulary(), safety_checker=False).models
        pipe.models = merged(pipe.models, lora_changes(whole, lora))
    return pipe


def check_adapter_files(folder: Path, reads: bool, lora: Any, textual_inversion: Any) -> None:
    """Reads LoRAs and new words, so that mistakes in them are found before any weights are read.

    Args:
        folder: a checkpoint.
        reads: whether its text encoder is there.
        lora, textual_inversion: as of `load`.

    Raises:
        TypeError, ValueError, CheckpointError: as `load`.
    """
    if lora is None and textual_inversion is None:
        return
    found = describe(folder, safety_checker=False, replaced={} if reads else {"text_encoder": None})
    if lora is not None:
        lora_changes(found.models, lora)
    if textual_inversion is not None:
        new_words(found.models, found.tokenizer, textual_inversion)


def check_reads(source: Source) -> None:
    """Checks that a checkpoint has the networks that read text.

    Raises:
        CheckpointError: one of them is missing.
    """
    missing = [part for part in source.system.text.parts if part not in source.parts]
    if missing:
        raise CheckpointError(
            f"{source.name} is {source.system.title} without {' and '.join(missing)}, which reads words; name a"
            " checkpoint that has it"
        )
