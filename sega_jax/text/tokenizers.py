"""Classes that wrap the tokenizers of checkpoints and convert text to token ids."""

import copy
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import count as counted
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sega_jax.text.files import CheckpointError, read_json

Warn = Callable[[str], None]


def _transformers() -> ModuleType:
    """Imports transformers. The import takes seconds, so it is delayed until a tokenizer is loaded. The notice that
    PyTorch is missing is suppressed, because sega_jax does not need PyTorch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers


class Tokenizer:
    """A CLIP tokenizer.

    As in diffusers, a word that was added as several tokens `<word>`, `<word>_1`, ... stands for all of them.

    Args:
        folder: The folder with tokenizer.json, or with vocab.json and merges.txt, and the tokenizer's settings.
        positions: The number of positions in the text encoder, which is an upper bound on `length`.
        vocabulary: The number of token embeddings in the text encoder.

    Attributes:
        length: The number of tokens in a padded text.

    Raises:
        CheckpointError: Files are missing or broken, or the text encoder has too few embeddings.
    """

    library_class = "CLIPTokenizer"

    def __init__(self, folder: Path, positions: int, vocabulary: int):
        library = _transformers()
        missing = [str(folder / name) for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{' and '.join(missing)} missing; a tokenizer needs tokenizer.json, or vocab.json and merges.txt"
            )
        settings = {path.name: read_json(path) for path in folder.glob("*.json")}
        length = settings.get("tokenizer_config.json", {}).get("model_max_length", positions)
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise CheckpointError(
                f"{folder}: model_max_length={length!r} in tokenizer_config.json should be an integer such as 77"
            )
        try:
            self._tokenizer = library.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            special = {name: getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            last = max(self._tokenizer.get_vocab().values())
        except Exception as error:  # the library raises many kinds of errors
            raise CheckpointError(
                f"{folder} contains no readable CLIP tokenizer ({error}); fetch its files again"
            ) from None
        for name, token in special.items():
            if token is None:
                raise CheckpointError(f"{folder}: the tokenizer has no {name}_token; add it to tokenizer_config.json")
        if last >= vocabulary:
            raise CheckpointError(
                f"{folder}: the tokenizer has {len(self._tokenizer)} tokens with ids up to {last}, but the text encoder"
                f" has {vocabulary} embeddings; check that the two folders belong together"
            )
        self.length = min(length, positions)
        # {word normalised by `_normal`: its tokens} for words with several tokens. As in diffusers, tokens that belong
        # to the same word are recognised by their names.
        self._expansions: dict[str, str] = {}
        added = self._tokenizer.get_added_vocab()
        for word in added:
            names = [word, *takewhile(added.__contains__, (f"{word}_{i}" for i in counted(1)))]
            if len(names) > 1:
                self._expansions[_normal(word)] = " ".join(names)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, including added words, to a folder, in the format that this class reads."""
        _save(self._tokenizer, folder, self.length)

    @property
    def pad(self) -> str:
        """The padding token."""
        return self._tokenizer.pad_token

    def pair(self) -> "TokenizerPair":
        """Returns Stable Diffusion XL's two tokenizers: this one, and a copy that pads with the vocabulary's first
        token.

        In published vocabularies, that token is "!". The copy never merges it with adjacent characters.

        Raises:
            CheckpointError: This tokenizer does not pad with its end token.
        """
        if self.pad != self._tokenizer.eos_token:
            raise CheckpointError(
                f"the tokenizer pads with {self.pad!r}, like Stable Diffusion 2.x's tokenizer and XL's second"
                f" tokenizer; give one that pads with {self._tokenizer.eos_token!r}, like Stable Diffusion 1.x's"
                " tokenizer and XL's first tokenizer"
            )
        second = copy.copy(self)
        second._tokenizer = copy.deepcopy(self._tokenizer)
        second._tokenizer.add_special_tokens({"pad_token": self._tokenizer.convert_ids_to_tokens(0)})
        return TokenizerPair(self, second)

    def with_words(self, words: Mapping[str, int]) -> tuple["Tokenizer", list[int]]:
        """Returns a tokenizer with new words, and the ids of the new tokens in order.

        Args:
            words: {new word: number of tokens, at least 1}.

        Raises:
            ValueError: A word is already in the vocabulary, is empty, or contains spaces or a special token.
        """
        names: list[str] = []
        extended = copy.copy(self)
        extended._tokenizer, extended._expansions = copy.deepcopy(self._tokenizer), dict(self._expansions)
        vocabulary = {*self._tokenizer.get_vocab(), *map(_normal, self._tokenizer.get_added_vocab())}
        for word, count in words.items():
            if not word or word != "".join(word.split()):
                raise ValueError(f"the new word {word!r} should have no spaces, as in <{''.join(word.split())}>")
            tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
            existing = {*vocabulary, *map(_normal, names)}
            if taken := [name for name in (*tokens, f"{word}_1") if name in vocabulary or _normal(name) in existing]:
                raise ValueError(f"the tokenizer already has {taken[0]!r}; choose another word, such as <{word}>")
            names += tokens
            if count > 1:
                extended._expansions[_normal(word)] = " ".join(tokens)
        extended._tokenizer.add_tokens(names)
        for name in names:
            # Special tokens, such as Stable Diffusion XL's "!", take precedence over new words.
            if len(extended._tokenizer.tokenize(name)) != 1:
                raise ValueError(
                    f"the new word {name!r} contains a special token, such as {self.pad!r}; choose another word"
                )
        return extended, extended._tokenizer.convert_tokens_to_ids(names)

    def _expanded(self, text: str) -> str:
        """Replaces each word that has several tokens with its tokens. Case is ignored, as in CLIP's tokenizer."""
        if not self._expansions:
            return text
        words = "|".join(map(re.escape, sorted(self._expansions, key=len, reverse=True)))
        text = unicodedata.normalize("NFC", text)
        return re.sub(words, lambda match: self._expansions.get(_normal(match[0]), match[0]), text, flags=re.IGNORECASE)

    def __call__(self, texts: Sequence[str], *, warn: Warn | None = warnings.warn) -> np.ndarray:
        """Tokenizes texts.

        Args:
            texts: A string or a list of strings.
            warn: A function to call with a message for each truncated text; None disables these warnings.

        Returns:
            Padded ids, int32 [texts, length]. Longer texts are truncated, but keep their end token.
        """
        texts = [self._expanded(text) for text in _as_list(texts)]
        ids = self._tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True).input_ids
        if warn is not None:
            _warn_of_truncation(self._tokenizer, texts, self.length, warn)
        return np.asarray(ids, np.int32)

    def tokens(self, text: str) -> list[int]:
        """Returns all token ids of a text, without start, end and padding tokens."""
        return self._tokenizer(self._expanded(text), add_special_tokens=False, verbose=False).input_ids

    def words(self, tokens: Sequence[int]) -> str:
        """Converts token ids back to text."""
        return self._tokenizer.decode(tokens)

    def framed(self, tokens: Sequence[int]) -> np.ndarray:
        """Adds start, end and padding tokens to at most `length` - 2 token ids, and returns int32 ids [length]."""
        tokenizer = self._tokenizer
        ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
        return np.asarray(ids + [tokenizer.pad_token_id] * (self.length - len(ids)), np.int32)


