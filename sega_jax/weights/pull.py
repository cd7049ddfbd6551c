"""Fills modules with the weights in files. Every parameter gets its value, or an error lists all that do not.

The dotted path of a parameter equals its key in torch's files, except for the last part. There, Flax's names tell the
layout: a `kernel` is torch's `weight` with its axes in another order, and a `scale` or an `embedding` is torch's
`weight` unchanged.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from sega_jax.method.checks import did_you_mean
from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.text.files import CheckpointError as CheckpointError
from sega_jax.text.files import read_json as read_json

M = TypeVar("M")

# Buffers in files that no module needs.
_BUFFERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked)$")
_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Entries of a kernel's last axis to copy at a time.
_COLUMNS = 32
# What a file may be instead of a safetensors file, and the remedy.
_PICKLED = "name it .ckpt if it is a checkpoint that torch wrote, or fetch .safetensors"
_REMEDIES = {
    "a zip file": _PICKLED,
    "a pickle": _PICKLED,
    "the pointer to a file of Git LFS": "fetch the file itself (git lfs pull)",
    "a web page": "fetch it again, with the token that it may ask for",
}
_WEIGHTS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def flax_name(path: tuple) -> str:
    """Returns the dotted path of a parameter in its module."""
    return ".".join(jax.tree_util.keystr((part,), simple=True) for part in path[:-1])


def torch_key(name: str) -> str:
    """Returns the key in torch's files of a parameter, given its dotted path."""
    parents, dot, last = name.rpartition(".")
    return parents + dot + _WEIGHTS.get(last, last)


def torch_name(path: tuple) -> str:
    """Returns the key in torch's files of a parameter, given its path in a module."""
    return torch_key(flax_name(path))


def _is_kernel(name: str) -> bool:
    """Tells whether torch orders the axes of a parameter otherwise, given its dotted path."""
    return name.rpartition(".")[2] == "kernel"


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a parameter's shape in torch's files, which is (out, in, height, width) for kernels."""
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(flax_name(path)) else shape


def from_torch(path: tuple, array: np.ndarray) -> np.ndarray:
    """Orders the axes of an array from torch's files as our parameter does: (height, width, in, out) for kernels."""
    return array.transpose((*range(2, array.ndim), 1, 0)) if _is_kernel(flax_name(path)) else array


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Orders the axes of our parameter, given its dotted path, as torch's files have them."""
    return array.transpose((array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))) if _is_kernel(name) else array


class Layout(NamedTuple):
    """How a kind of file names and stores a parameter, given its path in the module."""

    name: Callable[[tuple], str]
    shape: Callable[[tuple, tuple[int, ...]], tuple[int, ...]]  # from our shape to the file's
    ours: Callable[[tuple, np.ndarray], np.ndarray]  # from the file's array to ours


TORCH = Layout(torch_name, torch_shape, from_torch)
FLAX = Layout(flax_name, lambda _path, shape: shape, lambda _path, array: array)


class Weights(Protocol):
    """The arrays of one network. Names and shapes are known; values are read one array at a time."""

    folder: Path
    layout: Layout
    shapes: dict[str, tuple[int, ...]]  # by the layout's name
    keys: dict[str, str]  # keys in torch's files, by the layout's name
    nbytes: int

    def __getitem__(self, name: str) -> np.ndarray: ...

    def buffers(self) -> dict[str, np.ndarray]:
        """Reads the arrays that no module needs, by their keys in torch's files."""

    def __enter__(self) -> "Weights": ...

    def __exit__(self, *_: object) -> None: ...


class Entry(NamedTuple):
    """A tensor in a file."""

    key: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], np.ndarray]


