"""Fills modules with the weights in files. Every parameter gets its value, or an error lists all that do not."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.weights.tensors import Weights

M = TypeVar("M")

# Tensors that a warning names; it counts the others.
_NAMED = 3
# Entries of a kernel's last axis to copy at a time.
_COLUMNS = 32


def check(module: Any, weights: Weights, warn: Callable[[str], None] = lambda message: None) -> dict[str, int]:
    """Compares the names and shapes of a module's parameters with those in a file.

    Args:
        warn: gets a message that names the first few tensors which the module does not need.

    Returns:
        The bytes of each parameter in the file, by the layout's name.

    Raises:
        CheckpointError: parameters are missing or misshapen; the error lists all of them, and the tensors that the
            module does not need, because a parameter may have another name.
    """
    wanted = {
        weights.layout.name(path): weights.layout.shape(path, leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }
    problems = [f"  missing    {name} {shape}" for name, shape in wanted.items() if name not in weights.shapes]
    problems += [
        f"  misshapen  {name}: {weights.shapes[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in weights.shapes and weights.shapes[name] != shape
    ]
    extra = [f"{name} {shape}" for name, shape in weights.shapes.items() if name not in wanted]
    if problems:
        raise CheckpointError(
            f"{weights.folder}: the weights do not fit {type(module).__name__} as its config describes it:\n"
            + "\n".join(sorted([*problems, *(f"  unexpected {one}" for one in extra)]))
        )
    if extra:
        named = ", ".join(sorted(extra)[:_NAMED]) + (f" and {len(extra) - _NAMED} more" * (len(extra) > _NAMED))
        tensors, them = ("tensors that are", "them") if len(extra) > 1 else ("a tensor that is", "it")
        warn(
            f"{weights.folder} has {tensors} not used, because {type(module).__name__} as its config describes it does"
            f" not need {them}: {named}"
        )
    return {name: weights.sizes[name] for name in wanted}


def fill(
    module: M,
    weights: Weights,
    dtype: DTypeLike | None,
    place: Callable[[np.ndarray], Any] = jax.numpy.asarray,
    warn: Callable[[str], None] = lambda message: None,
) -> M:
    """Returns a module with the parameters in `weights`, which are read one at a time.

    Args:
        module: without values.
        weights: of this module.
        dtype: casts the parameters; None keeps their dtypes.
        place: puts an array on devices.
        warn: as of `check`.

    Raises:
        CheckpointError: parameters of the module are missing in the file or have other shapes there, or values are not
            finite in the file or in `dtype`, or have no floating type. The error lists all such parameters.
    """
    check(module, weights, warn)
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
