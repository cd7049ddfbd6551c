"""Adds new words to a model, with embeddings that textual inversion learned from pictures (Gal et al. 2022).

A word consists of one or more tokens, each with a vector. Files from diffusers use the word as the key of its vectors.
Files from the AUTOMATIC1111 web UI store the word separately. Files for models with several text encoders contain
vectors for each encoder, under keys that the family defines (`TextEncoders`).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from sega_jax.method.naming import in_python, name_of
from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights.tensors import Tensors
from sega_jax.weights.torch_pickle import mapped
from sega_jax.weights.torch_pickle import read as read_pickle
from sega_jax.weights.unpickling import Tensor

M = TypeVar("M", bound=NamedTuple)
T = TypeVar("T", Tokenizer, TokenizerPair)

Files = str | Path | Mapping[str, str | Path]
_PLACEHOLDERS = ("*", "emb_params")  # keys of the vectors in files that do not use the word as the key
# The maximum number of tensors to read. Textual inversion files contain few tensors, so a checkpoint passed by mistake
# is not read in full.
_MAX_TENSORS = 64


class TextEncoders(NamedTuple):
    """Describes a family's text encoders that accept new words."""

    family: str
    keys: Mapping[str, str]  # {key in files with vectors for several encoders: folder in diffusers' layout}
    widths: str  # the vector widths of published checkpoints, such as "768 and 1280", for error messages


class Word(NamedTuple):
    """A word to add, with vectors [tokens, channels] for each text encoder."""

    name: str
    path: Path
    vectors: dict[str, np.ndarray]


def read(
    networks: Mapping[str, Any], tokenizer: Tokenizer | TokenizerPair, words: Files, families: Sequence[TextEncoders]
) -> list[Word]:
    """Reads words for CLIP text encoders. Only the shapes of their parameters are needed.

    Args:
        networks: {folder in diffusers' layout: text encoder}.
        tokenizer: the model's tokenizer.
        words: {word: file}, or a single file that stores the word itself.
        families: all families that support textual inversion, so that an error message can name the family that a file
            was made for.

    Raises:
        TypeError: `words` is neither a path nor {word: path}.
        ValueError: a word is already in the tokenizer, or contains spaces or special tokens.
        CheckpointError: a file is missing, broken, hostile, of the wrong kind, or made for different text encoders.
    """
    files = list(words.items()) if isinstance(words, Mapping) else [(None, words)]
    read_words = []
    for name, path in files:
        if not isinstance(path, str | os.PathLike) or not (name is None or isinstance(name, str)):
            raise TypeError(
                f"{words!r} should be {{word: file}} for textual inversion, or a single file that stores its word"
            )
        read_words.append(_word(Path(os.path.expanduser(path)), name, networks, families))
    tokenizer.with_words({word.name: _count(word) for word in read_words})
    return read_words


def added(models: M, tokenizer: T, words: Sequence[Word]) -> tuple[M, T]:
    """Adds words to loaded networks and to their tokenizer, and returns both."""
    if not words:
        return models, tokenizer
    extended, ids = extended_tokenizer(tokenizer, words)
    networks, extended_networks = models._asdict(), {}
    for part in words[0].vectors:
        vectors = np.concatenate([word.vectors[part] for word in words])
        extended_networks[part] = _with_vectors(networks[part], ids, vectors)
    return models._replace(**extended_networks), extended


def extended_tokenizer(tokenizer: T, words: Sequence[Word]) -> tuple[T, list[int]]:
    """Adds words to a tokenizer. Returns the new tokenizer and the ids of the words' tokens."""
    return tokenizer.with_words({word.name: _count(word) for word in words})


def _count(word: Word) -> int:
    """Returns the number of tokens in a word."""
    return len(next(iter(word.vectors.values())))


def _with_vectors(network: Any, ids: list[int], vectors: np.ndarray) -> Any:
    """Sets token embeddings and returns the new text encoder. Its embedding table grows if necessary.

    Args:
        vectors: [tokens, channels], in the order of `ids`.
    """
    extended = jax.tree.map(lambda leaf: leaf, network)
    tower = getattr(extended, "text_model", extended)
    table = tower.embeddings.token_embedding
    leaf = table.embedding[...]
    rows = np.asarray(leaf)
    rows = np.concatenate([rows, np.zeros((max(0, max(ids) + 1 - len(rows)), rows.shape[1]), rows.dtype)])
    rows[ids] = vectors.astype(rows.dtype)
    table.embedding = nnx.Param(jax.device_put(rows, leaf.sharding))
    extended.config = tower.config = tower.config._replace(vocab_size=len(rows))
    return extended


