"""Words to tokens, by the tokenizers that checkpoints ship."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.checkpoint import CheckpointError, read_json


class Tokenizer:
    """CLIP's tokenizer from a folder.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt, and the tokenizer's settings.
        positions: that the text encoder has; `length` is at most these.
        vocabulary: the number of embeddings that it has.

    Raises:
        CheckpointError: missing or broken files, or tokens that the text encoder does not have.
    """

    def __init__(self, folder: Path, positions: int, vocabulary: int):
        from transformers import CLIPTokenizer  # seconds to import, and of no use without a checkpoint

        missing = [str(folder / name) for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{' and '.join(missing)} missing: the tokenizer needs tokenizer.json, or vocab.json and merges.txt"
            )
        settings = {path.name: read_json(path) for path in folder.glob("*.json")}
        length = settings.get("tokenizer_config.json", {}).get("model_max_length", positions)
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise CheckpointError(f"{folder}: the tokenizer's model_max_length={length!r} should be a number like 77")
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            special = {name: getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            last = max(self._tokenizer.get_vocab().values())
        except Exception as error:  # the library raises anything from KeyError to its own
            raise CheckpointError(f"{folder} holds no readable CLIP tokenizer ({error})") from None
        for name, token in special.items():
            if token is None:
                raise CheckpointError(f"{folder}: the tokenizer names no {name}_token")
        if last >= vocabulary:
            raise CheckpointError(
                f"{folder}: the tokenizer has {len(self._tokenizer)} tokens, the last of number {last}, the text"
                f" encoder {vocabulary}; do the two folders belong together?"
            )
        self.length = min(length, positions)

    def __call__(self, texts: Sequence[str], *, warn: bool = True) -> np.ndarray:
        """int32 ids [texts, length], padded; longer texts keep their end token and a warning has the rest."""
        ids = self._tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True).input_ids
        if warn:
            _warn_of_cuts(self._tokenizer, texts, self.length)
        return np.asarray(ids, np.int32)


class TokenizerPair:
    """Stable Diffusion XL's two tokenizers, of one vocabulary and length, which pad with different tokens."""

    def __init__(self, first: Tokenizer, second: Tokenizer):
        if first.length != second.length:
            raise CheckpointError(
                f"the tokenizers make {first.length} and {second.length} tokens; do they belong together?"
            )
        self.first, self.second, self.length = first, second, first.length

    def __call__(self, texts: Sequence[str], second: Sequence[str] | None = None) -> np.ndarray:
        """int32 ids [texts, 2, length], padded; longer texts are cut as by one. `second` are for the second where it
        reads others."""
        others = self.second(texts, warn=False) if second is None else self.second(second)
        return np.stack([self.first(texts), others], 1)


class T5Tokenizer:
    """T5's tokenizer from a folder, as DeepFloyd-IF uses it: lower case, 77 tokens, padding that is masked.

    Args:
        folder: holds tokenizer.json, or spiece.model, which needs the extra "if".
        vocabulary: the number of the text encoder's embeddings.

    Raises:
        CheckpointError: missing or broken files, or tokens that the text encoder does not have.
    """

    length = 77

    def __init__(self, folder: Path, vocabulary: int):
        from transformers import T5Tokenizer

        if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise CheckpointError(f"{folder} has neither tokenizer.json nor spiece.model; is it a whole checkpoint?")
        missing = [name for name in ("google.protobuf", "sentencepiece") if not _is_installed(name)]
        if missing and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f'{folder / "spiece.model"} cannot be read without {" and ".join(missing)}: pip install "sega_jax[if]"'
            )
        try:
            self._tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
            special = [getattr(self._tokenizer, f"{name}_token_id") for name in ("eos", "pad")]
            ends = self._tokenizer("").input_ids
            last = max(self._tokenizer.get_vocab().values())
        except Exception as error:  # the library raises anything from KeyError to its own
            raise CheckpointError(f"{folder} holds no readable T5 tokenizer ({error})") from None
        if ends != special[:1]:
            raise CheckpointError(
                f"{folder}: the tokenizer makes {ends} of no words, expected its end token {special[0]}"
            )
        if last >= vocabulary:
            raise CheckpointError(
                f"{folder}: the tokenizer's last token is of number {last}, the text encoder has {vocabulary}; do the"
                " two folders belong together?"
            )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 ids and mask [texts, 2, length], 0 for padding; longer texts keep their end token and a warning has
        the rest."""
        texts = [text.lower().strip() for text in texts]
        made = self._tokenizer(texts, padding="max_length", max_length=self.length, truncation=True)
        _warn_of_cuts(self._tokenizer, texts, self.length)
        return np.stack([np.asarray(made.input_ids, np.int32), np.asarray(made.attention_mask, np.int32)], 1)


class ByteTokenizer:
    """ByT5's tokens: the bytes of UTF-8, each 3 more, and an end token, 1. Whatever is spelt is bytes.

    Args:
        vocabulary: the number of the text encoder's embeddings.

    Raises:
        CheckpointError: the text encoder has no embeddings for all bytes.
    """

    # The most tokens, as in Paella's inference code; and what lengths are multiples of, so that few are compiled for.
    most, block = 768, 64

    def __init__(self, vocabulary: int):
        if vocabulary < 259:
            raise CheckpointError(f"ByT5 has {vocabulary} embeddings, expected at least 259, of 256 bytes and 3 more")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 ids and mask [texts, 2, tokens], 0 for padding to a multiple of `block`; longer texts keep their end
        token and a warning has the rest."""
        bytewise = [text.encode() for text in texts]
        for text, whole in zip(texts, bytewise, strict=True):
            if cut := whole[self.most - 1 :].decode(errors="replace"):
                warnings.warn(
                    f"the text encoder reads {self.most} tokens; cut from the end of {text[:40]!r}: {cut!r}",
                    stacklevel=7,
                )
        ids = [[byte + 3 for byte in whole[: self.most - 1]] + [1] for whole in bytewise]
        length = -(-max(map(len, ids), default=1) // self.block) * self.block
        made = np.zeros((len(ids), 2, length), np.int32)
        for row, tokens in zip(made, ids, strict=True):
            row[0, : len(tokens)], row[1, : len(tokens)] = tokens, 1
        return made


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _warn_of_cuts(tokenizer: Any, texts: Sequence[str], length: int) -> None:
    for text, whole in zip(texts, tokenizer(list(texts), verbose=False).input_ids, strict=True):
        if len(whole) > length:
            cut = tokenizer.decode(whole[length - 1 : -1])
            warnings.warn(
                f"the text encoder reads {length} tokens; cut from the end of {text[:40]!r}: {cut!r}", stacklevel=7
            )
