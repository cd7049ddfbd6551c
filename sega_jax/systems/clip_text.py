"""Text conditioning from CLIP encoders, with call arguments for long prompts, word weights and skipped layers."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.argument_kinds import Flag, Integer
from sega_jax.method.arguments import argument
from sega_jax.method.naming import assignment
from sega_jax.method.numerics import floating
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.systems.base import Encode, TextReader
from sega_jax.systems.call import Call
from sega_jax.systems.conditioning import Text, conditioning, stacked
from sega_jax.text.prompt_weights import Reading, chunks, weight_states
from sega_jax.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClipCall(Call):
    """The arguments of a call whose texts are encoded by CLIP."""

    long_prompts: bool = argument(
        False,
        Flag(),
        "encode texts longer than CLIP's limit of 75 tokens in chunks of 75 instead of truncating them. Shorter"
        " texts in the same call are padded with empty chunks. Each number of chunks needs its own compiled program",
        sweep=True,
        shell=True,
        shell_help="read texts of more than 75 tokens (about 50 words) completely instead of cutting them off",
        of_text=True,
    )
    weighted: bool = argument(
        False,
        Flag(),
        'interpret brackets as word weights: "(word:1.2)" means 1.2, "(word)" 1.1 and "[word]" 1 / 1.1.'
        " A weight multiplies the hidden states of its tokens",
        sweep=True,
        shell=True,
        shell_help='read brackets as weights of words: "(word:1.2)" means 1.2, "(word)" 1.1 and "[word]" 1 / 1.1',
        of_text=True,
    )
    clip_skip: int = argument(
        0,
        Integer(0),
        "how many layers to skip before the text encoder's usual output layer, for prompts and concepts. As in"
        " diffusers, no layers are skipped for negative prompts or the pooled text",
        unit="layers",
        sweep=True,
        shell=True,
        shell_help="how many of the text encoder's last layers to skip, as model cards of some checkpoints recommend",
        of_text=True,
        of_negative=False,
        later=True,
    )


@conditioning
class ClipText(Text):
    """Text conditioning for Stable Diffusion 1.x and 2.x.

    Example:
        >>> import sega_jax
        >>> pipe = sega_jax.load()
        >>> text = pipe.encode(["a cat", "a dog"])  # pipe(text) then needs no words
        >>> type(text).__name__, len(text)
        ('ClipText', 2)
    """

    states: Any  # hidden states [texts, tokens, channels], with the tokens of one or more chunks


class Skipping(NamedTuple):
    """Tokenized texts, and the number of text encoder layers to skip at the end.

    The number of skipped layers is traced, so that one compiled program works for any number. The number is also part
    of the embedding cache's key.
    """

    ids: Any  # int32 [texts, ...]
    skip: Any  # int32 [texts], the number of layers to skip


def skipping(encode: Encode, clip_skip: int) -> Callable[[Any], list[Any]]:
    """Returns a function that encodes ids, skipping the last `clip_skip` layers."""
    return lambda ids: encode(Skipping(ids, np.full(len(ids), clip_skip, np.int32)) if clip_skip else ids)


def encode(text_encoder: CLIPTextModel, ids: jax.Array | Skipping) -> ClipText:
    """Encodes int32 ids [texts, tokens].

    If layers are skipped, the final norm is applied to the output of the last remaining layer.
    """
    return ClipText(text_encoder(*ids) if isinstance(ids, Skipping) else text_encoder(ids))


def check_skip(encoders: Sequence[Any], options: Mapping[str, Any], unread: int = 0) -> None:
    """Checks that the text encoders have enough layers for `clip_skip`.

    Args:
        unread: The number of final layers whose output is never used.

    Raises:
        ValueError: A text encoder has fewer layers.
    """
    limit = min(encoder.config.num_hidden_layers for encoder in encoders) - unread
    if (skip := options.get("clip_skip", 0)) > limit:
        raise ValueError(f"{assignment('clip_skip', skip)} should be from 0 to {limit} for this text encoder")


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
    """Tokenizes and encodes strings; see `read` in `sega_jax.systems.base.TextReader`.

    Raises:
        ValueError: A weight is not a number.
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
    """Returns the number of chunks that the longest text needs.

    Raises:
        ValueError: A weight is not a number.
    """
    del rest
    reading = Reading(long_prompts, weighted)
    return max(len(chunks(tokenizer, text, reading, warn=lambda message: None).ids) for text in words)


