"""The training set of the text-to-image networks: portraits encoded by an autoencoder, and their captions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.demo.training.portraits import captions

# Encodes n portraits: (autoencoder, key, n) -> attributes [n, attributes], codes [n, height, width, ...], and the mean
# square error of the decoded pictures divided by the squared range of their values.
Encode = Callable[[Any, jax.Array, int], tuple[jax.Array, jax.Array, jax.Array]]
_DROPPED = 0.1  # the fraction of captions replaced by the empty caption, for classifier-free guidance
_BLOCK = 5000  # the number of texts passed to the tokenizer in one call


class Dataset(NamedTuple):
    """Encoded portraits and their captions, as arrays on the device."""

    attributes: jax.Array  # int32 [portraits, attributes]
    codes: jax.Array  # [portraits, 32, 32, ...]: the autoencoder's latents (float16) or tokens (int16)
    captions: jax.Array  # int16 [portraits, captions, length], token ids
    empty: jax.Array  # int16 [length], token ids of the empty caption
    deviation: float = 1.0  # the standard deviation by which the latents were divided

    def draw(
        self, batch: int, rows: jax.Array, captions: jax.Array, dropped: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Draws a batch of portraits, with one caption for each.

        Args:
            batch: the number of portraits.
            rows, captions: the random keys for choosing the portraits and their captions.
            dropped: the random key for choosing the 10 % of captions that become empty; None keeps all captions.

        Returns:
            The portraits' row indices, int32 [batch], and the captions' token ids, int32 [batch, length].
        """
        row = jax.random.randint(rows, (batch,), 0, len(self.codes))
        caption = jax.random.randint(captions, (batch,), 0, self.captions.shape[1])
        ids = self.captions[row, caption]
        if dropped is not None:
            ids = jnp.where(jax.random.uniform(dropped, (batch, 1)) < _DROPPED, self.empty[None], ids)
        return row, ids.astype(jnp.int32)


def encode_portraits(encode: Encode, autoencoder: Any, count: int) -> tuple[np.ndarray, jax.Array, float]:
    """Draws and encodes `count` portraits. The result is deterministic.

    Returns:
        The portraits' attributes [count, attributes] and codes [count, ...], and the peak signal-to-noise ratio of the
        decoded pictures, in decibels.
    """
    size, compiled = min(256, count), jax.jit(encode, static_argnums=2)
    parts = [compiled(autoencoder, jax.random.fold_in(jax.random.key(2), i), size) for i in range(-(-count // size))]
    attributes = np.concatenate([np.asarray(part) for part, _, _ in parts])[:count]
    codes = jnp.concatenate([part for _, part, _ in parts])[:count]
    return attributes, codes, -10 * math.log10(np.mean([float(error) for _, _, error in parts]))


def caption_portraits(
    attributes: np.ndarray, count: int, tokenise: Callable[[Sequence[str]], np.ndarray]
) -> tuple[jax.Array, jax.Array]:
    """Writes `count` captions for every portrait. The result is deterministic.

    Args:
        attributes: int [portraits, attributes].
        count: the number of captions for each portrait.
        tokenise: a function that maps texts to token ids [texts, length].

    Returns:
        Token ids of the captions, int16 [portraits, count, length], and of the empty caption, int16 [length].
    """
    rng = np.random.default_rng(3)
    texts = [captions(attributes, rng) for _ in range(count)]
    ids = [np.concatenate([tokenise(part[i : i + _BLOCK]) for i in range(0, len(part), _BLOCK)]) for part in texts]
    return jnp.asarray(np.stack(ids, 1), jnp.int16), jnp.asarray(tokenise([""])[0], jnp.int16)
