"""Textual inversion: new words whose embeddings were learnt from pictures (Gal et al. 2022).

A word consists of one or several tokens, with a vector each. diffusers' files store the vectors under the word. Those
of the AUTOMATIC1111 web UI store the word separately. A model with several text encoders has vectors for each of them,
under names which its family knows (`TextEncoders`).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

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
_NAMELESS = ("*", "emb_params")  # stand for the word in files that do not name it
# Files of textual inversion have few tensors, so a whole checkpoint need not be searched.
_MOST = 64


class TextEncoders(NamedTuple):
    """The text encoders of a family, whose words can be learnt."""

    family: str
    keys: Mapping[str, str]  # {name in files with vectors for several encoders: folder in diffusers' layout}
    widths: str  # of the vectors in published checkpoints, such as "768 and 1280"; for errors


class Word(NamedTuple):
    """A word to add, with its vectors [tokens, channels] by text encoder."""

    name: str
    path: Path
    vectors: dict[str, np.ndarray]


def read(
    networks: Mapping[str, Any], tokenizer: Tokenizer | TokenizerPair, words: Files, families: Sequence[TextEncoders]
) -> list[Word]:
    """Reads words for CLIP text encoders, with or without values.

    Args:
        networks: the model's text encoders, by their folders in diffusers' layout.
        tokenizer: the model's tokenizer.
        words: {word: file}, or one file that names its word.
        families: all families whose words can be learnt, so that an error can name the one that a file belongs to.

    Raises:
        TypeError: `words` is neither a path nor {word: path}.
        ValueError: the tokenizer has a word already, or a word contains spaces or special tokens.
        CheckpointError: a file is missing, broken, hostile, of another kind, or made for other text encoders.
    """
    files = list(words.items()) if isinstance(words, Mapping) else [(None, words)]
    read_words = []
    for name, path in files:
        if not isinstance(path, str | os.PathLike) or not (name is None or isinstance(name, str)):
            raise TypeError(f"{words!r} should be {{word: file}} of textual inversion, or a file that names its word")
        read_words.append(_word(Path(os.path.expanduser(path)), name, networks, families))
    tokenizer.with_words({word.name: _count(word) for word in read_words})
    return read_words


def added(models: M, tokenizer: T, words: Sequence[Word]) -> tuple[M, T]:
    """Returns a NamedTuple of networks with values, and their tokenizer, to which the words are added."""
    if not words:
        return models, tokenizer
    extended, ids = extended_tokenizer(tokenizer, words)
    networks, extended_networks = models._asdict(), {}
    for part in words[0].vectors:
        vectors = np.concatenate([word.vectors[part] for word in words])
        extended_networks[part] = _with_vectors(networks[part], ids, vectors)
    return models._replace(**extended_networks), extended


def extended_tokenizer(tokenizer: T, words: Sequence[Word]) -> tuple[T, list[int]]:
    """Returns a tokenizer that has the words, and the ids of their tokens."""
    return tokenizer.with_words({word.name: _count(word) for word in words})


def _count(word: Word) -> int:
    """Counts a word's tokens."""
    return len(next(iter(word.vectors.values())))


def _with_vectors(network: Any, ids: list[int], vectors: np.ndarray) -> Any:
    """Returns a text encoder with these vectors as the embeddings of these tokens; the table grows if it must."""
    grown = jax.tree.map(lambda leaf: leaf, network)
    tower = getattr(grown, "text_model", grown)
    table = tower.embeddings.token_embedding
    leaf = table.embedding[...]
    rows = np.asarray(leaf)
    rows = np.concatenate([rows, np.zeros((max(0, max(ids) + 1 - len(rows)), rows.shape[1]), rows.dtype)])
    rows[ids] = vectors.astype(rows.dtype)
    table.embedding = nnx.Param(jax.device_put(rows, leaf.sharding))
    grown.config = tower.config = tower.config._replace(vocab_size=len(rows))
    return grown


