"""Reads 8-bit floats and converts them to wider types.

float16 represents every value of the common 8-bit types exactly. Files may store a weight divided by a scale, so that
its entries use the full range of these types. A separate tensor contains the scale: one number for the entire weight,
for each row (output of the layer), or for each block of a matrix.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from sega_jax.method.numerics import is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.weights.layout import Entry

# Keys are the dtype names in safetensors headers. The last type stores scales, which are powers of two from 2^-127 to
# 2^127.
DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_WIDE: dict[np.dtype, np.dtype] = {np.dtype(dtype): np.dtype(np.float16) for dtype in DTYPES.values()}
_WIDE[np.dtype(ml_dtypes.float8_e8m0fnu)] = np.dtype(np.float32)
# The scale of "layer.weight" may have any of these names, as in "layer.scale_weight". The last name is used for
# block-wise scales. Despite its name, such a scale multiplies the weight instead of dividing it.
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# Tensors to skip: metadata about the format, and the scales of layer inputs, which only quantised computation needs.
_NOTES = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
# The maximum size of a metadata tensor, in bytes.
_MAX_NOTE_SIZE = 2**12
# The most common block size, in entries along each axis.
_BLOCK = 128


def in_safetensors(path: Path) -> dict[str, Entry]:
    """Returns {key: tensor} for the 8-bit tensors in a safetensors file. `safe_open` must have validated the header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = {}
    for key, tensor in header.items():
        if key != "__metadata__" and tensor["dtype"] in DTYPES:
            kind, shape = np.dtype(DTYPES[tensor["dtype"]]), tuple(tensor["shape"])
            read = partial(_read, path, 8 + length + tensor["data_offsets"][0], shape, kind)
            tensors[key] = Entry(key, shape, math.prod(shape) * _WIDE[kind].itemsize, read, eight_bit=True)
    return tensors


def widened(array: np.ndarray) -> np.ndarray:
    """Converts an array of 8-bit floats to a wider type without rounding. Other arrays are returned unchanged."""
    if array.dtype not in _WIDE:
        return array
    with np.errstate(invalid="ignore"):  # `pull.fill` reports NaN later
        return array.astype(_WIDE[array.dtype])


def is_eight_bit(dtype: np.dtype) -> bool:
    """Returns whether a dtype is an 8-bit float."""
    return dtype in _WIDE


def width(dtype: np.dtype) -> int:
    """Returns the number of bytes per entry after `widened`."""
    return _WIDE.get(dtype, dtype).itemsize


def scaled(path: Path, entries: Iterable[Entry]) -> dict[str, Entry]:
    """Returns {key: tensor}. Reading a weight from the result multiplies it by its scale, in float32.

    The result omits scales and metadata about the format.

    Args:
        path: the file or folder that contains the tensors, for error messages.
        entries: all tensors of the file.

    Raises:
        CheckpointError: the weights are quantised in an unsupported way.
    """
    kept = {entry.key: entry for entry in entries}
    for key, entry in list(kept.items()):
        parent, dot, last = key.rpartition(".")
        if last == "comfy_quant":
            _check_format(path, entry, has_scale=f"{parent}{dot}weight_scale" in kept)
        if last == "SCB" or re.search(r"\.(quant_map|absmax|nested_absmax|quant_state\..*)$", key):
            raise CheckpointError(
                f"{path}: {key} was quantised with bitsandbytes, which is not supported; use unquantised weights"
            )
        if last in _NOTES:
            del kept[key]
        elif last in _SCALES and (weight := kept.get(f"{parent}{dot}weight")) is not None:
            del kept[key]
            read = partial(_scaled, path, weight, entry)
            kept[weight.key] = weight._replace(nbytes=4 * math.prod(weight.shape), read=read)
    weights = [key for key, entry in kept.items() if entry.eight_bit]
    parents = {key.removesuffix("weight") for key in weights if key.endswith("weight")}
    for key in kept:
        parent = key[: key.rfind(".") + 1]
        # "layer.weight.scale" is the scale of "layer.weight".
        if "scal" in key[len(parent) :] and not {parent, parent.removesuffix("weight.")}.isdisjoint(parents):
            raise CheckpointError(f"{path}: {key} scales weights in an unsupported way; use unquantised weights")
    return kept


def _check_format(path: Path, entry: Entry, *, has_scale: bool) -> None:
    """Checks the tensor in which ComfyUI stores a layer's format. Its elements are the bytes of a JSON object."""
    try:
        name = json.loads(bytes(entry.read().astype(np.uint8)) if entry.nbytes < _MAX_NOTE_SIZE else b"")["format"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{path}: {entry.key} is not readable; fetch the file again") from None
    if name not in ("float8_e4m3fn", "float8_e5m2") or not has_scale:
        what = f"the format {str(name)[:40]!r}" + ("" if has_scale else " without its scale")
        raise CheckpointError(f"{path}: {entry.key} has {what}, which is not supported; use unquantised weights")


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads an array that starts at byte `start` of a file, and widens it."""
    return widened(np.fromfile(path, np.uint8, math.prod(shape), offset=start).view(dtype).reshape(shape))


def _scaled(path: Path, weight: Entry, scale: Entry) -> np.ndarray:
    """Multiplies a weight by its scale, in float32.

    The scale contains one number for the entire weight, for each index along the first axis, or for each block of a
    matrix.

    Raises:
        CheckpointError: the weight or the scale does not contain floats, or the shape of the scale does not fit.
    """
    read = [weight.read(), scale.read()]
    if not all(is_floating(array.dtype) for array in read):
        types = " and ".join(array.dtype.name for array in read)
        raise CheckpointError(
            f"{path}: {weight.key} and {scale.key} are {types}, expected floats; use a different file"
        )
    array, factors = (array.astype(np.float32) for array in read)
    if factors.size == 1:
        return array * factors.reshape(())
    if array.ndim and factors.shape[:1] == array.shape[:1] and factors.size == len(array):
        return array * factors.reshape(-1, *[1] * (array.ndim - 1))
    if array.ndim == factors.ndim == 2:
        sizes = [_block(side, count) for side, count in zip(array.shape, factors.shape, strict=True)]
        if all(sizes):
            # The last block of an axis may be incomplete.
            blocks = factors.repeat(sizes[0], 0)[: len(array)].repeat(sizes[1], 1)[:, : array.shape[1]]
            return array * blocks
    raise CheckpointError(
        f"{path}: {scale.key} {scale.shape} does not fit {weight.key} {weight.shape}; use a different file"
    )


def _block(side: int, count: int) -> int:
    """Returns the block size along an axis of `side` entries, or 0 if `count` blocks do not determine it."""
    if -(-side // _BLOCK) == count:
        return _BLOCK
    return side // count if count and side % count == 0 else 0