def join(texts: Sequence[Any], blank: Callable[[], Any]) -> Any:
    """Joins texts whose `states` are [1, tokens, channels]; shorter texts are padded with chunks of the empty text."""
    longest = max(text.states.shape[1] for text in texts)
    if all(text.states.shape[1] == longest for text in texts):
        return stacked(texts)
    empty = blank().states
    chunks_missing = [(longest - text.states.shape[1]) // empty.shape[1] for text in texts]
    return stacked(
        [
            dataclasses.replace(text, states=np.concatenate([text.states, *[empty] * count], 1))
            for text, count in zip(texts, chunks_missing, strict=True)
        ]
    )


def checked_states(value: Any, kind: type[Any], tokens: int | None, channels: int, several: bool) -> Any:
    """Returns the hidden states of text conditioning passed by the user, as an array [1, tokens, channels].

    Args:
        value: An array [tokens, channels], or a text of `kind`.
        kind: A subclass of `Text` with the field `states`.
        tokens: The expected number of tokens; None allows any number.
        several: Whether a multiple of `tokens` is allowed.

    Raises:
        TypeError, ValueError: The value is not floating-point or has the wrong shape.
    """
    array = value.states[0] if isinstance(value, kind) else value
    states = floating("an embedding", array, "(tokens, channels)")
    expected = (len(states) if tokens is None else tokens, channels)
    fits = states.ndim == 2 and len(states) and states.shape[1] == channels
    if not fits or len(states) != expected[0] * (len(states) // expected[0] if several else 1):
        raise ValueError(f"an embedding has shape {states.shape}, expected {expected} (tokens, channels)")
    return states[None]


def options(config: CLIPTextConfig) -> dict[str, Any]:
    """Returns the entries other than sizes in a text encoder's config.json."""
    return {"model_type": "clip_text_model"}


def check(models: Any, tokenizer: Tokenizer | None, value: Any) -> ClipText:
    """Returns a user's text conditioning as a `ClipText` with one row.

    Raises:
        TypeError, ValueError: The value belongs to a different family or has the wrong shape.
    """
    channels = models.unet.config.level("cross_attention_dim", 0)
    tokens = None if tokenizer is None else tokenizer.length
    return ClipText(checked_states(value, ClipText, tokens, channels, several=tokenizer is not None))


def tokenizer_folder(folder: Path, path: Any, kind: str = "a CLIP tokenizer") -> Path:
    """Returns a tokenizer's folder: the user's path, or the checkpoint's folder if the path is None.

    Raises:
        TypeError: The path has the wrong type. The error message names the expected `kind` of tokenizer.
    """
    if not (path is None or isinstance(path, str | os.PathLike)):
        raise TypeError(f"tokenizer={type(path).__name__} should be {kind} or its folder")
    return folder / "tokenizer" if path is None else Path(path).expanduser()


def tokenizer(folder: Path, models: Any, override: Any) -> Tokenizer:
    """Returns the user's tokenizer, or reads one from the user's folder (by default, the checkpoint's folder).

    Raises:
        TypeError, CheckpointError: The tokenizer has the wrong type or cannot be read.
    """
    if isinstance(override, Tokenizer):
        return override
    text = models.text_encoder.config
    return Tokenizer(tokenizer_folder(folder, override), text.max_position_embeddings, text.vocab_size)


# The transformers classes whose files contain a text encoder.
CLIP_CLASSES = ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection")

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
