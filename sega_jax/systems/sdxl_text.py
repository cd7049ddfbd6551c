"""Text conditioning for Stable Diffusion XL: the hidden states of two CLIP encoders, and a pooled embedding."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.checks import brief
from sega_jax.method.numerics import floating
from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.systems import clip_text
from sega_jax.systems.base import Encode, TextReader
from sega_jax.systems.clip_text import Skipping, skipping
from sega_jax.systems.conditioning import Text, conditioning
from sega_jax.text.prompt_weights import Reading, pair_chunks, weight_states
from sega_jax.text.tokenizers import TokenizerPair


@conditioning
class SDXLText(Text):
    """Text conditioning for Stable Diffusion XL.

    Example:
        >>> import numpy as np
        >>> from sega_jax import SDXLText
        >>> SDXLText(np.zeros((2, 77, 2048), np.float32), np.zeros((2, 1280), np.float32))[0]
        SDXLText(states=float32[1, 77, 2048], pooled=float32[1, 1280])
    """

    # hidden states [texts, tokens, channels], with the channels of both text encoders and the tokens of all chunks
    states: Any
    pooled: Any  # the pooled embedding [texts, channels], from the second text encoder and the first chunk


def encode(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: jax.Array | Skipping) -> SDXLText:
    """Encodes int32 ids [texts, 2, tokens] from the tokenizers for the two text encoders."""
    one, two = encoders
    ids, skip = ids if isinstance(ids, Skipping) else (ids, None)
    states, pooled = two.states(ids[:, 1], skip)
    return SDXLText(jnp.concatenate([one.penultimate(ids[:, 0], skip), states], -1), pooled)


def read(
    words: Sequence[str],
    tokenizer: TokenizerPair,
    encode: Encode,
    warn: Callable[[str], None],
    *,
    second: Sequence[str] | str | None = None,
    long_prompts: bool = False,
    weighted: bool = False,
    clip_skip: int = 0,
) -> list[SDXLText]:
    """Tokenizes and encodes strings; see `read` in `sega_jax.systems.base.TextReader`.

    Args:
        second: Different strings for the second text encoder: one for all texts, or one for each text.

    Raises:
        TypeError, ValueError: `second` is neither a string nor a list of strings, it has the wrong number of texts, or
            a weight is not a number.
    """
    others = None if second is None else _words_of_second(second, len(words))
    encode_ids = skipping(encode, clip_skip)
    if not (long_prompts or weighted):
        return encode_ids(tokenizer(words, others, warn=warn))
    reading = Reading(long_prompts, weighted)
    parts = [
        pair_chunks(tokenizer, text, others[i] if others else None, reading, warn=warn) for i, text in enumerate(words)
    ]
    rows = iter(encode_ids(np.concatenate([part.ids for part in parts])))
    width = encode.networks[0].config.hidden_size
    return [joined_chunks([next(rows) for _ in part.ids], part.weights, width) for part in parts]


def _words_of_second(second: Any, texts: int) -> list[str]:
    words = [second] if isinstance(second, str) else list(second) if hasattr(second, "__iter__") else []
    if not words or not all(isinstance(one, str) for one in words):
        raise TypeError(f"second={brief(second)} should be a string or a non-empty list of strings")
    if len(words) not in (1, texts):
        raise ValueError(f"second has {len(words)} entries, expected {texts}, one for each text, or one for all texts")
    return words * (texts // len(words))


def joined_chunks(rows: Sequence[SDXLText], weights: np.ndarray, width: int) -> SDXLText:
    """Joins the chunks of one text, and applies `weight_states` separately to each text encoder's hidden states.

    The pooled embedding comes from the first chunk and ignores the weights, as in AUTOMATIC1111's
    stable-diffusion-webui. diffusers' community pipeline lpw_stable_diffusion_xl uses the last chunk instead, and also
    ignores the weights. The first chunk's embedding depends neither on later text nor on padding, and it equals the
    embedding of the truncated prompt. Therefore, `long_prompts` only adds information.

    Args:
        rows: The encoded chunks.
        weights: float32 [chunks, 2, length], the token weights for each text encoder.
        width: The number of channels of the first text encoder.
    """
    sides = np.split(np.concatenate([np.asarray(row.states) for row in rows]), [width], -1)
    states = np.concatenate([weight_states(side, weights[:, i]) for i, side in enumerate(sides)], -1)
    return SDXLText(states.reshape(1, -1, states.shape[-1]), rows[0].pooled)


def length(
    tokenizer: TokenizerPair, words: Sequence[str], *, long_prompts: bool = False, weighted: bool = False, **rest: Any
) -> int:
    """Returns the number of chunks that the longest text needs.

    Raises:
        ValueError: A weight is not a number.
    """
    reading = Reading(long_prompts, weighted)
    return max(len(pair_chunks(tokenizer, text, None, reading, warn=lambda message: None).ids) for text in words)


def join(texts: Sequence[SDXLText], blank: Callable[[], SDXLText]) -> SDXLText:
    """Joins texts; shorter texts are padded with chunks of the empty text, which do not change the pooled embedding.

    All-zero texts represent the absence of text, so they are padded with zeros. Because the UNet's keys and values for
    zeros are zero, the amount of padding has no effect. Padding with the encoded empty text would have an effect.
    """
    longest = max(text.states.shape[1] for text in texts)
    return clip_text.join([text if text.states.any() else _zeros(text, longest) for text in texts], blank)


def _zeros(text: SDXLText, tokens: int) -> SDXLText:
    rows, _, channels = text.states.shape
    return dataclasses.replace(text, states=np.zeros((rows, tokens, channels), text.states.dtype))


def check(models: Any, tokenizer: TokenizerPair | None, value: Any) -> SDXLText:
    """Returns a user's text conditioning as an `SDXLText` with one row.

    Raises:
        TypeError, ValueError: The value belongs to a different family or has the wrong shape.
    """
    if not isinstance(value, SDXLText):
        raise TypeError(
            f"a Stable Diffusion XL embedding should be an SDXLText with the fields states and pooled, as `encode`"
            f" returns it, not {type(value).__name__}"
        )
    tokens, channels, pooled_channels = _text_shape(models, tokenizer)
    states = floating("an embedding's states", value.states, f"(1, {tokens}, {channels})")
    fits = states.ndim == 3 and states.shape[1] and states.shape[2] == channels
    if not fits or states.shape[1] % tokens:
        raise ValueError(
            f"an embedding's states have shape {states.shape[1:]}, expected {(tokens, channels)} (tokens, channels), or"
            f" a multiple of {tokens} tokens"
        )
    pooled = floating("an embedding's pooled", value.pooled, f"(1, {pooled_channels})")
    if pooled.shape != (1, pooled_channels):
        raise ValueError(f"an embedding's pooled text has shape {pooled.shape[1:]}, expected {(pooled_channels,)}")
    return value


def _text_shape(models: Any, tokenizer: TokenizerPair | None) -> tuple[int, int, int]:
    """Returns the number of tokens in a chunk, and the widths of the hidden states and the pooled embedding."""
    tokens = models.text_encoder.config.max_position_embeddings if tokenizer is None else tokenizer.length
    net = models.unet.config
    return tokens, net.level("cross_attention_dim", 0), net.pooled_dim


def negative(models: Any, tokenizer: TokenizerPair | None, extras: Any) -> SDXLText | str:
    """Returns the default negative prompt: all zeros or "", depending on the checkpoint."""
    if not extras.zero_negative:
        return ""
    tokens, channels, pooled_channels = _text_shape(models, tokenizer)
    return SDXLText(np.zeros((1, tokens, channels), np.float32), np.zeros((1, pooled_channels), np.float32))


READER = TextReader(
    type=SDXLText,
    parts=("text_encoder", "text_encoder_2"),
    networks=lambda models: (models.text_encoder, models.text_encoder_2),
    encode=encode,
    read=read,
    check_options=lambda encoders, options: clip_text.check_skip(encoders, options, 1),
    check=check,
    join=join,
    length=length,
    negative=negative,
)
