"""Text of CLIP encoders: longer prompts in chunks, weights of words, skipped layers, and the arguments that ask for
them."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.argument_kinds import Flag, Integer
from sega_jax.method.arguments import argument
from sega_jax.method.numerics import floating
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.systems.base import Encode, TextReader
from sega_jax.systems.call import Call
from sega_jax.systems.conditioning import Text, conditioning, stacked
from sega_jax.text.prompt_weights import Reading, chunks, weight_states
from sega_jax.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClipCall(Call):
    """A call whose words CLIP's text encoders read."""

    long_prompts: bool = argument(
        False,
        Flag(),
        "whether to read texts of more than 75 tokens, CLIP's limit, in chunks of 75 instead of truncating them."
        " Shorter texts of the same call are padded with empty chunks, and each number of chunks compiles its own"
        " program",
        sweep=True,
        shell=True,
        of_text=True,
    )
    weighted: bool = argument(
        False,
        Flag(),
        'whether to read brackets as weights: "(word:1.2)", "(word)" for 1.1 and "[word]" for 1 / 1.1. Each weight'
        " multiplies the hidden states of its tokens",
        sweep=True,
        shell=True,
        of_text=True,
    )
    clip_skip: int = argument(
        0,
        Integer(0),
        "the number of layers before the text encoder's usual one from which prompts and concepts are read. As in"
        " diffusers, negative prompts and the pooled text do not change",
        unit="layers",
        sweep=True,
        shell=True,
        of_text=True,
        of_negative=False,
        later=True,
    )


@conditioning
class ClipText(Text):
    """Texts as Stable Diffusion 1.x and 2.x take them."""

    states: Any  # [texts, tokens, channels], of one or more chunks of tokens


class Skipping(NamedTuple):
    """Tokens of texts that are read from an earlier layer. The layers are traced, so all numbers share a program, and
    they are part of what embeddings are remembered by."""

    ids: Any  # int32 [texts, ...]
    skip: Any  # int32 [texts], layers


def skipping(encode: Encode, clip_skip: int) -> Callable[[Any], list[Any]]:
    """Returns a function that encodes ids and skips so many layers."""
    return lambda ids: encode(Skipping(ids, np.full(len(ids), clip_skip, np.int32)) if clip_skip else ids)


def encode(text_encoder: CLIPTextModel, ids: jax.Array | Skipping) -> ClipText:
    """Encodes int32 ids [texts, tokens]. With skipped layers, the final layer norm follows the earlier layer."""
    return ClipText(text_encoder(*ids) if isinstance(ids, Skipping) else text_encoder(ids))


def check_skip(encoders: Sequence[Any], options: Mapping[str, Any], unread: int = 0) -> None:
    """Checks that text encoders have the layers that are skipped before `unread` last ones.

    Raises:
        ValueError: one has fewer.
    """
    most = min(encoder.config.num_hidden_layers for encoder in encoders) - unread
    if (skip := options.get("clip_skip", 0)) > most:
        raise ValueError(f"clip_skip={skip} should be from 0 to {most}, by the number of the text encoder's layers")


def read(
    words: Sequence[str],
    tokenizer: Tokenizer,
    encode: Encode,
    warn: Callable[[str], None],
    *,
    long_prompts: bool = False,
    weighted: bool = False,
    clip_skip: int = 0,
) -> list[ClipText]:
    """Reads words; see `sega_jax.systems.base.TextReader`.

    Raises:
        ValueError: a weight that is no number.
    """
    encode_ids = skipping(encode, clip_skip)
    if not (long_prompts or weighted):
        return encode_ids(tokenizer(words, warn=warn))
    reading = Reading(long_prompts, weighted)
    parts = [chunks(tokenizer, text, reading, warn=warn) for text in words]
    hidden = [np.asarray(one.states[0]) for one in encode_ids(np.concatenate([part.ids for part in parts]))]
    texts, first = [], 0
    for part in parts:
        states = np.stack(hidden[first : first + len(part.ids)])
        texts.append(ClipText(np.concatenate(weight_states(states, part.weights))[None]))
        first += len(part.ids)
    return texts