def _word(path: Path, name: str | None, networks: Mapping[str, Any], families: Sequence[TextEncoders]) -> Word:
    """Reads a word, which is called `name` or as the file says."""
    keys = {key: part for family in families for key, part in family.keys.items()}
    own, arrays = _vectors(path, keys)
    name = own if name is None else name
    if name is None:
        raise CheckpointError(f"{path} does not name its word; give {{word: file}}")
    if arrays.keys() == {""}:
        arrays = {next(iter(networks)): arrays[""]}
    if arrays.keys() != networks.keys():
        of = " or ".join(family.family for family in families if set(family.keys.values()) == arrays.keys())
        raise CheckpointError(
            f"{path} has vectors for {' and '.join(sorted(arrays))}, expected for {' and '.join(networks)}:"
            f"{f' it is of {of},' if of else ''} take one of this model's"
        )
    for part, array in arrays.items():
        width = networks[part].config.hidden_size
        if not is_floating(array.dtype) or array.ndim not in (1, 2) or not array.size:
            raise CheckpointError(f"{path} has {array.dtype}{array.shape}, expected vectors [tokens, {width}]")
        if array.shape[-1] != width:
            known = ", ".join(f"{family.family} has {family.widths}" for family in families)
            raise CheckpointError(
                f"{path} has vectors of {array.shape[-1]} channels for the {part} of {width}: it was learnt for another"
                f" model ({known})"
            )
        if not is_finite(array):
            raise CheckpointError(f"{path} has NaN or infinite entries; fetch it again")
        arrays[part] = array.reshape(-1, width)
    if len({len(array) for array in arrays.values()}) > 1:
        raise CheckpointError(f"{path} has other numbers of vectors for each text encoder; fetch it again")
    return Word(name, path, arrays)


def _vectors(path: Path, keys: Mapping[str, str]) -> tuple[str | None, dict[str, np.ndarray]]:
    """Reads a file's word, None if it has no name, and its vectors by text encoder, "" if the file names none."""
    if path.suffix == ".safetensors":
        with Tensors(path.parent, path.stem, None, str) as tensors:
            arrays = {name: tensors[name] for name in list(tensors.shapes)[:_MOST]}
        return _sorted(path, arrays, {}, keys)
    if path.suffix not in (".bin", ".pt"):
        raise CheckpointError(f"{path} is no .safetensors, .bin or .pt file, the kinds that textual inversion has")
    with mapped(path) as data:
        content = read_pickle(path, data)
        if isinstance(content, Tensor):
            content = {"*": content}
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of vectors")
        named = content["string_to_param"] if isinstance(content.get("string_to_param"), dict) else content
        views = {name: view for name, view in list(named.items())[:_MOST] if isinstance(view, Tensor)}
        if sum(view.nbytes for view in views.values()) > len(data):
            raise CheckpointError(f"{path}: its tensors are more than it has bytes for, {len(data)}; fetch another")
        return _sorted(path, {name: view.read(data) for name, view in views.items()}, content, keys)


def _sorted(
    path: Path, arrays: Mapping[Any, np.ndarray], content: Mapping[str, Any], keys: Mapping[str, str]
) -> tuple[str | None, dict[str, np.ndarray]]:
    """Sorts a file's arrays by text encoder and finds the word, in their names or in other content of the file."""
    if arrays and arrays.keys() <= keys.keys():
        return None, {keys[name]: array for name, array in arrays.items()}
    if len(arrays) != 1 or not isinstance(key := next(iter(arrays)), str):
        listed = ", ".join(str(name)[:40] for name in list(arrays)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path} has {listed}, expected the vectors of one word, as textual inversion's files have; a LoRA goes"
            " with lora=, and a checkpoint is load's source"
        )
    word = content.get("name") if key in _NAMELESS else key
    return word if isinstance(word, str) else None, {"": arrays[key]}
