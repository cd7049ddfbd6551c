"""Builds the containers, numbers, strings and torch tensors that a pickle describes, without running code.

A pickle is a program. It builds lists, dictionaries and tuples on a stack, and it may call anything that Python can
import. `Machine` builds the containers and recognises torch's functions for tensors by name. It never imports anything
and refuses all other calls.
"""

import dataclasses
import math
import mmap
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sega_jax.text.files import CheckpointError
from sega_jax.weights import float8

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
    "UntypedStorage": np.uint8,  # bytes; each view has its own dtype
}
# The dtypes that views of untyped storages can have.
_DTYPES = {np.dtype(dtype).name: dtype for dtype in float8.DTYPES.values()}
_DTYPES |= {np.dtype(dtype).name: dtype for dtype in (np.uint16, np.uint32, np.uint64)}
# Functions that a pickle may call although they do not return dense tensors. Each call returns a `Name`, which causes
# an error where a tensor is expected.
_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(device|Size)|torch\.serialization\._get_layout|_codecs\.encode"
    r"|numpy\.(dtype|_?core\.multiarray\.(scalar|_reconstruct))"
    r"|(__builtin__|builtins)\.(set|frozenset|bytearray|complex)|collections\.(Counter|deque)"
)
# The maximum number of opcodes to run, about ten times as many as in the largest checkpoints.
_MAX_OPCODES = 2**20
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Opcodes that push their argument, a number or a string.
_PUSHES_ARGUMENT = {
    code.name for code in pickletools.opcodes if code.arg and code.stack_after and not code.stack_before
}
_PUSHES_ARGUMENT -= {"PERSID", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "EXT1", "EXT2", "EXT4"}


class Name(NamedTuple):
    """An object that a pickle refers to by name. It is never imported."""

    name: str


_KEYS = (str, int, float, bytes, type(None), Name)


@dataclasses.dataclass
class Storage:
    """A range of bytes in the file that holds the entries of one or more tensors."""

    start: int  # bytes from the start of the file
    dtype: np.dtype
    size: int  # the number of entries


