"""Textual inversion: new words whose embeddings were learnt from pictures (Gal et al. 2022).

A word is one token of the vocabulary or several, of a vector each. Files hold the vectors under the word, as diffusers
writes them, or beside it, as the AUTOMATIC1111 web UI does; those of Stable Diffusion XL hold them for both of its text
encoders, as `clip_l` and `clip_g`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights.pull import CheckpointError, Tensors
from sega_jax.weights.torch_pickle import Tensor, mapped
from sega_jax.weights.torch_pickle import read as read_pickle

M, T = TypeVar("M"), TypeVar("T", bound=Tokenizer | TokenizerPair)

Files = str | Path | Mapping[str, str | Path]
_TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_NAMELESS = ("*", "emb_params")  # what stands in the word's place where a file does not know it
# Of a file, which is small: a whole checkpoint is not searched.
_MOST = 64


class Word(NamedTuple):
    """A word to add, and its vectors [tokens, channels] by text encoder."""

    name: str
    path: Path
    vectors: dict[str, np.ndarray]


def add_words(models: M, tokenizer: T, words: Files) -> tuple[M, T]:
    """Networks and a tokenizer that know new words, of textual inversion.

        pipe.models, pipe.tokenizer = add_words(pipe.models, pipe.tokenizer, {"<cat-toy>": "cat.safetensors"})

    Those given stay as they are. Tokens and vectors are as diffusers' `load_textual_inversion` has them: a word of
    several vectors is the tokens `<cat-toy>`, `<cat-toy>_1`, ..., and stands in prompts and concepts once. As there,
    the pooled text of Stable Diffusion XL is read at the new word, where the config of its second text encoder looks
    for the token of the largest number (`eos_token_id` 2, as published).

    Args:
        models, tokenizer: of a pipeline of Stable Diffusion (`pipe.models`, `pipe.tokenizer`).
        words: {word: file}; or one file that names its word. Files are .safetensors, .bin or .pt, of which nothing is
            run.

    Raises:
        TypeError: models, tokenizer or words is none.
        ValueError: a word that the tokenizer has, or with spaces.
        CheckpointError: a file is missing, broken, hostile, of something else, or of another text encoder.
    """
    return added(models, tokenizer, read(models, tokenizer, words))


def read(models: Any, tokenizer: Any, words: Files) -> list[Word]:
    """What `add_words` adds to networks with or without values.

    Raises:
        TypeError, ValueError, CheckpointError: as `add_words`.
    """
    networks = _encoders(models)
    if not networks or not isinstance(tokenizer, Tokenizer | TokenizerPair):
        raise TypeError(
            f"models={type(models).__name__} and tokenizer={type(tokenizer).__name__} should be of a pipeline of Stable"
            " Diffusion (pipe.models, pipe.tokenizer)"
        )
    given = list(words.items()) if isinstance(words, Mapping) else [(None, words)]
    found = []
    for name, path in given:
        if not isinstance(path, str | os.PathLike) or not (name is None or isinstance(name, str)):
            raise TypeError(f"{words!r} should be {{word: file}} of textual inversion, or a file that names its word")
        found.append(_word(Path(os.path.expanduser(path)), name, networks))
    tokenizer.having({word.name: _count(word) for word in found})
    return found


def added(models: M, tokenizer: T, words: list[Word]) -> tuple[M, T]:
    """Networks with values and their tokenizer, with words from `read`."""
    if not words:
        return models, tokenizer
    knowing, ids = tokenizer.having({word.name: _count(word) for word in words})
    parts = {}
    for part, network in _encoders(models).items():
        vectors = np.concatenate([word.vectors[part] for word in words])
        parts[part] = _with_vectors(network, ids, vectors)
    return models._replace(**parts), knowing


def _encoders(models: Any) -> dict[str, Any]:
    parts = getattr(models, "_asdict", dict)()
    kinds = CLIPTextModel | CLIPTextModelWithProjection
    return {part: parts[part] for part in _TOWERS.values() if isinstance(parts.get(part), kinds)}


def _count(word: Word) -> int:
    return len(next(iter(word.vectors.values())))


def _with_vectors(network: M, ids: list[int], vectors: np.ndarray) -> M:
    """A text encoder whose embeddings of these numbers are these; it has more of them where there are not so many."""
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


def _word(path: Path, name: str | None, networks: Mapping[str, Any]) -> Word:
    own, arrays = _vectors(path)
    name = own if name is None else name
    if name is None:
        raise CheckpointError(f"{path} does not name its word; give {{word: file}}")
    if arrays.keys() == {""}:
        arrays = {"text_encoder": arrays[""]}
    if arrays.keys() != networks.keys():
        raise CheckpointError(
            f"{path} has vectors for {' and '.join(sorted(arrays))}, expected for {' and '.join(networks)}: it is of"
            f" {'Stable Diffusion XL' if len(arrays) > 1 else 'Stable Diffusion 1.x or 2.x'}, take one of this model's"
        )
    for part, array in arrays.items():
        width = networks[part].config.hidden_size
        if not is_floating(array.dtype) or array.ndim not in (1, 2) or not array.size:
            raise CheckpointError(f"{path} has {array.dtype}{array.shape}, expected vectors [tokens, {width}]")
        if array.shape[-1] != width:
            raise CheckpointError(
                f"{path} has vectors of {array.shape[-1]} channels for the {part} of {width}: it was learnt for another"
                " model (Stable Diffusion 1.x has 768, 2.x 1024, XL 768 and 1280)"
            )
        if not is_finite(array):
            raise CheckpointError(f"{path} has NaN or infinite entries; fetch it again")
        arrays[part] = array.reshape(-1, width)
    if len({len(array) for array in arrays.values()}) > 1:
        raise CheckpointError(f"{path} has other numbers of vectors for each text encoder; fetch it again")
    return Word(name, path, arrays)


def _vectors(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
    """A file's word, None for none, and its vectors by text encoder, "" for that which there is."""
    if path.suffix == ".safetensors":
        with Tensors(path.parent, path.stem, None, str) as tensors:
            found = {name: tensors[name] for name in list(tensors.shapes)[:_MOST]}
        return _sorted(path, found, {})
    if path.suffix not in (".bin", ".pt"):
        raise CheckpointError(f"{path} is no .safetensors, .bin or .pt file, of which textual inversion's are")
    with mapped(path) as data:
        content = read_pickle(path, data)
        if isinstance(content, Tensor):
            content = {"*": content}
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of vectors")
        tensors = content["string_to_param"] if isinstance(content.get("string_to_param"), dict) else content
        views = {name: view for name, view in list(tensors.items())[:_MOST] if isinstance(view, Tensor)}
        if sum(view.nbytes for view in views.values()) > len(data):
            raise CheckpointError(f"{path}: its tensors are more than it has bytes for, {len(data)}; fetch another")
        return _sorted(path, {name: view.read(data) for name, view in views.items()}, content)


def _sorted(
    path: Path, found: Mapping[Any, np.ndarray], beside: Mapping[str, Any]
) -> tuple[str | None, dict[str, np.ndarray]]:
    if found and found.keys() <= _TOWERS.keys():
        return None, {_TOWERS[name]: array for name, array in found.items()}
    if len(found) != 1 or not isinstance(key := next(iter(found)), str):
        listed = ", ".join(str(name)[:40] for name in list(found)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path} has {listed}, expected the vectors of one word, as textual inversion's files have; a LoRA goes"
            " with lora=, and a checkpoint is load's source"
        )
    own = beside.get("name") if key in _NAMELESS else key
    return own if isinstance(own, str) else None, {"": found[key]}
