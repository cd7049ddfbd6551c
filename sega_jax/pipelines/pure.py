"""Converts a call to a pure function of arrays, for research, gradients and export."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.pipelines.batch import Batch
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.texts import branches_of, check_reads, join, joined_branches
from sega_jax.systems import programs
from sega_jax.systems.base import Encode
from sega_jax.systems.call import PICTURES


class PureCall(NamedTuple):
    """A pure function, with its arguments, that generates a call's pictures: `jax.jit(function)(**arguments)`."""

    function: Callable[..., jax.Array]  # `sega_jax.systems.programs.generate` with its static arguments already set
    arguments: dict[str, Any]  # models, ids, table, settings, x, picture, picture_noise and text


def pure_call(pipe: LoadedCheckpoint, batch: Batch) -> PureCall:
    """Converts a batch to a pure function and its arguments.

    If all prompts and concepts are strings and the encoding options have their defaults, the function takes tokens and
    runs the text encoders. Otherwise, it takes the text conditioning of all branches.

    Raises:
        ValueError: The call requests something other than pictures: a record, a callback, or the final state.
    """
    unsupported = {
        "record=True": batch.static.record,
        "callback": batch.callback is not None,
        f"output={batch.output!r}": batch.output not in PICTURES,
    }
    for name in (name for name, present in unsupported.items() if present):
        raise ValueError(f"as_function returns only pictures and does not support {name}; leave it out")
    ids, text = _ids_and_text(pipe, batch)
    static = {"shape": batch.shape, "static": batch.static, "decode": dict(batch.decode)}
    function = pipe.devices.with_options(partial(programs.generate, pipe.system), static)
    arguments = {
        "models": pipe.models,
        "ids": ids,
        "table": batch.table,
        "settings": batch.settings,
        "x": batch.x,
        "picture": batch.picture,
        "picture_noise": batch.picture_noise,
        "text": text,
    }
    return PureCall(function, arguments)


def _ids_and_text(pipe: LoadedCheckpoint, batch: Batch) -> tuple[Any, Any]:
    """Returns `generate`'s arguments `ids` and `text` for the branches of a batch."""
    rows = branches_of(pipe, batch, batch.n)
    # A family may represent a missing negative prompt with special text conditioning.
    encoded_negatives = int(all(not isinstance(row[0], str) for row in rows))
    words: list[Any] = [branch for row in rows for branch in row[encoded_negatives:]]
    if any(batch.reading.values()) or not all(isinstance(word, str) for word in words):
        return None, joined_branches(pipe, batch, batch.n)
    flat = _tokens(pipe, words)
    ids = jax.tree.map(lambda leaf: leaf.reshape(batch.rows, -1, *leaf.shape[1:]), flat)
    if not encoded_negatives:
        return ids, None
    negatives = join(pipe, [row[0] for row in rows])
    if not _same_shapes(
        negatives, jax.eval_shape(pipe.system.text.encode, pipe.system.text.networks(pipe.models), flat)
    ):
        return None, joined_branches(pipe, batch, batch.n)
    return ids, jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], negatives)


def _same_shapes(one: Any, other: Any) -> bool:
    """Returns whether the rows of two texts have the same shapes."""

    def shapes(text):
        return [(path, leaf.shape[1:]) for path, leaf in jax.tree_util.tree_leaves_with_path(text)]

    return shapes(one) == shapes(other)


def _tokens(pipe: LoadedCheckpoint, words: list[str]) -> Any:
    """Returns the tokens that the family's `TextReader` passes to `encode`, as a pytree of arrays [words, ...]."""
    check_reads(pipe, words)
    captured: list[Any] = []
    reader = pipe.system.text
    networks = reader.networks(pipe.models)

    def encode(networks, ids):
        captured.append(jax.tree.map(np.asarray, ids))
        return pipe.embeddings(networks, ids)

    reader.read(words, pipe.tokenizer, Encode(networks, encode), warn)
    (ids,) = captured
    return ids
