"""Paella's text conditioning: ByT5's hidden states, a CLIP text embedding, and a picture embedding from the prior."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.numerics import floating
from sega_jax.nn.prior import PriorModel
from sega_jax.systems import paella_prior
from sega_jax.systems.base import Encode, TextReader
from sega_jax.systems.conditioning import Text, conditioning, stacked
from sega_jax.systems.programs import PRIOR
from sega_jax.text.tokenizers import ByteTokenizer, Tokenizer


@conditioning
class PaellaText(Text):
    """Text conditioning for Paella. Texts are padded to the same length; masked bytes have no effect.

    Example:
        >>> import numpy as np
        >>> from sega_jax import PaellaText
        >>> PaellaText(np.zeros((1, 5, 2560), np.float32), np.ones((1, 5), bool), None, np.zeros(1, bool))
        PaellaText(byt5=float32[1, 5, 2560], mask=bool[1, 5], clip=None, has_clip=bool[1], image=None)
    """

    byt5: Any  # hidden states [texts, bytes, channels]
    mask: Any  # bool [texts, bytes], False for padding
    clip: Any  # [texts, channels], the CLIP embeddings; None if no text has one
    has_clip: Any  # bool [texts]
    image: Any = None  # [texts, channels], the picture embeddings, which only the prompt's branch uses; or None


class Ids(NamedTuple):
    """The token ids of texts, for ByT5 and CLIP."""

    byt5: Any  # int32 ids and mask [texts, 2, bytes]
    clip: Any  # int32 [texts, tokens]; None without CLIP


def encode(networks: tuple[Any, Any], ids: Ids) -> PaellaText:
    """Encodes texts from their token ids.

    Raises:
        ValueError: The networks include CLIP, but there are no token ids for it.
    """
    byt5, clip = networks
    if clip is not None and ids.clip is None:
        raise ValueError(
            "the models include CLIP, but the pipeline has no CLIP tokenizer; give another Paella pipeline's tokenizer"
            " (pipe.tokenizer), or leave out clip and the prior"
        )
    states = byt5(ids.byt5[:, 0], ids.byt5[:, 1])
    embedding = None if clip is None else clip(ids.clip)
    return PaellaText(states, ids.byt5[:, 1] > 0, embedding, jnp.ones(len(states), bool))


def read(
    words: Sequence[str], tokenizer: tuple[Any, Any], encode: Encode, warn: Callable[[str], None]
) -> list[PaellaText]:
    """Tokenizes and encodes strings, without padding them to the same length."""
    byt5, clip = tokenizer
    ids = Ids(byt5(words, warn=warn), None if clip is None else clip(words, warn=warn))
    texts = []
    for text in encode(ids):
        length = int(np.asarray(text.mask).sum())
        texts.append(dataclasses.replace(text, byt5=text.byt5[:, :length], mask=text.mask[:, :length]))
    return texts


def check(models: Any, tokenizer: Any, value: Any) -> PaellaText:
    """Returns a user's text conditioning as a `PaellaText` with one row.

    Args:
        value: A `PaellaText`, or ByT5's hidden states [bytes, channels] for a text without a CLIP embedding.

    Raises:
        TypeError, ValueError: The value belongs to a different family or has the wrong shape.
    """
    width = models.denoiser.config.byt5_embd
    is_text = isinstance(value, PaellaText)
    states = floating("an embedding", value.byt5[0] if is_text else value, "(bytes, channels)")
    if states.ndim != 2 or states.shape[1] != width or not len(states):
        raise ValueError(f"an embedding has shape {states.shape}, expected (bytes, {width}), ByT5's hidden states")
    if is_text:
        return value
    return PaellaText(states[None], np.ones((1, len(states)), bool), None, np.zeros(1, bool))


def join(texts: Sequence[PaellaText], blank: Callable[[], PaellaText]) -> PaellaText:
    """Joins texts and pads them to a multiple of 64 bytes."""
    del blank
    longest = max(text.byt5.shape[1] for text in texts)
    longest = -(-longest // ByteTokenizer.block) * ByteTokenizer.block
    example = next((text.clip for text in texts if text.clip is not None), None)

    def padded(text):
        more = longest - text.byt5.shape[1]
        return PaellaText(
            np.pad(text.byt5, ((0, 0), (0, more), (0, 0))),
            np.pad(text.mask, ((0, 0), (0, more))),
            np.zeros_like(example) if text.clip is None and example is not None else text.clip,
            text.has_clip,
        )

    return stacked([padded(text) for text in texts])


def sample_prior(prior: PriorModel, text: PaellaText, key: jax.Array) -> PaellaText:
    """Adds picture embeddings to a text [rows, branches, ...]; each is drawn for a row's prompt, using the row's key.

    All branches of a row get its embedding, but only the prompt's branch uses it. A text without CLIP embeddings is
    returned unchanged.
    """
    if text.clip is None:
        return text
    keys = jax.vmap(lambda k: jax.random.fold_in(k, PRIOR))(key)
    noise = paella_prior.noise(keys, text.clip.shape[-1])
    image = paella_prior.sample_prior(prior, text.clip[:, 1], noise)
    return dataclasses.replace(text, image=jnp.broadcast_to(image[:, None], (*text.clip.shape[:2], image.shape[-1])))


def tokenizer(folder: Path, models: Any, override: Any) -> tuple[ByteTokenizer | None, Tokenizer | None]:
    """Returns the tokenizers for ByT5 and CLIP as a pair, with None for a missing network. ByT5's needs no files.

    A user's pair of tokenizers is returned unchanged.

    Raises:
        TypeError: The user's tokenizer is not a pair.
        CheckpointError: CLIP's tokenizer cannot be read.
    """
    if isinstance(override, tuple):
        return override
    if override is not None:
        raise TypeError("tokenizer should be another Paella pipeline's tokenizer (pipe.tokenizer) or None")
    byt5 = None if models.byt5 is None else ByteTokenizer(models.byt5.config.vocab_size)
    if models.clip is None:
        return byt5, None
    text = models.clip.config
    return byt5, Tokenizer(folder / "tokenizer", text.max_position_embeddings, text.vocab_size)


READER = TextReader(
    type=PaellaText,
    parts=("byt5", "clip"),
    networks=lambda models: None if models.byt5 is None else (models.byt5, models.clip),
    encode=encode,
    read=read,
    check=check,
    join=join,
    prior=lambda models: models.prior,
    sample_prior=sample_prior,
)
