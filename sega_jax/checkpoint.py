"""Fills modules from safetensors, pulling by name: complete, or an error that names every leaf.

The dotted path of a parameter is its key in the file, but for the last part, where Flax's names mark
the layout: a `kernel` is torch's `weight` with its axes in another order, `scale` and `embedding` are
its `weight` as it stands.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from sega_jax.arrays import is_finite, is_floating

M = TypeVar("M")

# Buffers that old files carry and no module needs.
_BUFFERS = re.compile(r"(^|\.)position_ids$")
_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_WEIGHTS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the file, what is wrong and the remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable, broken or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a whole checkpoint?") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


class Tensors:
    """The tensors of one component's folder: their shapes at once, their values one at a time.

    Args:
        folder: holds `STEM.safetensors`, or `STEM.safetensors.index.json` and the shards it names.
        stem: the file name without ending, of diffusers or transformers.
        variant: "fp16" takes `STEM.fp16.safetensors`.
        rename: from the file's keys to the module's.

    Raises:
        CheckpointError: no such file, or one that is broken.
    """

    def __init__(self, folder: Path, stem: str, variant: str | None, rename: Callable[[str], str]):
        self.folder = folder
        self._stack = ExitStack()
        self._source: dict[str, tuple[Any, str, Path]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in _files(folder, stem, variant):
                self._open(path, rename)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path, rename: Callable[[str], str]) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="numpy"))
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if _BUFFERS.search(key):
                    continue
                name = rename(key)
                if name in self._source:
                    raise CheckpointError(f"{path}: {key} and {self._source[name][1]} are the same parameter {name}")
                self._source[name] = (file, key, path)
                self.shapes[name] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is missing, truncated or no safetensors file ({error}); fetch it again"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        file, key, path = self._source[name]
        try:
            return file.get_tensor(key)
        except (SafetensorError, AttributeError, TypeError, ValueError):
            dtype = file.get_slice(key).get_dtype()
            raise CheckpointError(f"{path}: cannot read {name} of type {_DTYPES.get(dtype, dtype)}") from None

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def weight_files(stem: str, variant: str | None) -> list[str]:
    """Patterns of the names that a component's weight files may have."""
    dot = f".{variant}" if variant else ""
    return [f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json", f"{stem}{dot}-*-of-*.safetensors"]


def _files(folder: Path, stem: str, variant: str | None) -> Iterable[Path]:
    dot = f".{variant}" if variant else ""
    whole = folder / f"{stem}{dot}.safetensors"
    index = folder / f"{stem}.safetensors.index{dot}.json"
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
            if not (folder / name).is_file():
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
        return f"Only .safetensors files are read, the folder has {', '.join(there)}: save it with safetensors"
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


def torch_name(path: tuple) -> str:
    """The checkpoint's key of a parameter, from its path in a module."""
    *parents, last, _value = [jax.tree_util.keystr((part,), simple=True) for part in path]
    return ".".join([*parents, _WEIGHTS.get(last, last)])


def _is_kernel(path: tuple) -> bool:
    return jax.tree_util.keystr((path[-2],), simple=True) == "kernel"


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the checkpoint of a parameter of this shape: (out, in, height, width) for kernels."""
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(path) else shape


def from_torch(path: tuple, array: np.ndarray) -> np.ndarray:
    """A checkpoint's array with the axes of our parameter: (height, width, in, out) for kernels."""
    return array.transpose((*range(2, array.ndim), 1, 0)) if _is_kernel(path) else array


def leaves(module: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter's key and shape in a checkpoint, for a module with or without values."""
    return {
        torch_name(path): torch_shape(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }


def fill(
    module: M,
    tensors: Tensors,
    dtype: DTypeLike,
    place: Callable[[np.ndarray], jax.Array] = jax.numpy.asarray,
) -> M:
    """The module with its parameters read from `tensors`, one at a time, cast and placed on devices.

    Raises:
        CheckpointError: lists every missing, extra and misshapen leaf; or names those that are not finite
            in the file or in `dtype`, or not of a floating type.
    """
    wanted = leaves(module)
    problems = [f"  missing    {name} {shape}" for name, shape in wanted.items() if name not in tensors.shapes]
    problems += [f"  unexpected {name} {shape}" for name, shape in tensors.shapes.items() if name not in wanted]
    problems += [
        f"  misshapen  {name}: {tensors.shapes[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in tensors.shapes and tensors.shapes[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{tensors.folder}: the weights do not fit {type(module).__name__} as its config.json describes it:\n"
            + "\n".join(sorted(problems))
        )
    bad = []

    def read(path, leaf):
        name = torch_name(path)
        array = tensors[name]
        if not is_floating(array.dtype):
            bad.append(f"  {name} is {array.dtype}, expected a floating type")
        elif not is_finite(array):
            bad.append(f"  {name} has NaN or infinite entries")
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(from_torch(path, array)).astype(dtype, copy=False)
        if not bad and not is_finite(cast):
            bad.append(f"  {name} overflows {np.dtype(dtype).name}; load with another dtype")
        return leaf if bad else place(cast)

    filled = jax.tree_util.tree_map_with_path(read, module)
    if bad:
        raise CheckpointError(f"{tensors.folder}: unusable weights:\n" + "\n".join(bad))
    return filled