def _word(path: Path, name: str | None, networks: Mapping[str, Any], families: Sequence[TextEncoders]) -> Word:
    """Reads one word. Its name is `name`, or the name in the file if `name` is None."""
    keys = {key: part for family in families for key, part in family.keys.items()}
    name_in_file, arrays = _vectors(path, keys)
    name = name_in_file if name is None else name
    if name is None:
        raise CheckpointError(
            f"{path} does not store its word; give the word, too: {in_python('{word: file}') or 'WORD=FILE'}"
        )
    if arrays.keys() == {""}:
        arrays = {next(iter(networks)): arrays[""]}
    if arrays.keys() != networks.keys():
        matches = " or ".join(family.family for family in families if set(family.keys.values()) == arrays.keys())
        raise CheckpointError(
            f"{path} has vectors for {' and '.join(sorted(arrays))}, expected vectors for {' and '.join(networks)};"
            f"{f' it was trained for {matches},' if matches else ''} use a file for this model"
        )
    for part, array in arrays.items():
        width = networks[part].config.hidden_size
        if not is_floating(array.dtype) or array.ndim not in (1, 2) or not array.size:
            raise CheckpointError(
                f"{path} contains {array.dtype}{array.shape}, expected floats [tokens, {width}]; use a different file"
            )
        if array.shape[-1] != width:
            known = ", ".join(f"{family.family} has {family.widths}" for family in families)
            raise CheckpointError(
                f"{path} has vectors with {array.shape[-1]} channels, but the {part} has {width}; use a file that was"
                f" trained for this model ({known})"
            )
        if not is_finite(array):
            raise CheckpointError(f"{path} has NaN or infinite entries; fetch it again")
        arrays[part] = array.reshape(-1, width)
    if len({len(array) for array in arrays.values()}) > 1:
        raise CheckpointError(f"{path} has different numbers of vectors for the text encoders; fetch it again")
    return Word(name, path, arrays)


def _vectors(path: Path, keys: Mapping[str, str]) -> tuple[str | None, dict[str, np.ndarray]]:
    """Reads the vectors of a file.

    Args:
        keys: {key in files with vectors for several encoders: folder in diffusers' layout}.

    Returns:
        The word, or None if the file does not store it; and {text encoder: vectors}. The key is "" if the file does not
        name its encoder.
    """
    if path.suffix == ".safetensors":
        with Tensors(path.parent, path.stem, None, str) as tensors:
            arrays = {name: tensors[name] for name in list(tensors.shapes)[:_MAX_TENSORS]}
        return _sorted(path, arrays, {}, keys)
    if path.suffix not in (".bin", ".pt"):
        raise CheckpointError(
            f"{path} should have one of the extensions of textual inversion files: .safetensors, .bin or .pt"
        )
    with mapped(path) as data:
        content = read_pickle(path, data)
        if isinstance(content, Tensor):
            content = {"*": content}
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} contains a {type(content).__name__}, expected a dictionary of vectors; use a different file"
            )
        named = content["string_to_param"] if isinstance(content.get("string_to_param"), dict) else content
        views = {name: view for name, view in list(named.items())[:_MAX_TENSORS] if isinstance(view, Tensor)}
        if sum(view.nbytes for view in views.values()) > len(data):
            raise CheckpointError(f"{path}: its tensors exceed the file's {len(data)} bytes; use a different file")
        return _sorted(path, {name: view.read(data) for name, view in views.items()}, content, keys)


def _sorted(
    path: Path, arrays: Mapping[Any, np.ndarray], content: Mapping[str, Any], keys: Mapping[str, str]
) -> tuple[str | None, dict[str, np.ndarray]]:
    """Assigns a file's arrays to text encoders. Finds the word in the arrays' names or in the rest of the content."""
    if arrays and arrays.keys() <= keys.keys():
        return None, {keys[name]: array for name, array in arrays.items()}
    if len(arrays) != 1 or not isinstance(key := next(iter(arrays)), str):
        listed = ", ".join(str(name)[:40] for name in list(arrays)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path} contains {listed}, expected the vectors of one word from textual inversion; give a LoRA as"
            f" {name_of('lora')}, and a checkpoint as {name_of('source')}"
        )
    word = content.get("name") if key in _PLACEHOLDERS else key
    return word if isinstance(word, str) else None, {"": arrays[key]}
