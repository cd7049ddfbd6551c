"""Writes the weights of one network."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sega_jax.systems.registry import weight_stem
from sega_jax.weights import orbax_reader
from sega_jax.weights.pull import to_torch


class Network(NamedTuple):
    """Weights on the host; a writer may use up the arrays."""

    arrays: dict[str, np.ndarray]  # by dotted path in our module, with our axes
    keys: dict[str, str]  # in torch's files, by dotted path
    buffers: dict[str, np.ndarray]  # what no module needs, by key in torch's files

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def write_orbax(folder: Path, network: Network) -> None:
    """Writes a network as `sega_jax.weights.orbax_reader` reads it.

    Raises:
        OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp  # seconds to import

    # Weights are noise to a compressor, which would take time and memory; the other two are what OrbaxTensors reads.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=True, use_zarr3=False)
    try:
        with _one_error(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder / orbax_reader.ARRAYS, args=ocp.args.PyTreeSave(network.arrays))
    except Exception as error:  # the libraries raise what they like
        raise OSError(f"{folder / orbax_reader.ARRAYS} could not be written; is the disk full? ({error})") from error
    notes = {"format": orbax_reader.FORMAT, "keys": network.keys}
    (folder / orbax_reader.NOTES).write_text(json.dumps(notes, indent=2), encoding="utf-8")
    if network.buffers:
        _save(network.buffers, folder / f"{orbax_reader.BUFFERS}.safetensors")


def write_diffusers(folder: Path, network: Network) -> None:
    """Writes a network's weight file.

    Raises:
        OSError: it cannot be written.
    """
    tensors = dict(network.buffers)
    for name, key in network.keys.items():
        # One at a time, so that all but one of the arrays are here once.
        tensors[key] = np.ascontiguousarray(to_torch(name, network.arrays.pop(name)))
    _save(tensors, folder / f"{weight_stem(folder.name)}.safetensors")


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})  # torch's loaders insist on the format
    except SafetensorError as error:
        raise OSError(f"{path} could not be written; is the disk full? ({error})") from error


@contextmanager
def _one_error() -> Iterator[None]:
    """Without the hundreds of lines that Orbax's threads print about an error beside raising it."""
    hook, logger = sys.unraisablehook, logging.getLogger("absl")
    disabled = logger.disabled
    sys.unraisablehook, logger.disabled = lambda _: None, True
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # by then they have printed
        raise
    finally:
        sys.unraisablehook, logger.disabled = hook, disabled


FORMS: dict[str, Callable[[Path, Network], None]] = {"orbax": write_orbax, "diffusers": write_diffusers}