class Tensors:
    """The tensors in one network's folder. Shapes are read at once, values one tensor at a time.

    Args:
        folder: contains `STEM.safetensors`, or `STEM.safetensors.index.json` and the shards that it names.
        stem: the name of the weight file without its ending, as diffusers or transformers have it.
        variant: "fp16" reads `STEM.fp16.safetensors`.
        rename: returns the module's key for a key in the file, or None for a tensor of another network. A parameter may
            have several keys in the file if the values are equal.

    Raises:
        CheckpointError: a file is missing or broken.
    """

    layout = TORCH
    ending = "safetensors"

    def __init__(self, folder: Path, stem: str, variant: str | None, rename: Callable[[str], str | None]):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, str] = {}
        self.nbytes = 0
        self._stack = ExitStack()
        self.entries: dict[str, Entry] = {}  # by the module's name
        self._buffers: dict[str, Callable[[], np.ndarray]] = {}
        try:
            for path in _files(folder, stem, variant, self.ending):
                for entry in self._open(path):
                    if (name := rename(entry.key)) is not None:
                        self._add(path, entry, name)
        except BaseException:
            self._stack.close()
            raise

    def _add(self, path: Path, entry: Entry, name: str) -> None:
        if _BUFFERS.search(entry.key):
            self._buffers[entry.key] = entry.read
            return
        if name in self.keys:
            if entry.shape != self.shapes[name] or not np.array_equal(entry.read(), self[name]):
                both = f"{entry.key} and {self.keys[name]}"
                raise CheckpointError(f"{path}: {both} are the same parameter {name}, but differ; fetch it again")
            return
        self.keys[name] = entry.key
        self.shapes[name] = entry.shape
        self.nbytes += entry.nbytes
        self.entries[name] = entry

    def _open(self, path: Path) -> Iterator[Entry]:
        try:
            file = self._stack.enter_context(safe_open(path, framework="numpy"))
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_slice(key)
                shape = tuple(tensor.get_shape())
                nbytes = math.prod(shape) * _SIZES.get(tensor.get_dtype(), 1)
                yield Entry(key, shape, nbytes, partial(_read, file, path, key))
        except (SafetensorError, OSError) as error:
            if (kind := looks_like(path)) in _REMEDIES:
                raise CheckpointError(f"{path} is {kind}, expected a safetensors file; {_REMEDIES[kind]}") from None
            raise CheckpointError(
                f"{path} is missing, truncated or no safetensors file ({error}); fetch it again"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def buffers(self) -> dict[str, np.ndarray]:
        return {key: read() for key, read in self._buffers.items()}

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _read(file: Any, path: Path, key: str) -> np.ndarray:
    try:
        return file.get_tensor(key)
    except (SafetensorError, AttributeError, TypeError, ValueError):
        dtype = file.get_slice(key).get_dtype()
        raise CheckpointError(f"{path}: cannot read {key} of type {_DTYPES.get(dtype, dtype)}") from None


def looks_like(path: Path) -> str | None:
    """Tells by its first bytes what a file is; None if it is missing or of an unknown kind."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    if start[:4] == b"PK\3\4":
        return "a zip file"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle"
    if start.startswith(b"version https://git-lfs"):
        return "the pointer to a file of Git LFS"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return "a safetensors file" if start[8:9] == b"{" else None


def weight_names(stem: str, variant: str | None, ending: str) -> tuple[str, str]:
    """Returns the names of a weight file and of the index that replaces it if the weights are sharded."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.{ending}", f"{stem}.{ending}.index{dot}.json"


def weight_files(stem: str, variant: str | None) -> list[str]:
    """Returns patterns of the names that a network's safetensors files may have."""
    whole, index = weight_names(stem, variant, "safetensors")
    return [whole, index, whole.replace(".safetensors", "-*-of-*.safetensors")]


def _files(folder: Path, stem: str, variant: str | None, ending: str) -> Iterable[Path]:
    """Returns the paths of a network's weight file or of its shards."""
    whole, index = (folder / name for name in weight_names(stem, variant, ending))
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{index} has no weight_map of names to files")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, a file outside its own folder")
            if not os.path.isfile(folder / name):  # Path.is_file raises on names that are too long
                raise CheckpointError(f"{folder / name} is missing, although {index.name} names it; fetch it again")
        return [folder / name for name in names]
    raise CheckpointError(f"{whole} is missing. {_remedy(folder, stem, variant)}")


