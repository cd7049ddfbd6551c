"""Words to embeddings: blocks of one size, so that one program serves, and what is known is not computed again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from sega_jax.pipelines.execution.devices import Devices
from sega_jax.text.prompt_weights import Reading, chunks, weighed
from sega_jax.text.tokenizers import Tokenizer

# Texts in one call of the program, and how many embeddings are remembered.
_BLOCK, _REMEMBERED = 8, 256


class Embeddings:
    """The embeddings of texts, remembered by their tokens.

    Args:
        encode: (text encoder, tokens [texts, ...]) -> hidden states [texts, tokens, channels].
        devices: where `encode` is compiled.
    """

    def __init__(self, encode: Callable, devices: Devices):
        self._encode, self._devices = encode, devices
        self._known: dict[bytes, np.ndarray] = {}

    def __call__(
        self, text_encoder: Any, tokenizer: Callable[[Sequence[str]], np.ndarray], texts: Sequence[str]
    ) -> np.ndarray:
        """[texts, tokens, channels], by a text encoder that is the same until `clear`, and a tokenizer that gives
        tokens [texts, ...] on the host."""
        tokens = tokenizer(texts)
        new = list({row.tobytes(): row for row in tokens if row.tobytes() not in self._known}.items())
        program = self._devices.map(self._encode, None)
        found = {}
        for i in range(0, len(new), _BLOCK):
            block = new[i : i + _BLOCK]
            padded = np.stack([row for _, row in block] + [block[0][1]] * (_BLOCK - len(block)))
            hidden = np.asarray(program(text_encoder, padded))
            found |= {name: vector for (name, _), vector in zip(block, hidden, strict=False)}
        found |= {row.tobytes(): self._known[row.tobytes()] for row in tokens if row.tobytes() in self._known}
        self._known |= found
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return np.stack([found[row.tobytes()] for row in tokens])

    def read(self, text_encoder: Any, tokenizer: Tokenizer, texts: Sequence[str], reading: Reading) -> list[np.ndarray]:
        """The embedding of each text [tokens, channels], read in chunks or with weights: those of its chunks side by
        side.

        Raises:
            ValueError: a weight that is no number.
        """
        # By `map`, which has no frame of its own for the warnings to count.
        read = list(map(partial(chunks, tokenizer, reading=reading), texts))
        ids = np.concatenate([one.ids for one in read])
        hidden = self(text_encoder, lambda _: ids, texts)
        parts = np.split(hidden, np.cumsum([len(one.ids) for one in read])[:-1])
        return [np.concatenate(weighed(part, one.weights)) for part, one in zip(parts, read, strict=True)]

    def clear(self) -> None:
        """Forgets all, for another text encoder."""
        self._known.clear()


def as_long(texts: Sequence[np.ndarray], none: np.ndarray) -> list[np.ndarray]:
    """Embeddings [tokens, channels] as long as the longest, by that of no words after them, as often as it takes."""
    longest = max(map(len, texts))
    return [np.concatenate([text, *[none] * ((longest - len(text)) // len(none))]) for text in texts]
