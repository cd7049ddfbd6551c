"""Floating arrays: the one rule of precision, and what may come in.

Half-precision networks, single-precision sums.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.checks import brief

# The exponent bits of each floating type: all set means infinite or NaN.
_EXPONENTS = {
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(jnp.bfloat16): (np.uint16, 0x7F80),
}
# Entries that are looked at together, which a processor's cache holds.
_PART = 2**17


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """A floating dtype, or float32 in place of one of half precision."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def is_floating(dtype: np.dtype) -> bool:
    """Whether a dtype is one that pictures and weights come in."""
    return dtype in _EXPONENTS


def is_finite(array: np.ndarray) -> bool:
    """Whether a host array of floating dtype has no infinite or NaN entry; quick in half precision, too."""
    integer, mask = _EXPONENTS[array.dtype]
    entries = np.ascontiguousarray(array).reshape(-1).view(integer)
    parts = (entries[start : start + _PART] for start in range(0, entries.size, _PART))
    return not any(((part & integer(mask)) == mask).any() for part in parts)


def floating(name: str, value: Any, axes: str) -> np.ndarray:
    """A host array of finite floats; `axes` are words for its axes, as "(tokens, channels)".

    Raises:
        TypeError: it is no array of floats.
        ValueError: it has NaN or infinite entries.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, of tensors with gradients
        array = np.asarray(None)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not is_floating(array.dtype):
        raise TypeError(f"{name}={brief(value)} should be a floating array {axes}")
    if not is_finite(array):
        raise ValueError(f"{name} {'have' if name.endswith('s') else 'has'} NaN or infinite entries")
    return array
