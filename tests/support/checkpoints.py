"""Functions that compare and damage small checkpoints."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from support import tiny


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(first, second):
    """Returns whether two pipelines have exactly equal parameters with the same dtypes."""
    pairs = zip(jax.tree.leaves(first.models), jax.tree.leaves(second.models), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def edit_json(path, **entries):
    tiny.write_json(path, json.loads(path.read_text()) | entries)


def edit_tensors(path, change):
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, {"format": "pt"})
