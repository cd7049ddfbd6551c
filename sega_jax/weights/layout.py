"""Translates the names and axes of parameters between this library's modules and files.

The dotted path of a parameter equals its key in torch's files, except for the last part. This part is the Flax
name, which determines the layout: a `kernel` is torch's `weight` with its axes in a different order, and a `scale` or
an `embedding` is torch's `weight` with the same axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

_WEIGHTS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def flax_name(path: tuple) -> str:
    """Returns the dotted path of a parameter in its module."""
    return ".".join(jax.tree_util.keystr((part,), simple=True) for part in path[:-1])


def torch_key(name: str) -> str:
    """Returns the key of a parameter in torch's files, given its dotted path."""
    parents, dot, last = name.rpartition(".")
    return parents + dot + _WEIGHTS.get(last, last)


def torch_name(path: tuple) -> str:
    """Returns the key of a parameter in torch's files, given its path in a module."""
    return torch_key(flax_name(path))


def _is_kernel(name: str) -> bool:
    """Returns whether the parameter at a dotted path has its axes in a different order in torch."""
    return name.rpartition(".")[2] == "kernel"


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a parameter's shape in torch's files: (out, in, height, width) for kernels."""
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(flax_name(path)) else shape


def from_torch(path: tuple, array: np.ndarray) -> np.ndarray:
    """Transposes an array from torch's axis order to the module's: (height, width, in, out) for kernels."""
    return array.transpose((*range(2, array.ndim), 1, 0)) if _is_kernel(flax_name(path)) else array


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Transposes a parameter, given its dotted path, to torch's axis order: (out, in, height, width) for kernels."""
    return array.transpose((array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))) if _is_kernel(name) else array


class Entry(NamedTuple):
    """A tensor in a file."""

    key: str
    shape: tuple[int, ...]
    nbytes: int  # the size of the array that `read` returns, in bytes
    read: Callable[[], np.ndarray]
    eight_bit: bool = False  # whether the file stores 8-bit floats


class Layout(NamedTuple):
    """Describes how a file format names and stores a parameter, given its path in the module."""

    name: Callable[[tuple], str]
    shape: Callable[[tuple, tuple[int, ...]], tuple[int, ...]]  # converts a module's shape to the shape in the file
    ours: Callable[[tuple, np.ndarray], np.ndarray]  # converts the file's array to the module's axis order


TORCH = Layout(torch_name, torch_shape, from_torch)
FLAX = Layout(flax_name, lambda _path, shape: shape, lambda _path, array: array)


def leaves(module: Any) -> dict[str, tuple[int, ...]]:
    """Returns {key in torch's files: shape in torch's files} for a module. Only its parameters' shapes are read."""
    return {
        torch_name(path): torch_shape(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }
