"""Words and conditioning to what `advance` takes: the text of every branch of every row, on the devices."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.pipelines.batch import Batch, Words
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import warn
from sega_jax.systems.base import Encode


def reads(pipe: LoadedCheckpoint) -> bool:
    """Tells whether a pipeline can read words."""
    return pipe.system.text.networks(pipe.models) is not None and pipe.tokenizer is not None


def check_reads(pipe: LoadedCheckpoint, words: Sequence[str]) -> None:
    """Refuses words where nothing reads them.

    Raises:
        ValueError: there are words, and no text encoder.
    """
    if words and not reads(pipe):
        missing = "text encoder" if pipe.system.text.networks(pipe.models) is None else "tokenizer"
        unread = next(filter(None, words), "")
        what = repr(unread[:40]) if unread else "'', which no negative prompt means,"
        raise ValueError(
            f"{what} cannot be read: this pipeline has no {missing}. Give embeddings, as `encode` of another"
            f" stage makes them, for all words (also negative_prompt), or load it with its {missing}"
        )


def read_words(pipe: LoadedCheckpoint, words: Sequence[str], options: Mapping[str, Any]) -> list[Any]:
    """Returns the conditioning of words, a text of one row each, on the host.

    Args:
        options: how they are read, arguments of the family's `TextReader.read`.

    Raises:
        ValueError: there is no text encoder, or as the family's reader.
    """
    check_reads(pipe, words)
    reader = pipe.system.text
    encode = Encode(reader.networks(pipe.models), pipe.embeddings)
    return reader.read(words, pipe.tokenizer, encode, warn, **options)


def join(pipe: LoadedCheckpoint, texts: Sequence[Any], options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Joins texts of one row to one text, in the networks' dtype.

    Args:
        options: how the empty words that pad them are read, as of `read_words`.

    Raises:
        ValueError: texts do not go together, or have to be padded and nothing reads the words for that.
    """

    def cast(leaf):
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf).astype(pipe.dtype, copy=False) if floats else np.asarray(leaf)

    def blank():
        if not reads(pipe):
            shapes = " and ".join(dict.fromkeys(map(repr, texts)))
            raise ValueError(
                f"texts have different lengths: {shapes}, and this pipeline cannot pad them, because it reads no words;"
                " encode them in one call, or load the pipeline with its tokenizer"
            )
        return jax.tree.map(cast, read_words(pipe, [""], options)[0])

    return pipe.system.text.join([jax.tree.map(cast, text) for text in texts], blank)


def branch_texts(pipe: LoadedCheckpoint, batch: Batch, n: int) -> Any:
    """Returns the text of all branches, [rows, 2 + n, ...] on the devices; concepts that pad a row are empty words.

    Raises:
        ValueError: there are words and nothing reads them, or texts do not go together.
    """
    text = pipe.devices.split(joined_branches(pipe, batch, n))
    reader = pipe.system.text
    prior = reader.prior(pipe.models)
    if reader.sample_prior is None or prior is None:
        return text
    keys = pipe.devices.split(batch.settings.key)
    return pipe.devices.map(reader.sample_prior, (None, 0, 0))(prior, text, keys)


def joined_branches(pipe: LoadedCheckpoint, batch: Batch, n: int) -> Any:
    """Returns the text of all branches, [rows, 2 + n, ...] on the host, before a prior.

    Raises:
        ValueError: as `branch_texts`.
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
        # Negative prompts are padded by empty words that are read as they are.
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
    """Returns the conditioning of all words among branches, by the words."""
    words = list(dict.fromkeys(branch for branch in branches if isinstance(branch, str)))
    return dict(zip(words, read_words(pipe, words, reading), strict=True)) if words else {}


def branches_of(pipe: LoadedCheckpoint, batch: Batch, n: int) -> list[list[Words]]:
    """Returns the branches of every row: the negative prompt, the prompt and n concepts, filled up by empty words."""
    able = reads(pipe)
    return [
        [negative, prompt, *(edit.concept for edit in edits), *["" if able else negative] * (n - len(edits))]
        for negative, prompt, edits in zip(batch.negatives, batch.prompts, batch.edits, strict=True)
    ]
