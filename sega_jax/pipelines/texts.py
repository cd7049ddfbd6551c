"""Encodes the texts of a batch, and joins them into the text conditioning that `advance` takes."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.arguments import arguments
from sega_jax.method.naming import assignment
from sega_jax.pipelines.batch import Batch, Words
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import warn
from sega_jax.systems.base import Encode


def reads(pipe: LoadedCheckpoint) -> bool:
    """Returns whether a pipeline can encode strings, for which it needs a text encoder and a tokenizer."""
    return pipe.system.text.networks(pipe.models) is not None and pipe.tokenizer is not None


def check_reads(pipe: LoadedCheckpoint, words: Sequence[str]) -> None:
    """Checks that a pipeline can encode strings, if there are any to encode.

    Raises:
        ValueError: There are strings, but the pipeline has no text encoder or no tokenizer.
    """
    if words and not reads(pipe):
        missing = "text encoder" if pipe.system.text.networks(pipe.models) is None else "tokenizer"
        unread = next(filter(None, words), "")
        what = repr(unread[:40]) if unread else "'' (the default negative prompt)"
        raise ValueError(
            f"{what} cannot be encoded, because this pipeline has no {missing}; load it with its {missing}, or pass"
            " embeddings for all texts, including negative_prompt, from another pipeline's `encode`"
        )


def read_words(pipe: LoadedCheckpoint, words: Sequence[str], options: Mapping[str, Any]) -> list[Any]:
    """Encodes strings as a list of texts with one row each, on the host.

    Args:
        pipe: The pipeline.
        words: The strings.
        options: Arguments for the family's `TextReader.read`, such as `clip_skip`.

    Raises:
        ValueError: The pipeline has no text encoder or tokenizer; the family's `TextReader.read` lists further cases.
    """
    check_reads(pipe, words)
    reader = pipe.system.text
    encode = Encode(reader.networks(pipe.models), pipe.embeddings)
    return reader.read(words, pipe.tokenizer, encode, partial(_warn, pipe), **options)


def _warn(pipe: LoadedCheckpoint, message: str) -> None:
    """Warns of a truncated text, and adds the remedy."""
    longer = f"give {assignment('long_prompts', True)} to read all of it, or shorten it"
    warn(f"{message}; {longer if 'long_prompts' in arguments(pipe.system.call) else 'shorten it'}")


def join(pipe: LoadedCheckpoint, texts: Sequence[Any], options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Joins texts with one row each into one text with all rows, in the networks' dtype.

    Args:
        pipe: The pipeline.
        texts: The texts.
        options: As for `read_words`; they are used to encode the empty text that pads shorter texts.

    Raises:
        ValueError: The texts cannot be joined, or they need padding and the pipeline cannot encode the empty text.
    """

    def cast(leaf):
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf).astype(pipe.dtype, copy=False) if floats else np.asarray(leaf)

    def blank():
        if not reads(pipe):
            shapes = " and ".join(dict.fromkeys(map(repr, texts)))
            raise ValueError(
                f"texts have different lengths: {shapes}; this pipeline cannot pad them, because it cannot encode"
                " words; encode them in one call, or load the pipeline with its text encoder and tokenizer"
            )
        return jax.tree.map(cast, read_words(pipe, [""], options)[0])

    return pipe.system.text.join([jax.tree.map(cast, text) for text in texts], blank)


def branch_texts(pipe: LoadedCheckpoint, batch: Batch, n: int) -> Any:
    """Returns the text conditioning of all branches, [rows, 2 + n, ...] on the devices.

    Rows with fewer than n concepts are padded with the empty text.

    Raises:
        ValueError: The pipeline cannot encode strings, or the texts cannot be joined.
    """
    text = pipe.devices.split(joined_branches(pipe, batch, n))
    reader = pipe.system.text
    prior = reader.prior(pipe.models)
    if reader.sample_prior is None or prior is None:
        return text
    keys = pipe.devices.split(batch.settings.key)
    return pipe.devices.map(reader.sample_prior, (None, 0, 0))(prior, text, keys)


def joined_branches(pipe: LoadedCheckpoint, batch: Batch, n: int) -> Any:
    """Returns the text conditioning of all branches, [rows, 2 + n, ...] on the host, before the prior adds embeddings.

    Raises:
        ValueError: As for `branch_texts`.
    """
    rows = branches_of(pipe, batch, n)
    negatives, others = [row[0] for row in rows], [branch for row in rows for branch in row[1:]]
    if batch.negative_reading == batch.reading:
        known = known_negatives = _read_once(pipe, negatives + others, batch.reading)
    else:
        known = _read_once(pipe, others, batch.reading)
        known_negatives = _read_once(pipe, negatives, batch.negative_reading)
    branches = []
    for negative, *rest in rows:
        branches.append(known_negatives[negative] if isinstance(negative, str) else negative)
        branches += [known[branch] if isinstance(branch, str) else branch for branch in rest]
    text = join(pipe, branches, batch.reading)
    if batch.negative_reading != batch.reading:
        # Negative prompts are padded with the empty text, which is encoded with the options for negative prompts.
        padded = join(pipe, branches, batch.negative_reading)
        negative = np.arange(len(branches)) % (2 + n) == 0
        text = jax.tree.map(
            lambda of_negatives, of_others: np.where(
                negative.reshape(-1, *[1] * (of_others.ndim - 1)), of_negatives, of_others
            ),
            padded,
            text,
        )
    return jax.tree.map(lambda leaf: leaf.reshape(batch.rows, 2 + n, *leaf.shape[1:]), text)


def _read_once(pipe: LoadedCheckpoint, branches: Sequence[Words], reading: Mapping[str, Any]) -> dict[str, Any]:
    """Encodes each distinct string among the branches once, and returns {string: text}."""
    words = list(dict.fromkeys(branch for branch in branches if isinstance(branch, str)))
    return dict(zip(words, read_words(pipe, words, reading), strict=True)) if words else {}


def branches_of(pipe: LoadedCheckpoint, batch: Batch, n: int) -> list[list[Words]]:
    """Lists each row's branches: the negative prompt, the prompt and n concepts (padded with the empty text)."""
    can_encode = reads(pipe)
    return [
        [negative, prompt, *(edit.concept for edit in edits), *["" if can_encode else negative] * (n - len(edits))]
        for negative, prompt, edits in zip(batch.negatives, batch.prompts, batch.edits, strict=True)
    ]