def _normal(text: str) -> str:
    """Converts a string to Unicode NFC and lower case, as CLIP's tokenizer does before it compares words."""
    return unicodedata.normalize("NFC", text).lower()


def _save(tokenizer: Any, folder: Path, length: int) -> None:
    """Saves a transformers tokenizer with `model_max_length` set to `length`."""
    copied = copy.deepcopy(tokenizer)
    copied.model_max_length = length
    copied.save_pretrained(folder)


class TokenizerPair:
    """The two tokenizers of Stable Diffusion XL, which differ only in their padding token.

    Args:
        first, second: The tokenizers for the first and second text encoders.

    Attributes:
        length: The number of tokens in a padded text.

    Raises:
        CheckpointError: The lengths differ.
    """

    def __init__(self, first: Tokenizer, second: Tokenizer):
        if first.length != second.length:
            raise CheckpointError(
                f"the tokenizers have lengths {first.length} and {second.length}; check that they belong together"
            )
        self.first, self.second, self.length = first, second, first.length

    def with_words(self, words: Mapping[str, int]) -> tuple["TokenizerPair", list[int]]:
        """Returns a pair of tokenizers with new words, and the ids of the new tokens; see `Tokenizer.with_words`.

        Raises:
            ValueError: As for `Tokenizer.with_words`.
            CheckpointError: The vocabularies differ in size.
        """
        (first, ids), (second, second_ids) = self.first.with_words(words), self.second.with_words(words)
        if ids != second_ids:
            raise CheckpointError(
                "the two tokenizers have vocabularies of different sizes; check that they belong together"
            )
        return TokenizerPair(first, second), ids

    def __call__(
        self, texts: Sequence[str], second: Sequence[str] | None = None, *, warn: Warn | None = warnings.warn
    ) -> np.ndarray:
        """Tokenizes texts for both text encoders.

        Args:
            texts: A string or a list of strings.
            second: The texts for the second tokenizer; None means the same texts.
            warn: A function to call with a message for each truncated text; None disables these warnings.

        Returns:
            Padded ids, int32 [texts, 2, length]. Longer texts are truncated, but keep their end token.
        """
        second_ids = self.second(texts, warn=None) if second is None else self.second(second, warn=warn)
        return np.stack([self.first(texts, warn=warn), second_ids], 1)


def _as_list(texts: Sequence[str]) -> Sequence[str]:
    """Returns the texts as a list; a single string becomes a list with one entry."""
    return [texts] if isinstance(texts, str) else texts


