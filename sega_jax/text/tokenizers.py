"""Words to tokens, by the tokenizers that checkpoints ship."""

import copy
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import count as counted
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.text.files import CheckpointError, read_json

Warn = Callable[[str], None]


class Tokenizer:
    """CLIP's tokenizer from a folder.

    A word that was added as the tokens `<word>`, `<word>_1`, ... is read as all of them, as in diffusers.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt, and the tokenizer's settings.
        positions: that the text encoder has; `length` is at most these.
        vocabulary: the number of embeddings that it has.

    Raises:
        CheckpointError: missing or broken files, or tokens that the text encoder does not have.
    """

    library_class = "CLIPTokenizer"

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
        # Words of several tokens, in the form of `_normal`. As in diffusers, names say which tokens belong together.
        self._spelt: dict[str, str] = {}
        added = self._tokenizer.get_added_vocab()
        for word in added:
            names = [word, *takewhile(added.__contains__, (f"{word}_{i}" for i in counted(1)))]
            if len(names) > 1:
                self._spelt[_normal(word)] = " ".join(names)

    def save(self, folder: Path) -> None:
        """Writes the files to a folder, from which this is read again, with its new words."""
        _save(self._tokenizer, folder, self.length)

    @property
    def pad(self) -> str:
        """The token that pads."""
        return self._tokenizer.pad_token

    def pair(self) -> "TokenizerPair":
        """This, which pads with its end token, and one that pads with the first of the vocabulary, "!" in published
        ones, which then means itself wherever it stands: Stable Diffusion XL's.

        Raises:
            CheckpointError: it pads with another token.
        """
        if self.pad != self._tokenizer.eos_token:
            raise CheckpointError(
                f"the tokenizer pads with {self.pad!r}, as those of Stable Diffusion 2.x and the second of XL do; give"
                f" one that pads with {self._tokenizer.eos_token!r}, as that of 1.x and the first of XL"
            )
        second = copy.copy(self)
        second._tokenizer = copy.deepcopy(self._tokenizer)
        second._tokenizer.add_special_tokens({"pad_token": self._tokenizer.convert_ids_to_tokens(0)})
        return TokenizerPair(self, second)

    def having(self, words: Mapping[str, int]) -> tuple["Tokenizer", list[int]]:
        """A tokenizer that has these words besides, each of so many tokens, and the tokens' ids, in order.

        Raises:
            ValueError: a word is there already, is none, or has spaces.
        """
        names: list[str] = []
        made = copy.copy(self)
        made._tokenizer, made._spelt = copy.deepcopy(self._tokenizer), dict(self._spelt)
        known = {*self._tokenizer.get_vocab(), *map(_normal, self._tokenizer.get_added_vocab())}
        for word, count in words.items():
            if not word or word != "".join(word.split()):
                raise ValueError(f"{word!r} should be a word without spaces, such as <{''.join(word.split())}>")
            own = [word, *(f"{word}_{i}" for i in range(1, count))]
            before = {*known, *map(_normal, names)}
            if taken := [name for name in (*own, f"{word}_1") if name in known or _normal(name) in before]:
                raise ValueError(f"the tokenizer has {taken[0]!r} already; give another word, such as <{word}>")
            names += own
            if count > 1:
                made._spelt[_normal(word)] = " ".join(own)
        made._tokenizer.add_tokens(names)
        for name in names:
            # Special tokens come first, such as the "!" of Stable Diffusion XL.
            if len(made._tokenizer.tokenize(name)) != 1:
                raise ValueError(f"{name!r} has a special token in it, such as {self.pad!r}; give another word")
        return made, made._tokenizer.convert_tokens_to_ids(names)

    def _written_out(self, text: str) -> str:
        """Returns a text with all tokens of words that have several. CLIP's tokenizer takes these words in any case,
        and so does this."""
        if not self._spelt:
            return text
        words = "|".join(map(re.escape, sorted(self._spelt, key=len, reverse=True)))
        text = unicodedata.normalize("NFC", text)
        return re.sub(words, lambda match: self._spelt.get(_normal(match[0]), match[0]), text, flags=re.IGNORECASE)

    def __call__(self, texts: Sequence[str], *, warn: Warn | None = warnings.warn) -> np.ndarray:
        """Returns int32 ids [texts, length], padded; longer texts keep their end token, and `warn` is told the rest."""
        texts = [self._written_out(text) for text in _several(texts)]
        ids = self._tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True).input_ids
        if warn is not None:
            _warn_of_truncation(self._tokenizer, texts, self.length, warn)
        return np.asarray(ids, np.int32)

    def tokens(self, text: str) -> list[int]:
        """All tokens of a text, without those that begin, end and pad."""
        return self._tokenizer(self._written_out(text), add_special_tokens=False, verbose=False).input_ids

    def words(self, tokens: Sequence[int]) -> str:
        """What these tokens stand for."""
        return self._tokenizer.decode(tokens)

    def framed(self, tokens: Sequence[int]) -> np.ndarray:
        """int32 ids [length] of at most `length` - 2 tokens, with those that begin, end and pad."""
        made = self._tokenizer
        ids = [made.bos_token_id, *tokens, made.eos_token_id]
        return np.asarray(ids + [made.pad_token_id] * (self.length - len(ids)), np.int32)


