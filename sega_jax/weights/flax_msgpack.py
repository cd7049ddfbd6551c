"""Reads the weights of one network from a diffusers or transformers Flax checkpoint, stored as msgpack files.

`flax.serialization.to_bytes` writes one map for each Linen module. The maps are nested, and their leaves are arrays. An
array is a msgpack extension that holds its shape, dtype and entries. Like Flax, this module reads files with `msgpack`,
but it limits their size and structure. Reading a file runs no code.
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

# Linen and this library order the axes of parameters in the same way. Names are converted to torch's names, because
# each module's `rename` expects torch's names.
LINEN = Layout(torch_name, lambda _path, shape: shape, lambda _path, array: array)
# Limits far above the needs of real networks: the number of names in a file and in one map, and the length of a path.
_MAX_NAMES, _MAX_NAMES_IN_MAP, _MAX_PATH_LENGTH = 2**16, 2**10, 512
# Codes of Flax's msgpack extensions for arrays, and the key that marks a map as an array of more than 2^30 bytes.
_ARRAY, _SCALAR, _CHUNKED = 1, 3, "__msgpack_chunked_array__"
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
_INTEGERS = (np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_)
_DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (*_FLOATS, *_INTEGERS)}
# Autoencoder layers whose names differ between Linen and torch.
_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class FlaxTensors(Tensors):
    """Reads the arrays of one network in Flax's msgpack format.

    The arrays are in `diffusion_flax_model.msgpack` (diffusers), in `flax_model.msgpack` (transformers), or in the
    shards that `flax_model.msgpack.index.json` lists. All arrays stay in memory until the file is closed, because
    msgpack cannot be read in parts.

    Args:
        folder, variant, rename: as for `Tensors`.
        stem: the name of the corresponding safetensors file, without its extension.

    Raises:
        CheckpointError: a file is missing or broken, or contains anything other than arrays.
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
        except Exception as error:  # a broken file can raise errors of many types
            kind = looks_like(path) or "truncated or not a Flax weight file"
            reason = str(error)[:100] or type(error).__name__
            raise CheckpointError(
                f"{path} is {kind}, expected a Flax msgpack file ({reason}); fetch it again"
            ) from None
        for name, array in arrays:
            size = float8.width(array.dtype) * array.size
            read, eight_bit = partial(float8.widened, array), float8.is_eight_bit(array.dtype)
            yield Entry(torch_key(_torch_path(name)), array.shape, size, read, eight_bit)


def flax_stem(stem: str) -> str:
    """Returns the stem of Flax's weight file, given the stem of the corresponding safetensors file."""
    return "flax_model" if stem == "model" else stem.replace("_pytorch_", "_flax_")


def files(stem: str, variant: str | None) -> list[str]:
    """Returns shell patterns for a network's msgpack files, given the stem of the corresponding safetensors file."""
    return weight_files(flax_stem(stem), variant, FlaxTensors.ending)


def _unpacked(data: Any) -> Any:
    """Returns the content of a msgpack file as nested maps of arrays.

    Args:
        data: the bytes of the file, in a buffer.

    Raises:
        ValueError: the bytes are not valid msgpack, or exceed the limits.
    """
    names = 0

    def map_or_array(content: dict[str, Any]) -> Any:
        nonlocal names
        names += len(content)
        if names > _MAX_NAMES:
            raise ValueError(f"it contains more than {_MAX_NAMES} names")
        return _joined(content) if _CHUNKED in content else content

    return msgpack.unpackb(
        data,
        ext_hook=_array,
        object_hook=map_or_array,
        max_map_len=_MAX_NAMES_IN_MAP,
        max_str_len=_MAX_PATH_LENGTH,
        max_array_len=0,
        max_bin_len=0,
    )


def _array(code: int, data: bytes) -> np.ndarray:
    """Decodes an array from a msgpack extension, which contains the list [shape, dtype, entries].

    Raises:
        ValueError: the extension is not a valid array.
    """
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it contains an extension of type {code}, expected an array")
    shape, name, entries = msgpack.unpackb(data, max_array_len=32, max_map_len=0, max_str_len=_MAX_PATH_LENGTH)
    if name not in _DTYPES:
        raise ValueError(f"it contains entries of type {str(name)[:20]}, expected one of {', '.join(_DTYPES)}")
    return _shaped(np.frombuffer(entries, _DTYPES[name]), shape)


def _joined(content: Mapping[str, Any]) -> np.ndarray:
    """Joins the chunks of a large array, which is stored as a map with the keys "shape" and "chunks".

    Both the shape and the chunks are stored as maps from positions ("0", "1", ...) to values.

    Raises:
        ValueError: the map is not a valid array.
    """
    shape, chunks = ([content[name][str(i)] for i in range(len(content[name]))] for name in ("shape", "chunks"))
    if len({chunk.dtype for chunk in chunks}) != 1:
        raise ValueError("the chunks of an array have different dtypes")
    return _shaped(np.concatenate(chunks), shape)


def _shaped(entries: np.ndarray, shape: Any) -> np.ndarray:
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) != entries.size:
        raise ValueError(f"it stores {entries.size} entries for an array of shape {str(shape)[:80]}")
    return entries.reshape(shape)


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields (dotted path, array) for each array in nested maps.

    Raises:
        ValueError: a leaf is not an array, or a path is too long.
    """
    if isinstance(content, np.ndarray) and path:
        yield path, content
        return
    if not isinstance(content, dict):
        raise ValueError(f"{path[:80] or 'its content'} has type {type(content).__name__}, expected an array")
    for name, value in content.items():
        if len(path) + len(name) > _MAX_PATH_LENGTH:
            raise ValueError(f"it contains a path of more than {_MAX_PATH_LENGTH} characters")
        yield from _flat(value, f"{path}.{name}" if path else name)


def _torch_path(name: str) -> str:
    """Translates a dotted path in Linen modules to the path in torch modules.

    Linen has no lists of modules: its `resnets_0` is torch's `resnets.0`. The layers `linear_1` and `linear_2` of a
    time embedding keep their names.
    """
    *parents, last = re.sub(r"(?<!\blinear)_(\d+)(?=\.)", r".\1", name).split(".")
    if parents:
        parents[-1] = _LAYERS.get(parents[-1], parents[-1])
    return ".".join([*parents, last])
