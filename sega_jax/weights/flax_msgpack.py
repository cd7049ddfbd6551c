"""Reads the weights of one network from the msgpack files that diffusers and transformers wrote for Flax.

`flax.serialization.to_bytes` writes a map of maps, one for each Linen module, whose leaves are arrays. Flax reads it
with `msgpack`, and so does this file, with limits in place of trust: such files have no lists and few names. An array
is an extension of msgpack, which holds its shape, dtype and entries. Nothing in such a file is code.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from sega_jax.text.files import CheckpointError
from sega_jax.weights import float8
from sega_jax.weights.layout import Entry, Layout, torch_key, torch_name
from sega_jax.weights.tensors import Tensors, looks_like, weight_files
from sega_jax.weights.torch_pickle import mapped

# Linen stores parameters in the order of our axes. Names are torch's, so that a module's `rename` applies.
LINEN = Layout(torch_name, lambda _path, shape: shape, lambda _path, array: array)
# Limits far beyond any network: names in a file, names in one map, and letters of a dotted path.
_MOST_NAMES, _MOST_IN_ONE, _LONGEST = 2**16, 2**10, 512
# Flax's extensions of msgpack that are arrays, and the mark of a map that is an array of more than 2^30 bytes.
_ARRAY, _SCALAR, _CHUNKED = 1, 3, "__msgpack_chunked_array__"
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
_OTHERS = (np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_)
_DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (*_FLOATS, *_OTHERS)}
# torch's names of layers that have other names in Linen's autoencoder.
_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class FlaxTensors(Tensors):
    """The arrays of `diffusion_flax_model.msgpack` (diffusers) or `flax_model.msgpack` (transformers), or of the shards
    that `flax_model.msgpack.index.json` names. They are in memory until the file is closed, because msgpack is read as
    a whole.

    Args:
        folder, variant, rename: as for `Tensors`.
        stem: the name of the safetensors file in its place, without ending.

    Raises:
        CheckpointError: a file is missing or broken, or holds anything but arrays.
    """

    layout = LINEN
    ending = "msgpack"

    def __init__(self, folder: Path, stem: str, variant: str | None, rename: Callable[[str], str | None]):
        super().__init__(folder, flax_stem(stem), variant, rename)

    def _open(self, path: Path) -> Iterator[Entry]:
        self._stack.callback(self.entries.clear)
        try:
            with mapped(path) as data:
                arrays = list(_flat(_unpacked(data)))
        except CheckpointError:
            raise
        except Exception as error:  # a broken file can fail anywhere
            kind = looks_like(path) or "truncated or no weight file of Flax"
            reason = str(error)[:100] or type(error).__name__
            raise CheckpointError(f"{path} is {kind}, expected Flax's msgpack ({reason}); fetch it again") from None
        for name, array in arrays:
            size = float8.width(array.dtype) * array.size
            read, eight_bit = partial(float8.widened, array), float8.is_eight_bit(array.dtype)
            yield Entry(torch_key(_torch_path(name)), array.shape, size, read, eight_bit)


def flax_stem(stem: str) -> str:
    """Returns the name of Flax's weight file without ending, given that of the safetensors file in its place."""
    return "flax_model" if stem == "model" else stem.replace("_pytorch_", "_flax_")


def files(stem: str, variant: str | None) -> list[str]:
    """Returns patterns of the names that a network's files may have, given the safetensors file's without ending."""
    return weight_files(flax_stem(stem), variant, FlaxTensors.ending)


def _unpacked(data: Any) -> Any:
    """Returns the content of a file: a map of maps of arrays.

    Args:
        data: a buffer.

    Raises:
        ValueError: it is no msgpack, or exceeds the limits.
    """
    names = 0

    def map_or_array(content: dict[str, Any]) -> Any:
        nonlocal names
        names += len(content)
        if names > _MOST_NAMES:
            raise ValueError(f"more than {_MOST_NAMES} names")
        return _joined(content) if _CHUNKED in content else content

    return msgpack.unpackb(
        data,
        ext_hook=_array,
        object_hook=map_or_array,
        max_map_len=_MOST_IN_ONE,
        max_str_len=_LONGEST,
        max_array_len=0,
        max_bin_len=0,
    )


def _array(code: int, data: bytes) -> np.ndarray:
    """Returns the array in an extension of msgpack, whose content is a list of its shape, dtype and entries.

    Raises:
        ValueError: it is something else.
    """
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"an extension of kind {code}, expected an array")
    shape, name, entries = msgpack.unpackb(data, max_array_len=32, max_map_len=0, max_str_len=_LONGEST)
    if name not in _DTYPES:
        raise ValueError(f"entries of type {str(name)[:20]}, expected one of {', '.join(_DTYPES)}")
    return _shaped(np.frombuffer(entries, _DTYPES[name]), shape)


def _joined(content: Mapping[str, Any]) -> np.ndarray:
    """Returns the array that a map stands for by its shape and the chunks of its entries, which are maps of places to
    values.

    Raises:
        ValueError: it is something else.
    """
    shape, chunks = ([content[name][str(i)] for i in range(len(content[name]))] for name in ("shape", "chunks"))
    if len({chunk.dtype for chunk in chunks}) != 1:
        raise ValueError("chunks of an array that are of several types")
    return _shaped(np.concatenate(chunks), shape)


def _shaped(entries: np.ndarray, shape: Any) -> np.ndarray:
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) != entries.size:
        raise ValueError(f"{entries.size} entries of an array of shape {str(shape)[:80]}")
    return entries.reshape(shape)


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays in maps with their dotted paths.

    Raises:
        ValueError: there is something else in the maps, or a path is too long.
    """
    if isinstance(content, np.ndarray) and path:
        yield path, content
        return
    if not isinstance(content, dict):
        raise ValueError(f"{path[:80] or 'its content'} is a {type(content).__name__}, expected an array")
    for name, value in content.items():
        if len(path) + len(name) > _LONGEST:
            raise ValueError(f"a path of more than {_LONGEST} letters")
        yield from _flat(value, f"{path}.{name}" if path else name)


def _torch_path(name: str) -> str:
    """Returns the dotted path in torch's modules of a dotted path in Linen's, which have no lists: `resnets_0` is
    `resnets.0`. The layers of a time embedding, `linear_1` and `linear_2`, have these names in torch, too."""
    *parents, last = re.sub(r"(?<!\blinear)_(\d+)(?=\.)", r".\1", name).split(".")
    if parents:
        parents[-1] = _LAYERS.get(parents[-1], parents[-1])
    return ".".join([*parents, last])
