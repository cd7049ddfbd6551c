"""Tokens to text conditioning: in blocks of one size, so that one program serves, and remembered by the tokens."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sega_jax.pipelines.execution.devices import Devices

_BLOCK = 8  # texts in one call of the program
_REMEMBERED = 256  # texts


class EmbeddingCache:
    """The conditioning of texts, remembered by their tokens until `clear`.

    Args:
        encode: (networks, ids, a pytree with the texts first) -> a family's `Text`.
        devices: where `encode` is compiled.
    """

    def __init__(self, encode: Callable[[Any, Any], Any], devices: Devices):
        self._encode, self._devices = encode, devices
        self._known: dict[tuple[bytes, ...], Any] = {}

    def __call__(self, networks: Any, ids: Any) -> list[Any]:
        """Returns the texts of tokens, of one row each, on the host."""
        leaves, structure = jax.tree.flatten(ids)
        names = [tuple(leaf[i].tobytes() for leaf in leaves) for i in range(len(leaves[0]))]
        new = {name: i for i, name in reversed(list(enumerate(names))) if name not in self._known}
        order = list(reversed(new.items()))
        program = self._devices.map(self._encode, None)
        found = {name: self._known[name] for name in names if name in self._known}
        for first in range(0, len(order), _BLOCK):
            block = order[first : first + _BLOCK]
            rows = np.array([i for _, i in block] + [block[0][1]] * (_BLOCK - len(block)))
            block_ids = jax.tree.unflatten(structure, [leaf[rows] for leaf in leaves])
            texts = jax.tree.map(np.asarray, program(networks, block_ids))
            found |= {name: texts[k] for k, (name, _) in enumerate(block)}
        self._known |= found
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return [found[name] for name in names]

    def clear(self) -> None:
        """Forgets all texts, for other networks."""
        self._known.clear()