class T5Tokenizer:
    """DeepFloyd-IF's T5 tokenizer, which converts texts to lower case and returns 77 tokens with a padding mask.

    Args:
        folder: The folder with tokenizer.json or spiece.model; the latter needs the "if" extra.
        vocabulary: The number of token embeddings in the text encoder.

    Raises:
        CheckpointError: Files are missing or broken, or the text encoder has too few embeddings.
    """

    length, library_class = 77, "T5Tokenizer"

    def __init__(self, folder: Path, vocabulary: int):
        library = _transformers()
        if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise CheckpointError(
                f"{folder} has neither tokenizer.json nor spiece.model; check that the checkpoint is complete"
            )
        missing = [name for name in ("google.protobuf", "sentencepiece") if not _is_installed(name)]
        if missing and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f'{folder / "spiece.model"} needs {" and ".join(missing)}; run pip install "sega_jax[if]"'
            )
        try:
            self._tokenizer = library.T5Tokenizer.from_pretrained(folder, local_files_only=True)
            special = [getattr(self._tokenizer, f"{name}_token_id") for name in ("eos", "pad")]
            empty = self._tokenizer("").input_ids
            last = max(self._tokenizer.get_vocab().values())
        except Exception as error:  # the library raises many kinds of errors
            raise CheckpointError(
                f"{folder} contains no readable T5 tokenizer ({error}); fetch its files again"
            ) from None
        if empty != special[:1]:
            raise CheckpointError(
                f"{folder}: the tokenizer returns {empty} for an empty text, expected only its end token {special[0]}"
            )
        if last >= vocabulary:
            raise CheckpointError(
                f"{folder}: the tokenizer has ids up to {last}, but the text encoder has {vocabulary} embeddings; check"
                " that the two folders belong together"
            )

    def save(self, folder: Path) -> None:
        """Writes the tokenizer to a folder, in the format that this class reads."""
        _save(self._tokenizer, folder, self.length)

    def __call__(self, texts: Sequence[str], *, warn: Warn | None = warnings.warn) -> np.ndarray:
        """Tokenizes texts.

        Args:
            texts: A string or a list of strings.
            warn: A function to call with a message for each truncated text; None disables these warnings.

        Returns:
            int32 [texts, 2, length]: the ids, and a mask that is 0 for padding. Longer texts are truncated, but keep
            their end token.
        """
        texts = [text.lower().strip() for text in _as_list(texts)]
        encoding = self._tokenizer(texts, padding="max_length", max_length=self.length, truncation=True)
        if warn is not None:
            _warn_of_truncation(self._tokenizer, texts, self.length, warn)
        return np.stack([np.asarray(encoding.input_ids, np.int32), np.asarray(encoding.attention_mask, np.int32)], 1)


class ByteTokenizer:
    """ByT5's tokenizer: the id of a UTF-8 byte is its value plus 3, and the id of the end token is 1.

    Args:
        vocabulary: The number of token embeddings in the text encoder.

    Attributes:
        most: The maximum number of tokens, as in Paella's inference code.
        block: Texts are padded to multiples of this length, so that few programs are compiled.

    Raises:
        CheckpointError: The text encoder has too few embeddings.
    """

    most, block = 768, 64

    def __init__(self, vocabulary: int):
        if vocabulary < 259:
            raise CheckpointError(
                f"the text encoder has {vocabulary} embeddings, but ByT5 needs at least 259 (256 bytes and 3 special"
                " tokens); check that it is a ByT5 encoder"
            )

    def __call__(self, texts: Sequence[str], *, warn: Warn | None = warnings.warn) -> np.ndarray:
        """Tokenizes texts.

        Args:
            texts: A string or a list of strings.
            warn: A function to call with a message for each truncated text; None disables these warnings.

        Returns:
            int32 [texts, 2, tokens]: the ids, and a mask that is 0 for padding. `tokens` is a multiple of `block`.
            Longer texts are truncated, but keep their end token.
        """
        texts = _as_list(texts)
        encoded = [text.encode() for text in texts]
        for text, utf8 in zip(texts, encoded, strict=True):
            if (cut := utf8[self.most - 1 :].decode(errors="replace")) and warn is not None:
                warn(truncation(self.most, text, cut))
        ids = [[byte + 3 for byte in utf8[: self.most - 1]] + [1] for utf8 in encoded]
        length = -(-max(map(len, ids), default=1) // self.block) * self.block
        ids_and_mask = np.zeros((len(ids), 2, length), np.int32)
        for row, tokens in zip(ids_and_mask, ids, strict=True):
            row[0, : len(tokens)], row[1, : len(tokens)] = tokens, 1
        return ids_and_mask


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # raised if the parent package is missing
        return False


def truncation(length: int, text: str, cut: str) -> str:
    """Returns the warning for a truncated text; `cut` is the ignored part at the end."""
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    # The cut may be in the middle of a character.
    return f"the text encoder reads {length} tokens; cut from the end of {shown!r}: {cut.lstrip(chr(0xFFFD))!r}"


def _warn_of_truncation(tokenizer: Any, texts: Sequence[str], length: int, warn: Warn) -> None:
    for text, ids in zip(texts, tokenizer(list(texts), verbose=False).input_ids, strict=True):
        if len(ids) > length:
            warn(truncation(length, text, tokenizer.decode(ids[length - 1 : -1])))
