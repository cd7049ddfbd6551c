"""Reads torch's pickled weight files without torch, and without running what they hold.

A pickle is a program: it builds lists, dictionaries and tuples on a stack, and may call whatever Python can import.
Here the first is done, and of the second torch's own words for tensors are known by name and looked up nowhere. All
other calls are refused. `torch.save` writes a zip file, which holds the pickle and every storage uncompressed; before
torch 1.6 it wrote several pickles, and the storages after them.
"""

import dataclasses
import math
import mmap
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sega_jax.weights.pull import CheckpointError, Entry, Tensors, looks_like

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What may be asked for and is no dense tensor: it stands for itself, and is an error where a tensor is expected.
_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(device|Size)|torch\.serialization\._get_layout|_codecs\.encode"
    r"|numpy\.(dtype|_?core\.multiarray\.(scalar|_reconstruct))"
)
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before torch 1.6
# Of a pickle, and of entries in a zip file: some ten times what the largest checkpoints have.
_MOST = 2**20
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Numbers and words that are written out.
_WRITTEN = {code.name for code in pickletools.opcodes if code.arg and code.stack_after and not code.stack_before}
_WRITTEN -= {"PERSID", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "EXT1", "EXT2", "EXT4"}


class Name(NamedTuple):
    """What a pickle asks Python for, by its name; it is never looked up."""

    name: str


_KEYS = (str, int, float, bytes, type(None), Name)


@dataclasses.dataclass
class Storage:
    """The entries of tensors, where they lie in the file."""

    start: int  # in bytes
    dtype: np.dtype
    size: int  # entries


class Tensor(NamedTuple):
    """A view of a storage, in entries."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def fits(self) -> bool:
        """Whether all of it lies in the storage, which has as many entries."""
        numbers = (self.start, *self.shape, *self.strides)
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(self.shape) > 32:
            return False
        if len(self.shape) != len(self.strides) or math.prod(self.shape) > self.storage.size:
            return False
        return self.start + self.span <= self.storage.size

    @property
    def span(self) -> int:
        """Entries from the first to behind the last."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def read(self, data: mmap.mmap) -> np.ndarray:
        """A copy, which does not hold the file."""
        dtype = self.storage.dtype
        if not self.span:
            return np.empty(self.shape, dtype)
        flat = np.frombuffer(data, dtype, self.span, self.storage.start + self.start * dtype.itemsize)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides), order="C")


class PickledTensors(Tensors):
    """The tensors of `STEM.bin`, or of the shards that `STEM.bin.index.json` names.

    Raises:
        CheckpointError: a file is missing, broken, or holds anything but tensors.
    """

    ending = "bin"

    def _within(self, found: Any) -> Any:
        """The dictionary of tensors in what a file holds."""
        return found

    def _open(self, path: Path) -> Iterator[Entry]:
        data = mapped(path)
        self._stack.callback(data.close)
        tensors = self._within(read(path, data))
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a dictionary of tensors")
        left = 2 * len(data)  # some share their entries
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{path}: {repr(key)[:80]} is no name of a dense tensor, expected a dictionary of them"
                )
            left -= tensor.nbytes
            if left < 0:
                raise CheckpointError(f"{path}: its tensors are more than it has bytes for, {len(data)}; fetch another")
            yield Entry(key, tensor.shape, tensor.nbytes, partial(tensor.read, data))


class CkptTensors(PickledTensors):
    """All tensors of a `.ckpt`, in which they are the `state_dict` beside what training left.

    Raises:
        CheckpointError: as of `PickledTensors`.
    """

    ending = "ckpt"

    def _within(self, found: Any) -> Any:
        return found["state_dict"] if isinstance(found, dict) and isinstance(found.get("state_dict"), dict) else found


def mapped(path: Path) -> mmap.mmap:
    """A file's bytes, in memory as they are read.

    Raises:
        CheckpointError: it cannot be opened, or is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or empty ({error}); fetch it again") from None


def read(path: Path, data: mmap.mmap) -> Any:
    """What a file holds: dictionaries, lists, tuples, numbers and words, and a `Tensor` for each dense tensor.

    Args:
        path: for errors.
        data: of the file, from `mapped`.

    Raises:
        CheckpointError: it is broken, or asks for more than tensors.
    """
    try:
        if data[:4] == b"PK\3\4":
            return _read_zip(path, data)
        if looks_like(path) == "a pickle":
            return _read_legacy(path, data)
    except CheckpointError:
        raise
    except Exception:  # what is broken breaks anywhere
        raise CheckpointError(f"{path} is truncated or no weight file of torch's; fetch it again") from None
    raise CheckpointError(
        f"{path} is {looks_like(path) or 'truncated or no weight file of torch'}, expected a pickle, as {path.suffix}"
        " files are; fetch it again, or give it the ending that it should have"
    )


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    members = _members(path, data)
    (name,) = (name for name in members if name.endswith("/data.pkl") or name == "data.pkl")
    folder = name.removesuffix("data.pkl")
    start, size = members.get(f"{folder}byteorder", (0, 0))
    if data[start : start + size] not in (b"", b"little"):
        raise CheckpointError(f"{path} has its bytes in another order than this machine; save it anew, or another one")

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        start, size = members[f"{folder}data/{key}"]
        if not 0 <= count <= size // dtype.itemsize:
            raise ValueError("a storage that is not all there")
        return Storage(start, dtype, count)

    start, size = members[name]
    data.seek(start)
    return _Machine(path, storage).run(data, start + size)


def _members(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Of every file in a zip file where its bytes start, and how many it has."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - 2**16 - 22))
    count, _, at = struct.unpack_from("<H2I", data, end + 10)
    if at == 2**32 - 1 or count == 2**16 - 1:  # of a size for which there is another record
        (end,) = struct.unpack_from("<Q", data, end - 12)
        count, _, at = struct.unpack_from("<3Q", data, end + 32)
    if end < 0 or count > _MOST:
        raise ValueError("no zip file")
    found = {}
    for _ in range(count):
        signature, method, packed, size, *lengths, start = struct.unpack_from("<4s6xH8x2I3H8xI", data, at)
        name, extra = (data[at + 46 : at + 46 + lengths[0]].decode(), at + 46 + lengths[0])
        if signature != b"PK\1\2":
            raise ValueError("no entry of a zip file")
        if method:
            raise CheckpointError(f"{path} is compressed, as torch writes none, and is not unpacked; save it anew")
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
            raise ValueError("an entry that is not all there")
        found[name] = (start, size)
        at = extra + lengths[1] + lengths[2]
    return found


def _large(extra: bytes) -> Iterator[int]:
    """The numbers of a zip entry that need more than 32 bits."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            yield from (number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + size // 8 * 8]))
        extra = extra[4 + size :]


