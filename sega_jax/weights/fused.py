"""Splits or reshapes tensors that a file stores fused, transposed, or as 1 x 1 convolutions."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from sega_jax.weights.layout import Entry


class Forms(NamedTuple):
    """Describes which of a network's tensors a file stores in a different form. Patterns match any part of a name."""

    fused: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # {pattern: layers stacked row-wise}
    convolutions: str = r"$^"  # linear layers stored as 1 x 1 convolutions
    transposed: str = r"$^"  # matrices stored as [in, out]; the pattern is searched for in the file's names


def parameters(name: str, entry: Entry, forms: Forms, width: int | None = None) -> Iterator[tuple[str, Entry]]:
    """Yields (name, entry) for each parameter in a tensor. Parameters in a fused tensor are named "NAME[LAYER]".

    Args:
        name: the tensor's name; the patterns of `forms` are searched for in it.
        entry: the tensor in the file.
        width: how many consecutive rows of a fused tensor belong to one layer, for example the size of an attention
            head. None means that all rows of a layer are consecutive.
    """
    if len(entry.shape) == 2 and re.search(forms.transposed, entry.key):
        entry = entry._replace(shape=entry.shape[::-1], read=partial(_transposed, entry.read))
    if entry.shape[2:] in ((1,), (1, 1)) and re.search(forms.convolutions, name):
        entry = entry._replace(shape=entry.shape[:2], read=partial(_reshaped, entry.read, entry.shape[:2]))
    layers = next((layers for pattern, layers in forms.fused.items() if re.search(pattern, name)), ())
    if not layers or not entry.shape or entry.shape[0] % (len(layers) * (width or 1)):
        # A tensor that cannot be split matches no parameter. The later comparison of names and shapes reports it.
        yield name, entry
        return
    rows, *rest = entry.shape[0] // len(layers), *entry.shape[1:]
    groups = (-1, len(layers), width or rows, *rest)
    for i, layer in enumerate(layers):
        read = partial(_rows, entry.read, groups, i, (rows, *rest))
        yield f"{name}[{layer}]", Entry(f"{entry.key}[{layer}]", (rows, *rest), entry.nbytes // len(layers), read)


def _transposed(read: Callable[[], np.ndarray]) -> np.ndarray:
    return read().T


def _reshaped(read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return read().reshape(shape)


def _rows(read: Callable[[], np.ndarray], groups: tuple[int, ...], layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the rows of one layer. `groups` is the shape [groups, layers, rows in a group, ...]."""
    return read().reshape(groups)[:, layer].reshape(shape)
