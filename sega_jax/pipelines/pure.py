"""A call as one pure function of arrays, for research, gradients and export."""

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
    """A pure function that makes the pictures of a call, and its arguments: `jax.jit(function)(**arguments)`."""

    function: Callable[..., jax.Array]  # `sega_jax.systems.programs.generate` without its first and static arguments
    arguments: dict[str, Any]  # models, ids, table, settings, x, picture, picture_noise and text


def pure_call(pipe: LoadedCheckpoint, batch: Batch) -> PureCall:
    """Returns a batch as a pure function and its arguments.

    The function reads tokens by the text encoders where the prompts and concepts are words that are read one by one, as
    they are by default. Otherwise the text conditioning of all branches is an argument.

    Raises:
        ValueError: the call asks for something besides pictures, which the function cannot give.
    """
    if batch.output not in PICTURES or batch.static.record or batch.callback is not None:
        raise ValueError(
            "a pure function makes pictures alone; leave out record, callback and output, which it cannot give"
        )
    ids, text = _read(pipe, batch)
    function = partial(
        programs.generate, pipe.system, shape=batch.shape, static=batch.static, decode=dict(batch.decode)
    )
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


def _read(pipe: LoadedCheckpoint, batch: Batch) -> tuple[Any, Any]:
    """Returns the tokens and the conditioning of a batch's branches, as `generate` takes them."""
    rows = branches_of(pipe, batch, batch.n)
    # A family may have conditioning of its own in place of no negative prompt.
    given = int(all(not isinstance(row[0], str) for row in rows))
    words: list[Any] = [branch for row in rows for branch in row[given:]]
    if any(batch.reading.values()) or not all(isinstance(word, str) for word in words):
        return None, joined_branches(pipe, batch, batch.n)
    flat = _tokens(pipe, words)
    ids = jax.tree.map(lambda leaf: leaf.reshape(batch.rows, -1, *leaf.shape[1:]), flat)
    if not given:
        return ids, None
    negatives = join(pipe, [row[0] for row in rows])
    if not _alike(negatives, jax.eval_shape(pipe.system.text.encode, pipe.system.text.networks(pipe.models), flat)):
        return None, joined_branches(pipe, batch, batch.n)
    return ids, jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], negatives)


def _alike(one: Any, other: Any) -> bool:
    """Tells whether two texts can be joined as they are."""

    def shapes(text):
        return [(path, leaf.shape[1:]) for path, leaf in jax.tree_util.tree_leaves_with_path(text)]

    return shapes(one) == shapes(other)


def _tokens(pipe: LoadedCheckpoint, words: list[str]) -> Any:
    """Returns the tokens that a family's reader encodes, a pytree of arrays with the words first."""
    check_reads(pipe, words)
    kept: list[Any] = []
    reader = pipe.system.text
    networks = reader.networks(pipe.models)

    def encode(networks, ids):
        kept.append(jax.tree.map(np.asarray, ids))
        return pipe.embeddings(networks, ids)

    reader.read(words, pipe.tokenizer, Encode(networks, encode), warn)
    (ids,) = kept
    return ids
