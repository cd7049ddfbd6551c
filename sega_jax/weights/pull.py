"""Fills modules with weights from files. If any parameters cannot be filled, an error lists all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.weights.tensors import Weights

M = TypeVar("M")

# The maximum number of tensors that a warning names. The rest are only counted.
_NAMED = 3
# The number of entries along a kernel's last axis that are copied at once.
_COLUMNS = 32


def check(module: Any, weights: Weights, warn: Callable[[str], None] = lambda message: None) -> dict[str, int]:
    """Checks that a file contains all parameters of a module, with the right shapes.

    Args:
        module: the module. Only the shapes of its parameters are needed.
        weights: the tensors of the file.
        warn: called with a message that names the first few tensors that the module does not need.

    Returns:
        {name in the file's layout: size in the file, in bytes} for each parameter.

    Raises:
        CheckpointError: parameters are missing or misshapen. The error lists them and the tensors that the module does
            not need, because a missing parameter may be among them under a different name.
    """
    expected = {
        weights.layout.name(path): weights.layout.shape(path, leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }
    problems = [f"  missing    {name} {shape}" for name, shape in expected.items() if name not in weights.shapes]
    problems += [
        f"  misshapen  {name}: {weights.shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in weights.shapes and weights.shapes[name] != shape
    ]
    extra = [f"{name} {shape}" for name, shape in weights.shapes.items() if name not in expected]
    if problems:
        raise CheckpointError(
            f"{weights.folder}: the weights do not fit the {type(module).__name__} described by its config:\n"
            + "\n".join(sorted([*problems, *(f"  unexpected {tensor}" for tensor in extra)]))
        )
    if extra:
        named = ", ".join(sorted(extra)[:_NAMED]) + (f" and {len(extra) - _NAMED} more" * (len(extra) > _NAMED))
        tensors, them = ("tensors that are", "them") if len(extra) > 1 else ("a tensor that is", "it")
        warn(
            f"{weights.folder} has {tensors} not used, because the {type(module).__name__} described by its config does"
            f" not need {them}: {named}"
        )
    return {name: weights.sizes[name] for name in expected}


def fill(
    module: M,
    weights: Weights,
    dtype: DTypeLike | None,
    place: Callable[[np.ndarray], Any] = jax.numpy.asarray,
    warn: Callable[[str], None] = lambda message: None,
) -> M:
    """Fills a module with the parameters in a file, which are read one at a time.

    Args:
        module: the module, whose parameters have shapes but no values (`jax.ShapeDtypeStruct`).
        weights: the tensors of the file.
        dtype: the dtype that parameters are cast to; None keeps the dtypes in the file.
        place: a function that moves an array to its devices.
        warn: as for `check`.

    Returns:
        The loaded module.

    Raises:
        CheckpointError: the file lacks parameters, or stores them with the wrong shape, a non-floating dtype, or
            entries that are not finite before or after the cast. The error lists all such parameters.
    """
    check(module, weights, warn)
    problems = []

    def read(path, leaf):
        name = weights.layout.name(path)
        array = weights[name]
        if not is_floating(array.dtype):
            problems.append(f"  {name} is {array.dtype}, expected a floating type")
        elif not is_finite(array):
            problems.append(f"  {name} has NaN or infinite entries")
        if problems:
            return leaf
        with np.errstate(over="ignore"):
            parameter = _contiguous(weights.layout.ours(path, array))
            cast = parameter if dtype is None else parameter.astype(dtype, copy=False)
        if cast.dtype != array.dtype and not is_finite(cast):
            problems.append(f"  {name} overflows {cast.dtype}; use a different dtype")
        return leaf if problems else place(cast)

    filled = jax.tree_util.tree_map_with_path(read, module)
    if problems:
        raise CheckpointError(f"{weights.folder} contains unusable weights:\n" + "\n".join(problems))
    return filled


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Returns a C-contiguous copy of an array, or the array itself if it is already C-contiguous.

    The last axis of a kernel is the first axis in torch's files. So the array is copied in slices of the last axis
    that fit in the processor's cache.
    """
    if array.flags.c_contiguous:
        return array
    copy, integer = np.empty(array.shape, array.dtype), f"u{array.dtype.itemsize}"
    for start in range(0, array.shape[-1], _COLUMNS):
        part = (..., slice(start, start + _COLUMNS))
        copy.view(integer)[part] = array.view(integer)[part]
    return copy
