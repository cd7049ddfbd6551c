"""Implements `convert`, which writes a checkpoint in a different format."""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from convert import deepfloyd
from convert.flax_configs import of_torch_classes
from sega_jax.method.checks import did_you_mean
from sega_jax.method.naming import assignment
from sega_jax.pipelines.device_defaults import whole_dtype
from sega_jax.pipelines.loading import describe
from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.progress import bar
from sega_jax.pipelines.recommended import FILE as RECOMMENDED
from sega_jax.pipelines.sources import find, names_file
from sega_jax.pipelines.weight_files import open_weights
from sega_jax.systems.base import listed
from sega_jax.systems.registry import CHECKER, weight_stem
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights.destination import atomic_folder
from sega_jax.weights.layout import flax_name
from sega_jax.weights.pull import check, fill
from sega_jax.weights.tensors import Weights
from sega_jax.weights.write import Network, Part, as_json, checkpoint_bytes, write_checkpoint

FORMS = ("orbax", "diffusers")
DTYPES = ("float32", "float16", "bfloat16")
# Files to copy in addition to the folders that model_index.json lists.
_DOCUMENTS = (RECOMMENDED, "README*", "LICENSE*")
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: DTypeLike | None = None,
    to: str = "orbax",
    variant: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Converts a Stable Diffusion, SDXL or x4 upscaler checkpoint, or one DeepFloyd-IF stage, to another format.

    In both formats, a checkpoint is a folder in diffusers' layout. In Orbax format, two entries replace each network's
    weight files: `orbax` and `orbax.json`. `orbax` is an Orbax checkpoint that maps each parameter's dotted path in the
    module to its array with the module's axes (channels last). `load` and any Orbax checkpointer can restore it.
    `orbax.json` contains each parameter's name in torch's files. A source that already has the requested format is
    written again. Weights are checked as in `load`, so the result can be loaded. Without a cast, weights restored from
    Orbax are bit-identical to the weights in the source.

    Args:
        source: a folder in either format, or a DeepFloyd-IF stage in its original layout (`config.yml` and
            `pytorch_model.bin`). In diffusers' layout, safetensors files are read if present. Otherwise,
            diffusers' Flax files (`.msgpack`; the result names torch's classes) or pickles (`.bin`; their code is not
            run) are read. A DeepFloyd-IF stage becomes a diffusers pipeline without a safety checker or text encoder,
            because its folder contains neither.
        dest: a new or empty folder. It appears only when it is complete. Until then, its files are in a hidden folder
            next to `dest`. If a conversion is killed, the next one into the same parent folder removes the hidden
            folder.
        dtype: float32, float16 or bfloat16; None keeps the dtype of every weight.
        to: "orbax" or "diffusers".
        variant: the variant of the weight files to read, such as "fp16". The result has no variant.
        progress: whether to show a progress bar; None shows it in terminals and notebooks.

    Returns:
        The absolute path of the written folder.

    Raises:
        FileNotFoundError: `source` does not exist.
        FileExistsError: `dest` exists and is not empty.
        TypeError: `source` or `dest` is not a path.
        CheckpointError: `source` is not a checkpoint; a file is missing, broken or hostile, or does not fit its
            network; or a weight overflows `dtype`. Everything except the values of the weights is checked before
            anything is written.
        ValueError: `dtype` or `to` is unknown, or `dest` is inside `source`.
        OSError: `dest` cannot be written, or the disk is full.
    """
    check_options(to, dtype)
    folder = _folder(source, variant)
    dest = destination(dest, folder)
    with atomic_folder(dest) as partial:
        sources, others = _describe(folder, variant)
        write(partial, sources, others, to=to, dtype=dtype, progress=progress)
    return dest


class Source(NamedTuple):
    """A network whose parameters have shapes but no values, and a function that opens its weights."""

    module: Any
    open: Callable[[], Weights]
    stem: str = "diffusion_pytorch_model"  # the name of the weight file in diffusers' layout, without its extension


def check_options(to: str, dtype: DTypeLike | None) -> None:
    """Checks the options that all conversions share.

    Raises:
        ValueError: the format or dtype is unknown.
    """
    if to not in FORMS:
        raise ValueError(f"{assignment('to', to)} should be one of {', '.join(FORMS)}")
    _dtype(dtype)


def destination(dest: str | Path, *sources: Path) -> Path:
    """Returns the absolute path of the folder to write to.

    Raises:
        TypeError: `dest` is not a path.
        ValueError: `dest` is inside a source.
    """
    if not isinstance(dest, str | os.PathLike):
        raise TypeError(f"{assignment('dest', dest)} should be the path of a folder")
    dest = Path(os.path.expanduser(dest)).resolve()
    if any(dest.is_relative_to(source.resolve()) for source in sources):
        raise ValueError(f"{dest} is inside the source; choose a folder elsewhere")
    return dest


def write(
    folder: Path,
    sources: Mapping[str, Source],
    others: Mapping[Path, Path | bytes],
    *,
    to: str,
    dtype: DTypeLike | None,
    progress: bool | None,
) -> None:
    """Writes a checkpoint: first its networks, then its other files, in the given order.

    Args:
        folder: the folder to write to.
        sources: {name of a folder: network}.
        others: {path in the folder: path of the file to copy, or content}.
        to, dtype, progress: as for `convert`.

    Raises:
        CheckpointError, OSError: as for `convert`.
    """
    dtype = _dtype(dtype)
    parts = {
        part: Part(_size(source, dtype), functools.partial(_read, source, dtype), source.stem)
        for part, source in sources.items()
    }
    with bar(checkpoint_bytes(parts, others), "B", progress, unit_scale=True, unit_divisor=1024) as progress_bar:
        write_checkpoint(folder, parts, others, progress_bar.update, orbax=to == "orbax")


def _folder(source: str | Path, variant: str | None) -> Path:
    """Returns the folder of a checkpoint. A checkpoint on the hub is downloaded."""
    if isinstance(source, str | os.PathLike) and str(source):
        folder = Path(os.path.expanduser(source))
        if deepfloyd.is_original(folder):
            return folder
    if names_file(source):
        raise FileNotFoundError(f"{source} is a single file, not a folder; use convert_single")
    return find(source).fetch(variant)


def _describe(folder: Path, variant: str | None) -> tuple[dict[str, Source], dict[Path, Path | bytes]]:
    """Returns a folder's networks and its other files, as arguments for `write`."""
    if not deepfloyd.is_original(folder):
        description = describe(folder)
        networks, sources = description.networks, {}
        for part, module in networks.items():
            stem = weight_stem(description.system, part)
            weights = functools.partial(open_weights, folder / part, stem, variant, module.rename)
            sources[part] = Source(module, weights, stem)
        files = {path: folder / path for path in _other_files(folder, networks)}
        configs = of_torch_classes(folder, files)
        configs |= _index(folder, configs.get("model_index.json") or read_json(folder / "model_index.json"))
        return sources, files | {Path(path): as_json(content) for path, content in configs.items()}
    if variant is not None:
        raise CheckpointError(
            f"{folder} is a DeepFloyd-IF stage in its original layout, which has no variants; omit"
            f" {assignment('variant', variant)}"
        )
    stage = deepfloyd.describe(folder)
    opened = functools.partial(deepfloyd.OriginalTensors, folder, stage.unet)
    documents = {path: folder / path for path in _documents(folder)}
    return {"unet": Source(stage.unet, opened)}, documents | {Path(p): as_json(c) for p, c in stage.files.items()}


