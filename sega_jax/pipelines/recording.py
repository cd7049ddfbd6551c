"""Concept vectors: recorded guidance on disk, to be added, scaled and replayed on other pictures.

Guidance is a plain array [pictures, calls, height, width, channels], so that arithmetic is NumPy's own:

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
    """Writes recorded guidance as a safetensors file, in its own floating dtype; a file that is there is replaced.

    Args:
        guidance: [pictures, calls, height, width, channels], as `Output.record.sem_guidance`. (diffusers' face gives
            calls first: `np.moveaxis(out.sem_guidance, 1, 0)`.)
        about: words to go with it, such as the prompt and the edit.

    Raises:
        TypeError, ValueError: it is no such array, or `about` is not of words.
        OSError: the file cannot be written.
    """
    array, about = _checked("guidance", guidance), {} if about is None else about
    if not isinstance(about, Mapping) or not all(isinstance(w, str) for pair in about.items() for w in pair):
        raise TypeError(f"about={about!r} should be names and words, like {{'prompt': 'a castle'}}")
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
    """Guidance that `save_guidance` wrote: [pictures, calls, height, width, channels], in the dtype it had.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken or holds something else.
    """
    try:
        with safe_open(os.path.expanduser(path), framework="numpy") as file:
            if _NAME not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                raise ValueError(f"{path} holds no guidance; write it with save_guidance")
            return _checked(str(path), file.get_tensor(_NAME))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (SafetensorError, TypeError, OSError) as error:
        raise ValueError(f"{path} is no readable guidance ({error}); write it with save_guidance") from None


def _checked(name: str, array: Any) -> np.ndarray:
    array = floating(name, array, _AXES)
    if array.ndim != 5:
        raise ValueError(f"{name} has shape {array.shape}, expected {_AXES}")
    return array