def _read_legacy(path: Path, data: mmap.mmap) -> Any:
    """Five pickles, the magic number, the version, the machine, the content and the storages' names; then the storages,
    each after the number of its entries."""
    storages: dict[str, Storage] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(0, dtype, count))

    data.seek(0)
    machine = _Machine(path, storage)
    magic, _, system, content, keys = (machine.run(data, len(data)) for _ in range(5))
    if magic != _MAGIC or not system.get("little_endian", True):
        raise ValueError("another magic number, or bytes in another order")
    at = data.tell()
    for key in keys:
        found = storages.pop(key)
        size = found.size * found.dtype.itemsize
        if struct.unpack_from("<q", data, at) != (found.size,) or at + 8 + size > len(data):
            raise ValueError("a storage that is not all there")
        found.start, at = at + 8, at + 8 + size
    if storages:
        raise ValueError("storages that are not there")
    return content


class _Machine:
    """Runs pickles as far as they build containers.

    Args:
        path: for errors.
        storage: from the dtype, the key and the number of entries of a storage, itself.
    """

    def __init__(self, path: Path, storage: Callable[[np.dtype, str, int], Storage]):
        self.path, self.storage = path, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left = _MOST

    def run(self, data: mmap.mmap, end: int) -> Any:
        """What the pickle makes that starts where `data` is; IndexError, KeyError and the like where it is broken."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, at in pickletools.genops(data):
            self.left -= 1
            if at >= end or self.left < 0:
                raise ValueError("it does not end")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("it does not end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in _WRITTEN:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name == "LIST":
            stack.append(self.marked())
        elif name == "DICT":
            stack.append(self.filled({}, self.marked()))
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items = stack[-count:]
            del stack[-count:]
            self.fill(stack[-1], items)
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            items = self.marked()
            self.fill(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, own = stack.pop(-2), stack.pop()
            stack.append(Name(f"{module[:80]}.{own[:80]}"))
        elif name in ("REDUCE", "NEWOBJ"):
            given, asked = stack.pop(), stack.pop()
            stack.append(self.call(asked, given))
        elif name == "BUILD":  # the state of a tensor's or a dictionary's, of no matter here
            stack.pop()
        elif name == "BINPERSID":
            stack.append(self.persistent(stack.pop()))
        else:
            raise self.refused(name)

    def marked(self) -> list[Any]:
        """What is on the stack since the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def fill(self, container: Any, items: list[Any]) -> None:
        if isinstance(container, list):
            container.extend(items)
        elif isinstance(container, dict):
            self.filled(container, items)
        elif not isinstance(container, Name):
            raise ValueError("no container")

    def filled(self, container: dict, items: list[Any]) -> dict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples of tuples would take for ever to compare.
            if not isinstance(key, _KEYS):
                raise self.refused(f"a {type(key).__name__} as a key")
            container[key] = value
        return container

    def call(self, asked: Any, given: Any) -> Any:
        """What torch's own words for tensors mean."""
        name = asked.name if isinstance(asked, Name) else type(asked).__name__
        if name in ("collections.OrderedDict", "collections.defaultdict"):
            pairs = given[0] if given and isinstance(given[0], list) else []
            return self.filled({}, [item for pair in pairs for item in pair])
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            storage, start, shape, strides, *_ = given
            if isinstance(storage, Storage) and (tensor := Tensor(storage, start, shape, strides)).fits():
                return tensor
            return Name(name)
        if name == "torch._utils._rebuild_parameter":
            return given[0]
        if _HARMLESS.fullmatch(name):
            return Name(name)
        raise self.refused(name)

    def persistent(self, given: Any) -> Any:
        """A storage, of which torch's pickles say its class, key, place and size."""
        kind, asked, key, _, count, *views = given
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0 or any(views):
            raise ValueError("no storage")
        dtype = _STORAGES.get(asked.name.removeprefix("torch."))
        return Name(asked.name) if dtype is None else self.storage(np.dtype(dtype), key, count)

    def refused(self, asks: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is refused, nothing of it was run: it holds more than tensors ({asks[:80]}); fetch"
            " another, or .safetensors"
        )
