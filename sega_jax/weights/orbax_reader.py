"""Reads the weights of one network from an Orbax checkpoint, one array at a time.

Orbax itself restores a complete tree at once, which takes twice the memory of its arrays. It can also restore single
arrays, but then reads the descriptions of all arrays each time and takes three times as long as this module. An
Orbax checkpoint is an OCDBT database of zarr arrays with checksums. This module opens its arrays one at a time with
TensorStore, the library that Orbax is built on.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights.layout import FLAX, torch_key
from sega_jax.weights.tensors import Tensors

# The contents of a network's folder, in addition to config.json.
ARRAYS = "orbax"  # an Orbax checkpoint of {dotted path of a parameter: array with the module's axes}
NOTES = "orbax.json"  # {"format": 1, "keys": {dotted path of a parameter: its key in torch's files}}
BUFFERS = "buffers"  # the stem of an optional .safetensors file with arrays that no module needs
FILES = (f"{ARRAYS}/*", NOTES, f"{BUFFERS}.safetensors")
FORMAT = 1
_ENTRY = "/.zarray"


class OrbaxTensors:
    """Reads the arrays of one network. Opening the checkpoint reads only the shapes; arrays are read one at a time.

    Args:
        folder: the folder that contains `orbax` and `orbax.json`.
        rename: translates a key in torch's files to the module's key.

    Raises:
        CheckpointError: `orbax` or `orbax.json` is missing or broken.
    """

    layout = FLAX

    def __init__(self, folder: Path, rename: Callable[[str], str | None]):
        self.folder = folder
        self._path = folder.absolute() / ARRAYS
        keys = _keys(folder / NOTES, rename)
        if not (self._path / "manifest.ocdbt").is_file():
            raise CheckpointError(
                f"{folder / ARRAYS} has no manifest.ocdbt, so it is not an Orbax checkpoint; convert it again"
            )
        try:
            self._arrays = _open(self._path)
        except Exception as error:  # TensorStore raises errors of many types
            raise self._broken(error) from None
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self.keys = {name: keys.get(name, torch_key(name)) for name in self._arrays}
        self.sizes = {name: array.size * array.dtype.numpy_dtype.itemsize for name, array in self._arrays.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._arrays[name].read().result()
        except Exception as error:
            raise self._broken(error) from None

    @property
    def spare(self) -> Collection[str]:
        return self.buffers().keys()

    def buffers(self) -> dict[str, np.ndarray]:
        if not (self.folder / f"{BUFFERS}.safetensors").is_file():
            return {}
        with Tensors(self.folder, BUFFERS, None, str) as tensors:
            return tensors.buffers()

    def _broken(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a readable Orbax checkpoint ({error}); convert it again")

    def __enter__(self) -> "OrbaxTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.clear()


def _open(path: Path) -> dict[str, Any]:
    """Opens all arrays of a database and returns {name: TensorStore array}."""
    import tensorstore  # imported here because only Orbax checkpoints need it

    context = tensorstore.Context()
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    entries = tensorstore.KvStore.open(database, context=context).result().list().result()
    names = [entry.removesuffix(_ENTRY) for entry in map(bytes.decode, entries) if entry.endswith(_ENTRY)]
    # If `fill_missing_data_reads` were true, missing data would be read as zeros.
    futures = {
        name: tensorstore.open(
            {"driver": "zarr", "kvstore": database | {"path": f"{name}/"}, "fill_missing_data_reads": False},
            read=True,
            open=True,
            context=context,
        )
        for name in names
    }
    return {name: array.result() for name, array in futures.items()}


def _keys(path: Path, rename: Callable[[str], str | None]) -> dict[str, str]:
    """Reads the keys that the parameters have in torch's files.

    Raises:
        CheckpointError: the file is missing or broken, has a different format version, or assigns a key to the wrong
            parameter.
    """
    notes = read_json(path)
    if notes.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {notes.get('format')!r}, but this version of sega_jax reads format {FORMAT}; convert"
            " the checkpoint again, or update sega_jax"
        )
    keys = notes.get("keys")
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise CheckpointError(f"{path}: keys should be an object that maps names to names; convert it again")
    for name, key in keys.items():
        if rename(key) != torch_key(name):
            raise CheckpointError(f"{path}: {key!r} is not the key of {name}; convert it again")
    return keys