def tokenizer_files(folder: Path) -> dict[Path, Path]:
    """Returns {path in a checkpoint: file} for the files in a CLIP tokenizer's folder."""
    return {Path("tokenizer", name): folder / name for name in _TOKENIZER if (folder / name).is_file()}


def _dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """Converts `dtype` to one of the supported dtypes; None stays None."""
    if dtype is None:
        return None
    try:
        parsed = jax.numpy.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        hint = did_you_mean(dtype, DTYPES, whole_dtype)
        raise ValueError(
            f"{assignment('dtype', dtype)} should be one of {', '.join(DTYPES)}, or None to keep the dtype of every"
            f" weight{hint}"
        )
    return parsed


def _size(source: Source, dtype: np.dtype | None) -> int:
    """Checks the names and shapes of a network's weights. Returns the number of bytes to write."""
    with source.open() as weights:
        sizes = check(source.module, weights, warn)
        return sum(dtype.itemsize * math.prod(weights.shapes[name]) if dtype else sizes[name] for name in sizes)


def _read(source: Source, dtype: np.dtype | None, update: Callable[[int], Any]) -> Network:
    """Reads a network. Calls `update` with the size of each array in bytes."""

    def place(array: np.ndarray) -> np.ndarray:
        update(array.nbytes)
        return array

    with source.open() as weights:
        filled = jax.tree_util.tree_leaves_with_path(fill(source.module, weights, dtype, place))
        keys = {flax_name(path): weights.keys[weights.layout.name(path)] for path, _ in filled}
        return Network({flax_name(path): array for path, array in filled}, keys, weights.buffers())


def _other_files(folder: Path, networks: Iterable[str]) -> Iterator[Path]:
    """Yields the paths of the files to copy: configs, the folders of other components, and documents.

    The index comes last, so that an incomplete folder is not mistaken for a complete checkpoint.
    """
    yield from (Path(part, "config.json") for part in networks)
    index = read_json(folder / "model_index.json")
    for other in sorted(folder.iterdir()):
        if other.is_dir() and other.name in index and other.name not in networks:
            yield from (path.relative_to(folder) for path in sorted(other.rglob("*")) if path.is_file())
    yield from _documents(folder)
    yield Path("model_index.json")


def _index(folder: Path, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {name: content} for a folder's index, with missing components marked as absent in diffusers' notation.

    A component may be missing because it was not downloaded from the hub. The result is empty if no component is
    missing.
    """
    absent = {part: [None, None] for part in index if listed(index, part) and not (folder / part).is_dir()}
    if not absent:
        return {}
    warnings.warn(
        f"{folder} has no {', '.join(absent)}, so the converted checkpoint does not have it either", stacklevel=4
    )
    unchecked = {"requires_safety_checker": False} if CHECKER in absent else {}
    return {"model_index.json": {**index, **absent, **unchecked}}


def _documents(folder: Path) -> Iterator[Path]:
    """Yields the paths of readmes and licenses, relative to the folder."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(path.match(name) for name in _DOCUMENTS):
            yield Path(path.name)
