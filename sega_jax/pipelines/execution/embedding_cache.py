"""Encodes tokens as text conditioning, and caches the results.

Texts are encoded in blocks of a fixed size, so that all blocks share one compiled program.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sega_jax.pipelines.execution.devices import Devices

_BLOCK = 8  # the number of texts that one call of the program encodes
_CAPACITY = 256  # the maximum number of cached texts


class EmbeddingCache:
    """A cache of text conditioning, keyed by the texts' tokens.

    Args:
        encode: A function (networks, ids) -> a family's `Text`, where ids is a pytree of arrays [texts, ...].
        devices: The devices for which `encode` is compiled.
    """

    def __init__(self, encode: Callable[[Any, Any], Any], devices: Devices):
        self._encode, self._devices = encode, devices
        self._cached: dict[tuple[bytes, ...], Any] = {}

    def __call__(self, networks: Any, ids: Any) -> list[Any]:
        """Returns the conditioning for each text, as NumPy arrays.

        Args:
            networks: The text networks.
            ids: The tokens, a pytree of arrays [texts, ...].

        Returns:
            A list with a one-row `Text` for each text.
        """
        leaves, structure = jax.tree.flatten(ids)
        keys = [tuple(leaf[i].tobytes() for leaf in leaves) for i in range(len(leaves[0]))]
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._cached}
        order = list(reversed(new.items()))
        program = self._devices.map(self._encode, None)
        encoded = {key: self._cached[key] for key in keys if key in self._cached}
        for first in range(0, len(order), _BLOCK):
            block = order[first : first + _BLOCK]
            rows = np.array([i for _, i in block] + [block[0][1]] * (_BLOCK - len(block)))
            block_ids = jax.tree.unflatten(structure, [leaf[rows] for leaf in leaves])
            texts = jax.tree.map(np.asarray, program(networks, block_ids))
            encoded |= {key: texts[k] for k, (key, _) in enumerate(block)}
        self._cached |= encoded
        while len(self._cached) > _CAPACITY:
            del self._cached[next(iter(self._cached))]
        return [encoded[key] for key in keys]

    def clear(self) -> None:
        """Empties the cache; call it when the networks change."""
        self._cached.clear()