def _remedy(folder: Path, stem: str, variant: str | None) -> str:
    """Returns a hint for a folder without the requested weight file."""
    there = sorted(p.name for p in folder.glob(f"{stem}*")) if folder.is_dir() else []
    variants = sorted({v for n in there if (v := _variant(n, stem)) is not None})
    if variants:
        choices = " or ".join("no variant" if v == "" else f'variant="{v}"' for v in variants)
        return f"The folder has weights for {choices}{did_you_mean(variant, filter(None, variants))}"
    if any(n.endswith((".bin", ".ckpt", ".msgpack")) for n in there):
        return f"Only .safetensors files are read, the folder has {', '.join(there)}: use sega-jax-convert"
    return f"Is {folder.parent} a whole checkpoint in diffusers layout?"


def _variant(name: str, stem: str) -> str | None:
    """Returns the variant in a weight file's name, "" for no variant; None if it is no name of a weight file."""
    match = re.fullmatch(
        re.escape(stem)
        + r"(?:\.(?P<a>[^.]+))?\.safetensors|"
        + re.escape(stem)
        + r"\.safetensors\.index(?:\.(?P<b>[^.]+))?\.json",
        name,
    )
    return None if match is None else match["a"] or match["b"] or ""


def leaves(module: Any) -> dict[str, tuple[int, ...]]:
    """Returns {key in torch's files: shape there} of every parameter, for a module with or without values."""
    return {
        torch_name(path): torch_shape(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }


def check(module: Any, weights: Weights) -> None:
    """Compares the names and shapes of a module's parameters with those in a file.

    Raises:
        CheckpointError: some differ; the error lists every missing, unexpected and misshapen parameter.
    """
    wanted = {
        weights.layout.name(path): weights.layout.shape(path, leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }
    problems = [f"  missing    {name} {shape}" for name, shape in wanted.items() if name not in weights.shapes]
    problems += [f"  unexpected {name} {shape}" for name, shape in weights.shapes.items() if name not in wanted]
    problems += [
        f"  misshapen  {name}: {weights.shapes[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in weights.shapes and weights.shapes[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{weights.folder}: the weights do not fit {type(module).__name__} as its config describes it:\n"
            + "\n".join(sorted(problems))
        )


def fill(
    module: M,
    weights: Weights,
    dtype: DTypeLike | None,
    place: Callable[[np.ndarray], Any] = jax.numpy.asarray,
) -> M:
    """Returns a module with the parameters in `weights`, which are read one at a time.

    Args:
        module: without values.
        weights: of exactly this module.
        dtype: casts the parameters; None keeps their dtypes.
        place: puts an array on devices.

    Raises:
        CheckpointError: the parameters of the module and the file differ, or values are not finite in the file or in
            `dtype`, or have no floating type. The error lists all such parameters.
    """
    check(module, weights)
    bad = []

    def read(path, leaf):
        name = weights.layout.name(path)
        array = weights[name]
        if not is_floating(array.dtype):
            bad.append(f"  {name} is {array.dtype}, expected a floating type")
        elif not is_finite(array):
            bad.append(f"  {name} has NaN or infinite entries")
        if bad:
            return leaf
        with np.errstate(over="ignore"):
            ours = _contiguous(weights.layout.ours(path, array))
            cast = ours if dtype is None else ours.astype(dtype, copy=False)
        if cast.dtype != array.dtype and not is_finite(cast):
            bad.append(f"  {name} overflows {cast.dtype}; use another dtype")
        return leaf if bad else place(cast)

    filled = jax.tree_util.tree_map_with_path(read, module)
    if bad:
        raise CheckpointError(f"{weights.folder}: unusable weights:\n" + "\n".join(bad))
    return filled


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Returns a C-contiguous copy of an array, or the array itself if it is contiguous. The last axis of a kernel is
    the first in torch's files, so the copy goes by parts of that axis, which fit the processor's cache."""
    if array.flags.c_contiguous:
        return array
    copy, integer = np.empty(array.shape, array.dtype), f"u{array.dtype.itemsize}"
    for start in range(0, array.shape[-1], _COLUMNS):
        part = (..., slice(start, start + _COLUMNS))
        copy.view(integer)[part] = array.view(integer)[part]
    return copy
