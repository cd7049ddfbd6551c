"""Reads torch's pickled weight files without torch and without running the code in them.

`torch.save` writes an uncompressed zip file that contains a pickle and the bytes of every storage. Before torch 1.6, it
wrote several pickles followed by the storages. `sega_jax.weights.unpickling` reads the pickles.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.text.files import CheckpointError
from sega_jax.weights import float8
from sega_jax.weights.layout import Entry
from sega_jax.weights.tensors import Tensors, looks_like
from sega_jax.weights.unpickling import Machine, Storage, Tensor

_MAGIC = 0x1950A86A20F9469CFC6C  # the value of the first pickle in files that torch wrote before version 1.6
# The maximum number of files in a zip file, about ten times as many as in the largest checkpoints.
_MAX_FILES = 2**20
_PICKLES = ("a zip file", "a pickle")  # results of `looks_like` for pickled weight files
# Keys under which training programs store a model's weights, in order of preference, and the maximum nesting depth.
_INNER = ("state_dict", "model", "model_state_dict", "module", "params_ema", "params")
_MAX_DEPTH = 3


def stem(safetensors: str) -> str:
    """Returns the stem of a pickled weight file, given the stem of the corresponding safetensors file."""
    return "pytorch_model" if safetensors == "model" else safetensors


class PickledTensors(Tensors):
    """Reads the tensors of `STEM.bin`, or of the shards that `STEM.bin.index.json` lists.

    Raises:
        CheckpointError: a file is missing or broken, or contains anything other than tensors.
    """

    ending = "bin"

    def _within(self, content: Any) -> Any:
        """Returns the dictionary of tensors within the content of a file."""
        return content

    def _open(self, path: Path) -> Iterator[Entry]:
        data = mapped(path)
        self._stack.callback(data.close)
        tensors = self._within(read(path, data))
        if not isinstance(tensors, dict):
            raise CheckpointError(
                f"{path} contains a {type(tensors).__name__}, expected a dictionary of tensors; use a different file"
            )
        left = 2 * len(data)  # in bytes; more than the file's size, because tensors may share entries
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{path}: {repr(key)[:80]} is not the name of a dense tensor, expected a dictionary of dense"
                    " tensors; use a different file"
                )
            left -= tensor.nbytes
            if left < 0:
                raise CheckpointError(f"{path}: its tensors exceed the file's {len(data)} bytes; use a different file")
            size = float8.width(tensor.dtype) * math.prod(tensor.shape)
            yield Entry(key, tensor.shape, size, partial(_read, tensor, data), float8.is_eight_bit(tensor.dtype))


class NestedTensors(PickledTensors):
    """Reads the tensors of a file that may store them in a nested dictionary, along with other training state.

    The dictionary is called "state_dict" or "model", for example, or is the only dictionary in the file.

    Raises:
        CheckpointError: a file is missing or broken, it is unclear which dictionary contains the weights, or that
            dictionary contains anything other than tensors.
    """

    def _within(self, content: Any) -> Any:
        for _ in range(_MAX_DEPTH):
            inner = _dictionaries(content)
            names = [name for name in _INNER if name in inner]
            if not inner or (not names and any(isinstance(value, Tensor) for value in content.values())):
                break
            if not names and len(inner) > 1:
                raise CheckpointError(
                    f"{self.folder} contains several dictionaries, {', '.join(map(str, inner))[:200]}, and none of them"
                    f" is called {' or '.join(_INNER)}; save only the dictionary with the weights"
                )
            content = inner[(names or list(inner))[0]]
        return content


def _dictionaries(content: Any) -> dict[Any, dict]:
    """Returns the non-empty dictionaries among the values of a dictionary."""
    items = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in items if isinstance(value, dict) and value}


def opened(path: Path, rename: Callable[[str], str | None] = str) -> Tensors:
    """Opens a pickle or a safetensors file. The content determines the format.

    Args:
        path: the file.
        rename: as for `Tensors`.

    Raises:
        CheckpointError: the file is missing, broken or hostile.
    """
    kind = looks_like(path)
    if kind not in (*_PICKLES, "a safetensors file"):  # opening the file will fail; the extension determines the error
        kind = "a safetensors file" if path.suffix == ".safetensors" else "a pickle"
    return (NestedTensors if kind in _PICKLES else Tensors).of_file(path, rename)


def _read(tensor: Tensor, data: mmap.mmap) -> np.ndarray:
    return float8.widened(tensor.read(data))


def mapped(path: Path) -> mmap.mmap:
    """Maps a file into memory, so that its bytes are read only when they are used.

    Raises:
        CheckpointError: the file cannot be opened, or is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or empty ({error}); fetch it again") from None


