"""Writes checkpoints. Each network becomes a safetensors file in diffusers' layout, or an Orbax checkpoint."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
    """The weights of a network, on the host. Writers may remove entries from `arrays` to save memory."""

    arrays: dict[str, np.ndarray]  # {dotted path in the module: array with the module's axes}
    keys: dict[str, str]  # {dotted path in the module: key in torch's files}
    buffers: dict[str, np.ndarray]  # {key in torch's files: array that no module needs}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Part(NamedTuple):
    """A network to write."""

    nbytes: int  # the total size of its arrays
    read: Callable[[Callable[[int], Any]], Network]  # reads the network; calls its argument with each array's size
    stem: str  # the name of the weight file in diffusers' layout, without its extension


def network_of(
    module: Any, dtype: DTypeLike | None = None, published: Callable[[str], str] = lambda key: key
) -> Network:
    """Copies a module's parameters to the host.

    Args:
        module: a loaded module.
        dtype: the dtype that the parameters are cast to; None keeps their dtypes.
        published: translates a key in the module to the key in torch's files.
    """
    arrays = {flax_name(path): np.asarray(leaf, dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(module)}
    return Network(arrays, {name: published(torch_key(name)) for name in arrays}, {})


def module_part(module: Any, stem: str, published: Callable[[str], str]) -> Part:
    """Describes a loaded module as a part of a checkpoint. Dtypes are kept; see `network_of` for the arguments."""

    def read(update: Callable[[int], Any]) -> Network:
        network = network_of(module, published=published)
        update(network.nbytes)
        return network

    return Part(sum(leaf.nbytes for leaf in jax.tree.leaves(module)), read, stem)


def checkpoint_bytes(parts: Mapping[str, Part], files: Mapping[Path, Path | bytes]) -> int:
    """Returns the total that `write_checkpoint` reports: the bytes read from networks plus all bytes written."""
    return 2 * sum(part.nbytes for part in parts.values()) + sum(map(_file_size, files.values()))


def write_checkpoint(
    folder: Path,
    parts: Mapping[str, Part],
    files: Mapping[Path, Path | bytes],
    update: Callable[[int], Any],
    *,
    orbax: bool = False,
) -> None:
    """Writes a checkpoint: first its networks and then its other files, in the given order.

    Args:
        folder: the folder to write to.
        parts: {name of a folder: network}.
        files: {path in the folder: path of the file to copy, or content}.
        update: called with numbers of bytes that add up to `checkpoint_bytes`.
        orbax: whether to write networks as Orbax checkpoints instead of safetensors.

    Raises:
        CheckpointError: a network cannot be read.
        OSError: there is not enough disk space, or a file cannot be written.
    """
    needed = sum(part.nbytes for part in parts.values()) + sum(map(_file_size, files.values()))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            f"{folder.parent} needs {needed:,} bytes, but its disk has only {free:,} bytes free; choose a different"
            " folder"
        )
    for name, part in parts.items():
        network = part.read(update)
        (folder / name).mkdir()
        written = network.nbytes
        if orbax:
            write_orbax(folder / name, network)
        else:
            write_diffusers(folder / name, network, part.stem)
        update(written)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / path).write_bytes(content)
        else:
            shutil.copyfile(content, folder / path)
        update(_file_size(content))


def _file_size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def as_json(value: Mapping[str, Any]) -> bytes:
    """Encodes a mapping as the content of a JSON file."""
    return json.dumps(value, indent=2).encode()


def write_diffusers(folder: Path, network: Network, stem: str) -> None:
    """Writes `STEM.safetensors` to a folder, with torch's keys and axes.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = dict(network.buffers)
    for name, key in network.keys.items():
        # Each array is removed from the network, so that at most one array is in memory twice.
        tensors[key] = np.ascontiguousarray(to_torch(name, network.arrays.pop(name)))
    _save(tensors, folder / f"{stem}.safetensors")


def write_orbax(folder: Path, network: Network) -> None:
    """Writes a network to a folder in the format that `sega_jax.weights.orbax_reader` reads.

    Raises:
        OSError: the files cannot be written.
    """
    import orbax.checkpoint as ocp  # the import takes seconds

    # Compression would cost time and memory but hardly shrink the weights. OrbaxTensors requires the other two options.
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
    """Writes a safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt"})  # torch's loaders require this metadata
    except SafetensorError as error:
        raise OSError(f"{path} could not be written; is the disk full? ({error})") from error


@contextmanager
def _one_error() -> Iterator[None]:
    """Silences the hundreds of lines that Orbax's threads print about an error that is also raised."""
    hook, logger = sys.unraisablehook, logging.getLogger("absl")
    disabled = logger.disabled
    sys.unraisablehook, logger.disabled = lambda _: None, True
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # wait until the threads have printed their messages
        raise
    finally:
        sys.unraisablehook, logger.disabled = hook, disabled
