"""Writes safetensors files with 8-bit floats, which `safetensors.numpy` does not support."""

import json

import ml_dtypes
import numpy as np

DTYPES = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz]
NAMES = dict(zip(map(np.dtype, DTYPES), ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), strict=True))
NAMES |= {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "U8"}
NAMES |= {np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0"}


def save(tensors, path):
    """Writes a safetensors file of arrays with the dtypes in `NAMES`, and returns its path."""
    header, data = {}, b""
    for key, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[key] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    encoded_header = json.dumps(header).encode()
    path.write_bytes(len(encoded_header).to_bytes(8, "little") + encoded_header + data)
    return path
