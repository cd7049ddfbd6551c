"""Saves and loads concept vectors: recorded guidance that can be summed, scaled, and replayed on other pictures.

Guidance is a plain array [pictures, calls, height, width, channels], so NumPy arithmetic works on it:

    out = pipe("a castle", Edit("snow", warmup=0), record=True)
    save_guidance("snow.safetensors", out.record.sem_guidance)
    snow = load_guidance("snow.safetensors")
    pipe("a house", replay=0.7 * snow)
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sega_jax.method.numerics import floating

_NAME, _AXES = "sem_guidance", "(pictures, calls, height, width, channels)"


def save_guidance(path: str | Path, guidance: Any, about: Mapping[str, str] | None = None) -> None:
    """Saves recorded guidance to a safetensors file, keeping its dtype. An existing file is replaced.

    Args:
        path: The file to write.
        guidance: A finite floating-point array [pictures, calls, height, width, channels], such as
            `Output.record.sem_guidance`. Guidance from the diffusers interface has the calls as its first axis; convert
            it with `np.moveaxis(out.sem_guidance, 1, 0)`.
        about: Metadata to store in the file, such as the prompt and the edit, as a mapping from strings to strings.

    Raises:
        TypeError: The guidance is not a floating-point array, or `about` does not map strings to strings.
        ValueError: The guidance has the wrong number of axes, or contains NaN or infinite entries.
        OSError: The file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> import sega_jax
        >>> edit = sega_jax.Edit("glasses", warmup=0)
        >>> out = sega_jax.load()("a face", edit, steps=2, record=True, output="latent", progress=False)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "glasses.safetensors"
        >>> sega_jax.save_guidance(path, out.record.sem_guidance, {"edit": "glasses"})
        >>> sega_jax.load_guidance(path).shape
        (1, 2, 32, 32, 4)
    """
    array, about = _checked("guidance", guidance), {} if about is None else about
    if not isinstance(about, Mapping) or not all(isinstance(w, str) for pair in about.items() for w in pair):
        raise TypeError(f"about={about!r} should map strings to strings, such as {{'prompt': 'a castle'}}")
    content = save({_NAME: np.ascontiguousarray(array)}, dict(about))
    path = Path(os.path.expanduser(path))
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def load_guidance(path: str | Path) -> np.ndarray:
    """Loads guidance from a file written by `save_guidance`.

    Returns:
        The array [pictures, calls, height, width, channels], in the dtype in which it was saved. Pass it to a call as
        `replay`; such arrays may be scaled and summed first.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is broken or contains no guidance.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import sega_jax
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "zeros.safetensors"
        >>> sega_jax.save_guidance(path, np.zeros((1, 2, 32, 32, 4), np.float32))
        >>> guidance = sega_jax.load_guidance(path)
        >>> out = sega_jax.load()("a face", replay=0.7 * guidance, steps=2, output="latent", progress=False)
        >>> out.images.shape
        (1, 32, 32, 4)
    """
    try:
        with safe_open(os.path.expanduser(path), framework="numpy") as file:
            if _NAME not in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                raise ValueError(f"{path} contains no guidance; give a file that save_guidance wrote")
            return _checked(str(path), file.get_tensor(_NAME))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (SafetensorError, TypeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as guidance ({error}); give a file that save_guidance wrote") from None


def _checked(name: str, array: Any) -> np.ndarray:
    array = floating(name, array, _AXES)
    if array.ndim != 5:
        raise ValueError(f"{name} has shape {array.shape}, expected {_AXES}")
    return array
