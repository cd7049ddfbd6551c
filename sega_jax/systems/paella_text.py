"""Paella's text: states of ByT5, an embedding of CLIP, and an embedding of a picture that its prior draws."""

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
    """Texts as Paella takes them. Lengths are padded, and what is masked has no effect."""

    byt5: Any  # [texts, bytes, channels]
    mask: Any  # bool [texts, bytes], False for padding
    clip: Any  # [texts, channels]; None where no text has any
    has_clip: Any  # bool [texts]
    image: Any = None  # [texts, channels], an embedding of a picture, which the prompt's branch takes; or None


class Ids(NamedTuple):
    """Tokens of texts."""

    byt5: Any  # int32 ids and mask [texts, 2, bytes]
    clip: Any  # int32 [texts, tokens]; None without CLIP


def encode(networks: tuple[Any, Any], ids: Ids) -> PaellaText:
    """Encodes tokens.

    Raises:
        ValueError: there are no tokens for CLIP.
    """
    byt5, clip = networks
    if clip is not None and ids.clip is None:
        raise ValueError(
            "the models have a CLIP, and the pipeline has no tokenizer of its words; take another pipeline's"
            " (pipe.tokenizer), or leave out clip and prior"
        )
    states = byt5(ids.byt5[:, 0], ids.byt5[:, 1])
    embedding = None if clip is None else clip(ids.clip)
    return PaellaText(states, ids.byt5[:, 1] > 0, embedding, jnp.ones(len(states), bool))


def read(
    words: Sequence[str], tokenizer: tuple[Any, Any], encode: Encode, warn: Callable[[str], None]
) -> list[PaellaText]:
    """Reads words; each text is as long as it is."""
    byt5, clip = tokenizer
    ids = Ids(byt5(words, warn=warn), None if clip is None else clip(words, warn=warn))
    texts = []
    for text in encode(ids):
        length = int(np.asarray(text.mask).sum())
        texts.append(dataclasses.replace(text, byt5=text.byt5[:, :length], mask=text.mask[:, :length]))
    return texts


def check(models: Any, tokenizer: Any, value: Any) -> PaellaText:
    """Returns a user's conditioning as a text of one row: a `PaellaText`, or states of ByT5 [bytes, channels] alone,
    a branch without CLIP's embedding.

    Raises:
        TypeError, ValueError: it is of another family or shape.
    """
    width = models.denoiser.config.byt5_embd
    whole = isinstance(value, PaellaText)
    states = floating("an embedding", value.byt5[0] if whole else value, "(bytes, channels)")
    if states.ndim != 2 or states.shape[1] != width or not len(states):
        raise ValueError(f"an embedding has shape {states.shape}, expected (bytes, {width}), ByT5's states")
    if whole:
        return value
    return PaellaText(states[None], np.ones((1, len(states)), bool), None, np.zeros(1, bool))


def join(texts: Sequence[PaellaText], blank: Callable[[], PaellaText]) -> PaellaText:
    """Joins texts, padded to a multiple of 64 bytes."""
    del blank
    longest = max(text.byt5.shape[1] for text in texts)
    longest = -(-longest // ByteTokenizer.block) * ByteTokenizer.block
    known = next((text.clip for text in texts if text.clip is not None), None)

    def padded(text):
        more = longest - text.byt5.shape[1]
        return PaellaText(
            np.pad(text.byt5, ((0, 0), (0, more), (0, 0))),
            np.pad(text.mask, ((0, 0), (0, more))),
            np.zeros_like(known) if text.clip is None and known is not None else text.clip,
            text.has_clip,
        )

    return stacked([padded(text) for text in texts])


def sample_prior(prior: PriorModel, text: PaellaText, key: jax.Array) -> PaellaText:
    """Adds an embedding of a picture that fits the prompt, drawn with the key of each row. `text` is [rows, branches,
    ...]; all branches get the embedding, and the prompt's takes it."""
    if text.clip is None:
        return text
    keys = jax.vmap(lambda k: jax.random.fold_in(k, PRIOR))(key)
    noise = paella_prior.noise(keys, text.clip.shape[-1])
    image = paella_prior.sample_prior(prior, text.clip[:, 1], noise)
    return dataclasses.replace(text, image=jnp.broadcast_to(image[:, None], (*text.clip.shape[:2], image.shape[-1])))


def tokenizer(folder: Path, models: Any, given: Any) -> tuple[ByteTokenizer | None, Tokenizer | None]:
    """Returns the tokenizers of ByT5, which needs no files, and of CLIP; None for networks that are not there.

    Raises:
        TypeError: something else is given.
        CheckpointError: CLIP's cannot be read.
    """
    if isinstance(given, tuple):
        return given
    if given is not None:
        raise TypeError("tokenizer should be another pipeline's of Paella (pipe.tokenizer), or None")
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
