"""Reads torch's pickled weight files without torch and without running the code in them.

`torch.save` writes a zip file, which holds a pickle and the bytes of every storage, uncompressed. Before torch 1.6, it
wrote several pickles and the storages behind them. `sega_jax.weights.unpickling` reads the pickles.
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

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in files from before torch 1.6
# The most entries of a zip file, some ten times as many as the largest checkpoints have.
_MOST = 2**20
_PICKLES = ("a zip file", "a pickle")  # as `looks_like` says
# Where training programs put the weights of the model, the most wanted first, and how deep.
_INNER = ("state_dict", "model", "model_state_dict", "module", "params_ema", "params")
_DEEPEST = 3


def stem(safetensors: str) -> str:
    """Returns the name without ending of a pickled weight file, given that of the safetensors file in its place."""
    return "pytorch_model" if safetensors == "model" else safetensors


class PickledTensors(Tensors):
    """The tensors of `STEM.bin`, or of the shards that `STEM.bin.index.json` names.

    Raises:
        CheckpointError: a file is missing or broken, or holds anything but tensors.
    """

    ending = "bin"

    def _within(self, content: Any) -> Any:
        """Returns the dictionary of tensors in the content of a file."""
        return content

    def _open(self, path: Path) -> Iterator[Entry]:
        data = mapped(path)
        self._stack.callback(data.close)
        tensors = self._within(read(path, data))
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a dictionary of tensors")
        left = 2 * len(data)  # bytes; tensors may share their entries
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{path}: {repr(key)[:80]} is no name of a dense tensor, expected a dictionary of them"
                )
            left -= tensor.nbytes
            if left < 0:
                raise CheckpointError(f"{path}: its tensors are more than it has bytes for, {len(data)}; fetch another")
            size = float8.width(tensor.dtype) * math.prod(tensor.shape)
            yield Entry(key, tensor.shape, size, partial(_read, tensor, data), float8.is_eight_bit(tensor.dtype))


class NestedTensors(PickledTensors):
    """The tensors of a file that may have them in a dictionary within others, besides other results of the training:
    as "state_dict" or "model", or as its only dictionary of tensors.

    Raises:
        CheckpointError: as `PickledTensors`.
    """

    def _within(self, content: Any) -> Any:
        for _ in range(_DEEPEST):
            inner = _dictionaries(content)
            known = [name for name in _INNER if name in inner]
            if not inner or (not known and any(isinstance(value, Tensor) for value in content.values())):
                break
            if not known and len(inner) > 1:
                raise CheckpointError(
                    f"{self.folder} has several dictionaries, {', '.join(map(str, inner))[:200]}, and none of them is"
                    f" called {' or '.join(_INNER)}; save the one with the weights alone"
                )
            content = inner[(known or list(inner))[0]]
        return content


def _dictionaries(content: Any) -> dict[Any, dict]:
    """Returns the dictionaries in a dictionary that are not empty."""
    items = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in items if isinstance(value, dict) and value}


def opened(path: Path, rename: Callable[[str], str | None] = str) -> Tensors:
    """Opens one file of tensors, a pickle or a safetensors file by its content.

    Args:
        rename: as of `Tensors`.

    Raises:
        CheckpointError: the file is missing, broken or hostile.
    """
    kind = looks_like(path)
    if kind not in (*_PICKLES, "a safetensors file"):  # the error should expect what the ending promises
        kind = "a safetensors file" if path.suffix == ".safetensors" else "a pickle"
    return (NestedTensors if kind in _PICKLES else Tensors).of_file(path, rename)


def _read(tensor: Tensor, data: mmap.mmap) -> np.ndarray:
    return float8.widened(tensor.read(data))


def mapped(path: Path) -> mmap.mmap:
    """Maps a file into memory, so that its bytes are read when they are used.

    Raises:
        CheckpointError: the file cannot be opened, or is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or empty ({error}); fetch it again") from None


