"""Reads torch's pickled weight files, without running what they hold."""

import functools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sega_jax import orbax
from sega_jax.checkpoint import CheckpointError, Entry, Tensors, weight_names

_TORCH = (2, 6)  # before it, the reader for weights only could be made to run code (CVE-2025-32434)


def stem(safetensors: str) -> str:
    """The name of a pickled weight file without ending, from that of the safetensors file in its place."""
    return "pytorch_model" if safetensors == "model" else safetensors


def is_only_choice(folder: Path, safetensors: str, variant: str | None) -> bool:
    """Whether a network's weights are there as pickles, and neither as safetensors nor from Orbax."""

    def there(name: str, ending: str) -> bool:
        return any((folder / file).is_file() for file in weight_names(name, variant, ending))

    better = (folder / orbax.ARRAYS).is_dir() or there(safetensors, "safetensors")
    return there(stem(safetensors), "bin") and not better


class PickledTensors(Tensors):
    """The tensors of `STEM.bin`, or of the shards that `STEM.bin.index.json` names.

    Raises:
        CheckpointError: a file is missing, broken, or holds anything but tensors; or torch is missing or too old.
    """

    ending = "bin"

    def _load(self, path: Path) -> Any:
        return load(path)

    def _open(self, path: Path) -> Iterator[Entry]:
        tensors = self._load(path)
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a dictionary of tensors")
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not _is_plain(tensor):
                raise CheckpointError(
                    f"{path}: {repr(key)[:80]} is no name of a dense tensor, expected a dictionary of them"
                )
            yield Entry(key, tuple(tensor.shape), tensor.nbytes, functools.partial(_numpy, tensor, path, key))


def load(path: Path) -> Any:
    """What a file holds, tensors and containers of them; the tensors' entries stay in the file until they are read.

    Raises:
        CheckpointError: it is missing, broken, or holds other things; or torch is missing or too old.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f'{path} is a pickle, which torch reads: pip install "sega_jax[convert]", or fetch .safetensors'
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH:
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} does not read safely: update to"
            f" {'.'.join(map(str, _TORCH))} or later, or fetch .safetensors"
        )
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\3\4"  # otherwise from before torch 1.6, and read as a whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        asks = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} is refused, nothing of it was run: it is broken, or holds more than tensors"
            + (f" ({asks[1]})" if asks else "")
            + "; fetch it again, or .safetensors"
        ) from None
    except Exception:  # the library raises anything from EOFError to KeyError, with advice that is not ours
        raise CheckpointError(f"{path} is truncated or no weight file of torch's; fetch it again") from None


def _is_plain(tensor: Any) -> bool:
    """Whether this is a tensor whose entries are all there: neither sparse nor quantised nor repeated."""
    import torch

    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _numpy(tensor: Any, path: Path, key: str) -> np.ndarray:
    """A copy, which does not hold the file."""
    import torch

    tensor = tensor.detach()
    try:
        if tensor.dtype == torch.bfloat16:
            return np.array(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16), order="C")
        return np.array(tensor.numpy(), order="C")
    except (TypeError, RuntimeError):
        raise CheckpointError(f"{path}: cannot read {key} of type {tensor.dtype}") from None
