"""Writes the weights of one network: to safetensors in diffusers' layout, or to Orbax."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sega_jax.weights import orbax_reader
from sega_jax.weights.layout import flax_name, to_torch, torch_key


class Network(NamedTuple):
    """Weights on the host. A writer may empty `arrays` to save memory."""

    arrays: dict[str, np.ndarray]  # by dotted path in our module, with our axes
    keys: dict[str, str]  # keys in torch's files, by dotted path
    buffers: dict[str, np.ndarray]  # arrays that no module needs, by key in torch's files

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def network_of(module: Any, dtype: DTypeLike | None = None) -> Network:
    """Copies a module's parameters to the host, cast to `dtype` unless it is None."""
    arrays = {flax_name(path): np.asarray(leaf, dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(module)}
    return Network(arrays, {name: torch_key(name) for name in arrays}, {})


def write_diffusers(folder: Path, network: Network, stem: str) -> None:
    """Writes `STEM.safetensors` to a folder, with the keys and axes of torch.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = dict(network.buffers)
    for name, key in network.keys.items():
        # Removing each array keeps at most one of them in memory twice.
        tensors[key] = np.ascontiguousarray(to_torch(name, network.arrays.pop(name)))
    _save(tensors, folder / f"{stem}.safetensors")


def write_orbax(folder: Path, network: Network) -> None:
    """Writes the files to a folder that `sega_jax.weights.orbax_reader` reads.

    Raises:
        OSError: the files cannot be written.
    """
    import orbax.checkpoint as ocp  # takes seconds

    # Compression would cost time and memory, and weights hardly compress. OrbaxTensors needs the other two options.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=True, use_zarr3=False)
    try:
        with _one_error(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder / orbax_reader.ARRAYS, args=ocp.args.PyTreeSave(network.arrays))
    except Exception as error:  # Orbax and TensorStore raise errors of many types
        raise OSError(f"{folder / orbax_reader.ARRAYS} could not be written; is the disk full? ({error})") from error
    notes = {"format": orbax_reader.FORMAT, "keys": network.keys}
    (folder / orbax_reader.NOTES).write_text(json.dumps(notes, indent=2), encoding="utf-8")
    if network.buffers:
        _save(network.buffers, folder / f"{orbax_reader.BUFFERS}.safetensors")


def _save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    try:
        save_file(dict(tensors), path, {"format": "pt"})  # torch's loaders need the format
    except SafetensorError as error:
        raise OSError(f"{path} could not be written; is the disk full? ({error})") from error


@contextmanager
def _one_error() -> Iterator[None]:
    """Silences the hundreds of lines that Orbax's threads print about an error, which is raised as well."""
    hook, logger = sys.unraisablehook, logging.getLogger("absl")
    disabled = logger.disabled
    sys.unraisablehook, logger.disabled = lambda _: None, True
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # until the threads have printed
        raise
    finally:
        sys.unraisablehook, logger.disabled = hook, disabled
