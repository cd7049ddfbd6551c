"""Writes files as `torch.save` does, without torch, in the current zip format or the format of torch < 1.6."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CLASSES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


class Legacy(list):
    """The storages of a file in the format of torch < 1.6, which marks each storage as not being a view of another
    storage."""

    views = (None,)


def call(name: str, *args: Any) -> bytes:
    """Returns the pickle opcodes that call a function, such as "posix.system"."""
    module, _, function = name.rpartition(".")
    return b"c%s\n%s\n" % (module.encode(), function.encode()) + opcodes(tuple(args), []) + b"R"


def opcodes(value: Any, storages: list[np.ndarray]) -> bytes:
    """Returns the pickle opcodes of a value, without the final stop.

    Bytes are treated as opcodes and stay unchanged. The data of arrays is appended to `storages`.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        items = b"".join(opcodes(part, storages) for item in value.items() for part in item)
        return b"}(" + items + b"u"
    if isinstance(value, list | tuple):
        start, end = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
        return start + b"".join(opcodes(part, storages) for part in value) + end
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(number)]) + number
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    storages.append(array)
    untyped = array.dtype not in CLASSES
    kind = b"ctorch.storage\nUntypedStorage\n" if untyped else b"ctorch\n%s\n" % CLASSES[array.dtype].encode()
    size = array.nbytes if untyped else array.size
    record = ("storage", kind, str(len(storages) - 1), "cpu", size, *getattr(storages, "views", ()))
    storage = opcodes(record, storages) + b"Q"
    strides = tuple(step // array.itemsize for step in array.strides)
    view = (storage, 0, array.shape, strides, False, b"ccollections\nOrderedDict\n)R")
    if untyped:
        return call("torch._utils._rebuild_tensor_v3", *view, b"ctorch\n%s\n" % array.dtype.name.encode())
    return call("torch._utils._rebuild_tensor_v2", *view)


def pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    return b"\x80\x02" + opcodes(value, storages) + b"."


def save(content: Any, path: Path, *, legacy: bool = False, compressed: bool = False) -> Path:
    storages = Legacy() if legacy else []
    pickle = pickled(content, storages)
    if legacy:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        parts = [pickled(part, []) for part in (MAGIC, 1001, system)]
        parts += [pickle, pickled(list(map(str, range(len(storages)))), [])]
        parts += [struct.pack("<q", array.size) + array.tobytes() for array in storages]
        path.write_bytes(b"".join(parts))
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickle)
        file.writestr("archive/byteorder", "little")
        for i, array in enumerate(storages):
            file.writestr(f"archive/data/{i}", array.tobytes())
        file.writestr("archive/version", "3\n")
    return path
