"""Encodes tokens to text conditioning, and caches the results.

Texts are encoded in blocks of one size, so that one compiled program serves all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sega_jax.pipelines.execution.devices import Devices

_BLOCK = 8  # texts in one call of the program
_CAPACITY = 256  # texts


class EmbeddingCache:
    """A cache of text conditioning, with the texts' tokens as keys.

    Args:
        encode: maps (networks, ids) to a family's `Text`; ids is a pytree of arrays [texts, ...].
        devices: the devices that compile `encode`.
    """

    def __init__(self, encode: Callable[[Any, Any], Any], devices: Devices):
        self._encode, self._devices = encode, devices
        self._cached: dict[tuple[bytes, ...], Any] = {}

    def __call__(self, networks: Any, ids: Any) -> list[Any]:
        """Returns the conditioning of each text, as NumPy arrays.

        Args:
            networks: the text networks.
            ids: the tokens, a pytree of arrays [texts, ...].

        Returns:
            A list with one `Text` of one row for each text.
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