def _normal(text: str) -> str:
    """Returns a text as CLIP's tokenizer compares it: composed, and in lower case."""
    return unicodedata.normalize("NFC", text).lower()


def _save(tokenizer: Any, folder: Path, length: int) -> None:
    """Writes the files of a tokenizer of transformers that makes so many tokens."""
    made = copy.deepcopy(tokenizer)
    made.model_max_length = length
    made.save_pretrained(folder)


class TokenizerPair:
    """Stable Diffusion XL's two tokenizers, of one vocabulary and length, which pad with different tokens."""

    def __init__(self, first: Tokenizer, second: Tokenizer):
        if first.length != second.length:
            raise CheckpointError(
                f"the tokenizers make {first.length} and {second.length} tokens; do they belong together?"
            )
        self.first, self.second, self.length = first, second, first.length

    def having(self, words: Mapping[str, int]) -> tuple["TokenizerPair", list[int]]:
        """As of one tokenizer; CheckpointError where the two have other numbers of tokens."""
        (first, ids), (second, others) = self.first.having(words), self.second.having(words)
        if ids != others:
            raise CheckpointError("the tokenizers have other numbers of tokens; do they belong together?")
        return TokenizerPair(first, second), ids

    def __call__(
        self, texts: Sequence[str], second: Sequence[str] | None = None, *, warn: Warn | None = warnings.warn
    ) -> np.ndarray:
        """Returns int32 ids [texts, 2, length], padded; longer texts are truncated as by one tokenizer. `second` are
        texts for the second one where it reads others."""
        others = self.second(texts, warn=None) if second is None else self.second(second, warn=warn)
        return np.stack([self.first(texts, warn=warn), others], 1)


def _several(texts: Sequence[str]) -> Sequence[str]:
    """Returns a list of texts; a single text is a list of one."""
    return [texts] if isinstance(texts, str) else texts


class T5Tokenizer:
    """T5's tokenizer from a folder, as DeepFloyd-IF uses it: lower case, 77 tokens, padding that is masked.

    Args:
        folder: holds tokenizer.json, or spiece.model, which needs the extra "if".
        vocabulary: the number of the text encoder's embeddings.

    Raises:
        CheckpointError: missing or broken files, or tokens that the text encoder does not have.
    """

    length, library_class = 77, "T5Tokenizer"

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

    def save(self, folder: Path) -> None:
        """Writes the files to a folder, from which this is read again."""
        _save(self._tokenizer, folder, self.length)

    def __call__(self, texts: Sequence[str], *, warn: Warn | None = warnings.warn) -> np.ndarray:
        """Returns int32 ids and mask [texts, 2, length], 0 for padding; longer texts keep their end token, and `warn`
        is told the rest."""
        texts = [text.lower().strip() for text in _several(texts)]
        made = self._tokenizer(texts, padding="max_length", max_length=self.length, truncation=True)
        if warn is not None:
            _warn_of_truncation(self._tokenizer, texts, self.length, warn)
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

    def __call__(self, texts: Sequence[str], *, warn: Warn | None = warnings.warn) -> np.ndarray:
        """Returns int32 ids and mask [texts, 2, tokens], 0 for padding to a multiple of `block`; longer texts keep
        their end token, and `warn` is told the rest."""
        texts = _several(texts)
        bytewise = [text.encode() for text in texts]
        for text, whole in zip(texts, bytewise, strict=True):
            if (cut := whole[self.most - 1 :].decode(errors="replace")) and warn is not None:
                warn(truncation(self.most, text, cut))
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


def truncation(length: int, text: str, cut: str) -> str:
    """The message about a text whose end is not read."""
    return f"the text encoder reads {length} tokens; cut from the end of {text[:40]!r}: {cut!r}"


def _warn_of_truncation(tokenizer: Any, texts: Sequence[str], length: int, warn: Warn) -> None:
    for text, whole in zip(texts, tokenizer(list(texts), verbose=False).input_ids, strict=True):
        if len(whole) > length:
            warn(truncation(length, text, tokenizer.decode(whole[length - 1 : -1])))