def read(path: Path, data: mmap.mmap) -> Any:
    """Returns the content of a pickled weight file, without running code.

    Args:
        path: the file, for error messages.
        data: its bytes, from `mapped`.

    Returns:
        Nested dictionaries, lists, tuples, numbers and strings, with a `Tensor` for each dense tensor.

    Raises:
        CheckpointError: the file is broken, or calls functions other than torch's functions for tensors.
    """
    try:
        if data[:4] == b"PK\3\4":
            return _read_zip(path, data)
        if looks_like(path) == "a pickle":
            return _read_legacy(path, data)
    except CheckpointError:
        raise
    except Exception:  # a broken file can raise errors of many types
        raise CheckpointError(f"{path} is truncated or not a torch weight file; fetch it again") from None
    raise CheckpointError(
        f"{path} is {looks_like(path) or 'truncated or not a torch weight file'}, expected a pickle, because its"
        f" extension is {path.suffix or 'missing'}; fetch it again, or correct its extension"
    )


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    members = _members(path, data)
    (name,) = (name for name in members if name.endswith("/data.pkl") or name == "data.pkl")
    folder = name.removesuffix("data.pkl")
    start, size = members.get(f"{folder}byteorder", (0, 0))
    if data[start : start + size] not in (b"", b"little"):
        raise CheckpointError(f"{path} is not little-endian; save it again on a little-endian machine")

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        start, size = members[f"{folder}data/{key}"]
        if not 0 <= count <= size // dtype.itemsize:
            raise ValueError("incomplete storage")
        return Storage(start, dtype, count)

    start, size = members[name]
    data.seek(start)
    return Machine(path, storage).run(data, start + size)


def _members(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Returns {name: (start, size)} for the files in a zip file, with both numbers in bytes."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - 2**16 - 22))
    count, _, at = struct.unpack_from("<H2I", data, end + 10)
    if at == 2**32 - 1 or count == 2**16 - 1:  # large files have a zip64 record
        (end,) = struct.unpack_from("<Q", data, end - 12)
        count, _, at = struct.unpack_from("<3Q", data, end + 32)
    if end < 0 or count > _MAX_FILES:
        raise ValueError("not a zip file")
    members = {}
    for _ in range(count):
        signature, method, packed, size, *lengths, start = struct.unpack_from("<4s6xH8x2I3H8xI", data, at)
        name, extra = (data[at + 46 : at + 46 + lengths[0]].decode(), at + 46 + lengths[0])
        if signature != b"PK\1\2":
            raise ValueError("not an entry of a zip file")
        if method:
            raise CheckpointError(
                f"{path} is compressed, expected an uncompressed zip file as torch writes it; save it again with torch"
            )
        sizes = [size, packed, start]
        for i, value in zip(
            [i for i, number in enumerate(sizes) if number == 2**32 - 1],
            _large(data[extra : extra + lengths[1]]),
            strict=False,
        ):
            sizes[i] = value
        size, packed, start = sizes
        signature, *_ = struct.unpack_from("<4s", data, start)
        start += 30 + sum(struct.unpack_from("<2H", data, start + 26))
        if signature != b"PK\3\4" or size != packed or start + size > len(data):
            raise ValueError("incomplete entry")
        members[name] = (start, size)
        at = extra + lengths[1] + lengths[2]
    return members


def _large(extra: bytes) -> Iterator[int]:
    """Yields the 64-bit numbers in a zip entry's extra field."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            yield from (number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + size // 8 * 8]))
        extra = extra[4 + size :]


def _read_legacy(path: Path, data: mmap.mmap) -> Any:
    """Reads a file from before torch 1.6.

    It starts with five pickles: the magic number, the version, a description of the machine, the content, and the keys
    of the storages. The storages follow, each preceded by its number of entries.
    """
    storages: dict[str, Storage] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(0, dtype, count))

    data.seek(0)
    machine = Machine(path, storage)
    magic, _, system, content, keys = (machine.run(data, len(data)) for _ in range(5))
    if magic != _MAGIC or not system.get("little_endian", True):
        raise ValueError("wrong magic number, or not little-endian")
    at = data.tell()
    for key in keys:
        description = storages.pop(key)
        size = description.size * description.dtype.itemsize
        if struct.unpack_from("<q", data, at) != (description.size,) or at + 8 + size > len(data):
            raise ValueError("incomplete storage")
        description.start, at = at + 8, at + 8 + size
    if storages:
        raise ValueError("missing storages")
    return content