def read(path: Path, data: mmap.mmap) -> Any:
    """Returns the content of a file: dictionaries, lists, tuples, numbers, text, and a `Tensor` for each dense tensor.

    Args:
        path: the file, for errors.
        data: its bytes, from `mapped`.

    Raises:
        CheckpointError: the file is broken, or asks for more than tensors.
    """
    try:
        if data[:4] == b"PK\3\4":
            return _read_zip(path, data)
        if looks_like(path) == "a pickle":
            return _read_legacy(path, data)
    except CheckpointError:
        raise
    except Exception:  # a broken file can fail anywhere
        raise CheckpointError(f"{path} is truncated or no weight file of torch's; fetch it again") from None
    raise CheckpointError(
        f"{path} is {looks_like(path) or 'truncated or no weight file of torch'}, expected a pickle, as {path.suffix}"
        " files are; fetch it again, or correct its ending"
    )


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    members = _members(path, data)
    (name,) = (name for name in members if name.endswith("/data.pkl") or name == "data.pkl")
    folder = name.removesuffix("data.pkl")
    start, size = members.get(f"{folder}byteorder", (0, 0))
    if data[start : start + size] not in (b"", b"little"):
        raise CheckpointError(f"{path} has another byte order than this machine; save it again on this machine")

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        start, size = members[f"{folder}data/{key}"]
        if not 0 <= count <= size // dtype.itemsize:
            raise ValueError("an incomplete storage")
        return Storage(start, dtype, count)

    start, size = members[name]
    data.seek(start)
    return Machine(path, storage).run(data, start + size)


def _members(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Returns the start and the number of bytes of every file in a zip file."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - 2**16 - 22))
    count, _, at = struct.unpack_from("<H2I", data, end + 10)
    if at == 2**32 - 1 or count == 2**16 - 1:  # large files have another record
        (end,) = struct.unpack_from("<Q", data, end - 12)
        count, _, at = struct.unpack_from("<3Q", data, end + 32)
    if end < 0 or count > _MOST:
        raise ValueError("no zip file")
    members = {}
    for _ in range(count):
        signature, method, packed, size, *lengths, start = struct.unpack_from("<4s6xH8x2I3H8xI", data, at)
        name, extra = (data[at + 46 : at + 46 + lengths[0]].decode(), at + 46 + lengths[0])
        if signature != b"PK\1\2":
            raise ValueError("no entry of a zip file")
        if method:
            raise CheckpointError(f"{path} is compressed, as torch writes none, and is not unpacked; save it again")
        sizes = [size, packed, start]
        for place, value in zip(
            [i for i, number in enumerate(sizes) if number == 2**32 - 1],
            _large(data[extra : extra + lengths[1]]),
            strict=False,
        ):
            sizes[place] = value
        size, packed, start = sizes
        own, *_ = struct.unpack_from("<4s", data, start)
        start += 30 + sum(struct.unpack_from("<2H", data, start + 26))
        if own != b"PK\3\4" or size != packed or start + size > len(data):
            raise ValueError("an incomplete entry")
        members[name] = (start, size)
        at = extra + lengths[1] + lengths[2]
    return members


def _large(extra: bytes) -> Iterator[int]:
    """Yields the numbers of a zip entry that need more than 32 bits."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            yield from (number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + size // 8 * 8]))
        extra = extra[4 + size :]


def _read_legacy(path: Path, data: mmap.mmap) -> Any:
    """Reads a file from before torch 1.6: five pickles with the magic number, the version, the machine, the content and
    the names of the storages; then the storages, each behind its number of entries."""
    storages: dict[str, Storage] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(0, dtype, count))

    data.seek(0)
    machine = Machine(path, storage)
    magic, _, system, content, keys = (machine.run(data, len(data)) for _ in range(5))
    if magic != _MAGIC or not system.get("little_endian", True):
        raise ValueError("another magic number, or bytes in another order")
    at = data.tell()
    for key in keys:
        known = storages.pop(key)
        size = known.size * known.dtype.itemsize
        if struct.unpack_from("<q", data, at) != (known.size,) or at + 8 + size > len(data):
            raise ValueError("an incomplete storage")
        known.start, at = at + 8, at + 8 + size
    if storages:
        raise ValueError("missing storages")
    return content