def length(
    tokenizer: Tokenizer, words: Sequence[str], *, long_prompts: bool = False, weighted: bool = False, **rest: Any
) -> int:
    """Returns the number of chunks that the longest of some words takes.

    Raises:
        ValueError: a weight that is no number.
    """
    del rest
    reading = Reading(long_prompts, weighted)
    return max(len(chunks(tokenizer, text, reading, warn=lambda message: None).ids) for text in words)


def join(texts: Sequence[Any], blank: Callable[[], Any]) -> Any:
    """Joins texts with `states` [1, tokens, channels]; shorter states are padded by chunks of no words."""
    longest = max(text.states.shape[1] for text in texts)
    if all(text.states.shape[1] == longest for text in texts):
        return stacked(texts)
    none = blank().states
    chunks_missing = [(longest - text.states.shape[1]) // none.shape[1] for text in texts]
    return stacked(
        [
            dataclasses.replace(text, states=np.concatenate([text.states, *[none] * count], 1))
            for text, count in zip(texts, chunks_missing, strict=True)
        ]
    )


def checked_states(value: Any, kind: type[Any], tokens: int | None, channels: int, several: bool) -> Any:
    """Returns the states [1, tokens, channels] that a user gave, as an array [tokens, channels] or a text of `kind`.

    Args:
        kind: a `Text` with `states`.
        tokens: how many there are; None for any number.
        several: whether a multiple of them may be given.

    Raises:
        TypeError, ValueError: it is something else.
    """
    given = value.states[0] if isinstance(value, kind) else value
    states = floating("an embedding", given, "(tokens, channels)")
    expected = (len(states) if tokens is None else tokens, channels)
    fits = states.ndim == 2 and len(states) and states.shape[1] == channels
    if not fits or len(states) != expected[0] * (len(states) // expected[0] if several else 1):
        raise ValueError(f"an embedding has shape {states.shape}, expected {expected} (tokens, channels)")
    return states[None]


def options(config: CLIPTextConfig) -> dict[str, Any]:
    """Returns what the config.json of a text encoder says besides its sizes."""
    return {"model_type": "clip_text_model"}


def check(models: Any, tokenizer: Tokenizer | None, value: Any) -> ClipText:
    """Returns a user's conditioning as a text of one row.

    Raises:
        TypeError, ValueError: it is of another family or shape.
    """
    channels = models.unet.config.level("cross_attention_dim", 0)
    tokens = None if tokenizer is None else tokenizer.length
    return ClipText(checked_states(value, ClipText, tokens, channels, several=tokenizer is not None))


def tokenizer_folder(folder: Path, given: Any, kind: str = "CLIP's") -> Path:
    """Returns the folder of a tokenizer: the checkpoint's, or the one that a user gave.

    Raises:
        TypeError: something else is given.
    """
    if not (given is None or isinstance(given, str | os.PathLike)):
        raise TypeError(f"tokenizer={type(given).__name__} should be {kind}, or its folder")
    return folder / "tokenizer" if given is None else Path(given).expanduser()


def tokenizer(folder: Path, models: Any, given: Any) -> Tokenizer:
    """Reads the tokenizer of a checkpoint's folder, or the folder that a user gave.

    Raises:
        TypeError, CheckpointError: it is of another kind, or cannot be read.
    """
    if isinstance(given, Tokenizer):
        return given
    text = models.text_encoder.config
    return Tokenizer(tokenizer_folder(folder, given), text.max_position_embeddings, text.vocab_size)


# Classes of transformers whose files hold a text encoder.
OF_CLIP = ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection")

READER = TextReader(
    type=ClipText,
    parts=("text_encoder",),
    networks=lambda models: models.text_encoder,
    encode=encode,
    read=read,
    check_options=lambda text_encoder, options: check_skip([text_encoder], options),
    check=check,
    join=join,
    length=length,
)
