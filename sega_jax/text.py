"""Words to tokens, by the tokenizer that a checkpoint ships."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sega_jax.checkpoint import CheckpointError, read_json


class Tokenizer:
    """CLIP's tokenizer from a folder, at a fixed length.

    Raises:
        CheckpointError: missing or broken files, or a vocabulary that the text encoder does not have.
    """

    def __init__(self, folder: Path, length: int, vocabulary: int):
        from transformers import CLIPTokenizer  # seconds to import, and of no use without a checkpoint

        whole = folder / "tokenizer.json"
        parts = [folder / "vocab.json", folder / "merges.txt"]
        missing = [path for path in parts if not path.is_file()]
        if missing and not whole.is_file():
            raise CheckpointError(
                f"{' and '.join(str(p) for p in missing)} missing: the tokenizer needs tokenizer.json, or"
                " vocab.json and merges.txt"
            )
        for path in [*folder.glob("*.json")]:
            read_json(path)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises anything from KeyError to its own
            raise CheckpointError(f"{folder} holds no readable CLIP tokenizer ({error})") from None
        self.length = min(length, self._tokenizer.model_max_length)
        if len(self._tokenizer) > vocabulary:
            raise CheckpointError(
                f"{folder} has {len(self._tokenizer)} tokens, the text encoder {vocabulary}; do the two"
                " folders belong together?"
            )
        if self._tokenizer.pad_token_id is None:
            raise CheckpointError(f"{folder}: the tokenizer names no pad_token (special_tokens_map.json)")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 ids [texts, length], padded; longer texts keep their end token and a warning has the rest."""
        ids = self._tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True).input_ids
        for text in texts:
            # Every token but the first and last stands for at least one character.
            if len(text) > self.length - 2:
                whole = self._tokenizer(text).input_ids
                if len(whole) > self.length:
                    cut = self._tokenizer.decode(whole[self.length - 1 : -1])
                    warnings.warn(
                        f"the text encoder reads {self.length} tokens; cut from the end of {text[:40]!r}...: {cut!r}",
                        stacklevel=5,
                    )
        return np.asarray(ids, np.int32)