class Tensor(NamedTuple):
    """A view of a storage. `start` and `strides` are in entries."""

    storage: Storage
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def capacity(self) -> int:
        """Returns the number of entries of this dtype that fit in the storage."""
        return self.storage.size * self.storage.dtype.itemsize // self.dtype.itemsize

    def fits(self) -> bool:
        """Returns whether the view is inside its storage. A view may repeat entries, so check `nbytes` as well."""
        numbers = (self.start, *self.shape, *self.strides)
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(self.shape) > 32:
            return False
        return len(self.shape) == len(self.strides) and self.start + self.span <= self.capacity

    @property
    def span(self) -> int:
        """Returns the number of entries from the first to the last, including gaps."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def read(self, data: mmap.mmap) -> np.ndarray:
        """Copies the entries from the file into an array."""
        dtype = self.dtype
        if not self.span:
            return np.empty(self.shape, dtype)
        integer = np.dtype(f"u{dtype.itemsize}")  # `as_strided` does not support every dtype of ml_dtypes
        flat = np.frombuffer(data, integer, self.span, self.storage.start + self.start * dtype.itemsize)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides), order="C").view(dtype)


class Machine:
    """Runs the opcodes of pickles that build containers and tensors.

    Args:
        path: the file, for error messages.
        storage: returns a storage, given its dtype, key and number of entries.
    """

    def __init__(self, path: Path, storage: Callable[[np.dtype, str, int], Storage]):
        self.path, self.storage = path, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left = _MAX_OPCODES

    def run(self, data: mmap.mmap, end: int) -> Any:
        """Returns the object that a pickle builds.

        Args:
            data: the file, at the position where the pickle starts.
            end: the position, in bytes, before which the pickle must end.

        Raises:
            CheckpointError: the pickle calls anything other than torch's functions for tensors.
            Exception: the pickle is broken; the type depends on the damage.
        """
        self.stack, self.marks, self.memo = [], [], {}
        # The declared parameter type of genops excludes mmap, but any object with read, readline and tell works.
        for opcode, argument, at in pickletools.genops(data):  # type: ignore[arg-type]
            assert at is not None
            self.left -= 1
            if at >= end or self.left < 0:
                raise ValueError("the pickle does not end")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle does not end")

    def step(self, name: str, argument: Any) -> None:
        """Runs one opcode."""
        stack = self.stack
        if name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in _PUSHES_ARGUMENT:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_mark()
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
            stack.append(tuple(self.pop_mark()))
        elif name == "LIST":
            stack.append(self.pop_mark())
        elif name == "DICT":
            stack.append(self.with_items({}, self.pop_mark()))
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items = stack[-count:]
            del stack[-count:]
            self.fill(stack[-1], items)
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            items = self.pop_mark()
            self.fill(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, attribute = stack.pop(-2), stack.pop()
            stack.append(Name(f"{module[:80]}.{attribute[:80]}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif name == "BUILD":  # would set attributes that are not needed
            stack.pop()
        elif name == "BINPERSID":
            stack.append(self.persistent(stack.pop()))
        else:
            raise self.refused(name)

    def pop_mark(self) -> list[Any]:
        """Pops and returns the objects above the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def fill(self, container: Any, items: list[Any]) -> None:
        """Adds items to a list or dictionary. For a dictionary, keys and values alternate in `items`."""
        if isinstance(container, list):
            container.extend(items)
        elif isinstance(container, dict):
            self.with_items(container, items)
        elif not isinstance(container, Name):
            raise ValueError("not a container")

    def with_items(self, container: dict, items: list[Any]) -> dict:
        """Adds items to a dictionary and returns it. Keys and values alternate in `items`."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys are refused: comparing nested tuples, for example, can take exponential time.
            if not isinstance(key, _KEYS):
                raise self.refused(f"a {type(key).__name__} as a key")
            container[key] = value
        return container

    def call(self, function: Any, arguments: Any) -> Any:
        """Returns the result of a call, which must build a dictionary or a torch tensor, or be harmless."""
        name = function.name if isinstance(function, Name) else type(function).__name__
        if name in ("collections.OrderedDict", "collections.defaultdict"):
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            return self.with_items({}, [item for pair in pairs for item in pair])
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            storage, *view = arguments[:4]
            # The last argument is non-empty if the entries must be negated or conjugated.
            plain = isinstance(storage, Storage) and not any(arguments[6:])
            return self.tensor(storage, storage.dtype, *view) if plain else Name(name)
        if name == "torch._utils._rebuild_tensor_v3":
            storage, *view = arguments[:4]
            dtype = _DTYPES.get(arguments[6].name.removeprefix("torch."))
            if isinstance(storage, Storage) and dtype is not None:
                return self.tensor(storage, np.dtype(dtype), *view)
            return Name(name)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":  # a tensor that has attributes or belongs to a subclass
            function, _, inner, *_ = arguments
            return self.call(function, inner)
        if _HARMLESS.fullmatch(name):
            return Name(name)
        raise self.refused(name)

    def tensor(self, storage: Storage, dtype: np.dtype, start: Any, shape: Any, strides: Any) -> Tensor | Name:
        """Returns a view of a storage, or a `Name` if the view is not valid."""
        tensor = Tensor(storage, dtype, start, shape, strides)
        return tensor if tensor.fits() else Name("an invalid view")

    def persistent(self, description: Any) -> Any:
        """Returns the storage that a description (class, key, device and number of entries) refers to."""
        kind, storage, key, _, count, *views = description
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0 or any(views):
            raise ValueError("not a storage")
        dtype = _STORAGES.get(storage.name.removeprefix("torch.").removeprefix("storage."))
        return Name(storage.name) if dtype is None else self.storage(np.dtype(dtype), key, count)

    def refused(self, content: str) -> CheckpointError:
        """Returns the error for a pickle that contains anything other than tensors."""
        return CheckpointError(
            f"{self.path} was rejected, and none of its code was run: it contains objects other than tensors"
            f" ({content[:80]}); use a different file, or .safetensors"
        )
