"""Fills modules from files, pulling by name: complete, or an error that names every leaf.

The dotted path of a parameter is its key in torch's files, but for the last part, where Flax's names mark
the layout: a `kernel` is torch's `weight` with its axes in another order, `scale` and `embedding` are
its `weight` as it stands.
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

from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.text.files import CheckpointError as CheckpointError
from sega_jax.text.files import read_json as read_json

M = TypeVar("M")

# Buffers that files carry and no module needs.
_BUFFERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked)$")
_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Of a kernel, as many entries of the last axis are copied together.
_COLUMNS = 32
# What files turn out to be, and what helps.
_PICKLED = "name it .ckpt if it is a checkpoint that torch wrote, or fetch .safetensors"
_REMEDIES = {
    "a zip file": _PICKLED,
    "a pickle": _PICKLED,
    "the pointer to a file of Git LFS": "fetch the file itself (git lfs pull)",
    "a web page": "fetch it again, with the token that it may ask for",
}
_WEIGHTS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def flax_name(path: tuple) -> str:
    """The dotted path of a parameter in its module."""
    return ".".join(jax.tree_util.keystr((part,), simple=True) for part in path[:-1])


def torch_key(name: str) -> str:
    """The key in torch's files of the parameter of this dotted path."""
    parents, dot, last = name.rpartition(".")
    return parents + dot + _WEIGHTS.get(last, last)


def torch_name(path: tuple) -> str:
    """The key in torch's files of a parameter, from its path in a module."""
    return torch_key(flax_name(path))


def _is_kernel(name: str) -> bool:
    """Whether the axes of the parameter of this dotted path have another order in torch."""
    return name.rpartition(".")[2] == "kernel"


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch's files of a parameter of this shape: (out, in, height, width) for kernels."""
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(flax_name(path)) else shape


def from_torch(path: tuple, array: np.ndarray) -> np.ndarray:
    """An array of torch's files with the axes of our parameter: (height, width, in, out) for kernels."""
    return array.transpose((*range(2, array.ndim), 1, 0)) if _is_kernel(flax_name(path)) else array


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """The array of our parameter of this dotted path with the axes of torch's files."""
    return array.transpose((array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))) if _is_kernel(name) else array


class Layout(NamedTuple):
    """What a kind of file makes of a parameter, by its path in the module."""

    name: Callable[[tuple], str]
    shape: Callable[[tuple, tuple[int, ...]], tuple[int, ...]]  # in the file, from our shape
    ours: Callable[[tuple, np.ndarray], np.ndarray]  # the file's array with our axes


TORCH = Layout(torch_name, torch_shape, from_torch)
FLAX = Layout(flax_name, lambda _path, shape: shape, lambda _path, array: array)


class Weights(Protocol):
    """The arrays of one component: what they are at once, their values one at a time."""

    folder: Path
    layout: Layout
    shapes: dict[str, tuple[int, ...]]  # by the layout's name
    keys: dict[str, str]  # in torch's files, by the layout's name
    nbytes: int

    def __getitem__(self, name: str) -> np.ndarray: ...

    def buffers(self) -> dict[str, np.ndarray]:
        """The arrays that no module needs, by their key in torch's files."""


class Entry(NamedTuple):
    """A tensor of a file."""

    key: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], np.ndarray]


class Tensors:
    """The tensors of one component's folder: their shapes at once, their values one at a time.

    Args:
        folder: holds `STEM.safetensors`, or `STEM.safetensors.index.json` and the shards it names.
        stem: the file name without ending, of diffusers or transformers.
        variant: "fp16" takes `STEM.fp16.safetensors`.
        rename: from the file's keys to the module's; to None for what is of another network. A parameter may be there
            under several keys, with the same values.

    Raises:
        CheckpointError: no such file, or one that is broken.
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
            if (found := looks_like(path)) in _REMEDIES:
                raise CheckpointError(f"{path} is {found}, expected a safetensors file; {_REMEDIES[found]}") from None
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
    """What a file is by its first bytes; None for what is not known, and where there is none."""
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
    """The names of a weight file and of the index that stands for it where it is sharded."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.{ending}", f"{stem}.{ending}.index{dot}.json"


def weight_files(stem: str, variant: str | None) -> list[str]:
    """Patterns of the names that a component's safetensors files may have."""
    whole, index = weight_names(stem, variant, "safetensors")
    return [whole, index, whole.replace(".safetensors", "-*-of-*.safetensors")]


def _files(folder: Path, stem: str, variant: str | None, ending: str) -> Iterable[Path]:
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
    raise CheckpointError(f"{whole} is missing. {_remedy(folder, stem)}")


def _remedy(folder: Path, stem: str) -> str:
    there = sorted(p.name for p in folder.glob(f"{stem}*")) if folder.is_dir() else []
    variants = sorted({v for n in there if (v := _variant(n, stem)) is not None})
    if variants:
        choices = " or ".join("no variant" if v == "" else f'variant="{v}"' for v in variants)
        return f"The folder has weights for {choices}"
    if any(n.endswith((".bin", ".ckpt", ".msgpack")) for n in there):
        return f"Only .safetensors files are read, the folder has {', '.join(there)}: use sega-jax-convert"
    return f"Is {folder.parent} a whole checkpoint in diffusers layout?"


def _variant(name: str, stem: str) -> str | None:
    """The variant of a weight file's name, "" for none; None where it is no weight file."""
    match = re.fullmatch(
        re.escape(stem)
        + r"(?:\.(?P<a>[^.]+))?\.safetensors|"
        + re.escape(stem)
        + r"\.safetensors\.index(?:\.(?P<b>[^.]+))?\.json",
        name,
    )
    return None if match is None else match["a"] or match["b"] or ""


def leaves(module: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter's key and shape in a checkpoint, for a module with or without values."""
    return {
        torch_name(path): torch_shape(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }


def check(module: Any, weights: Weights) -> None:
    """Compares names and shapes.

    Raises:
        CheckpointError: lists every missing, extra and misshapen leaf.
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
    """The module with its parameters read from `weights`, one at a time, cast (None: as they are) and placed
    on devices.

    Raises:
        CheckpointError: lists every missing, extra and misshapen leaf; or names those that are not finite
            in the file or in `dtype`, or not of a floating type.
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
    """The array in the order of its axes, of which kernels of torch's files have the last as their first: some of its
    entries at a time, as the processor's cache holds no more."""
    if array.flags.c_contiguous:
        return array
    made, integer = np.empty(array.shape, array.dtype), f"u{array.dtype.itemsize}"
    for start in range(0, array.shape[-1], _COLUMNS):
        part = (..., slice(start, start + _COLUMNS))
        made.view(integer)[part] = array.view(integer)[part]
    return made
