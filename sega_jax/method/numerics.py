"""Checks floating-point arrays, and chooses the dtype for sums: at least float32, even for half-precision arrays."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.naming import assignment

# The exponent bits of each floating-point type; if all are set, the value is infinite or NaN.
_EXPONENTS = {
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(jnp.bfloat16): (np.uint16, 0x7F80),
}
# The number of entries that `is_finite` reads at a time; this many fit in a processor's cache.
_PART = 2**17


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns the given floating-point dtype, or float32 if the dtype is half precision."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def is_floating(dtype: np.dtype) -> bool:
    """Returns whether a dtype is float64, float32, float16 or bfloat16."""
    return dtype in _EXPONENTS


def is_finite(array: np.ndarray) -> bool:
    """Returns whether all entries of a floating-point host array are finite. The check is fast even for half-precision
    arrays."""
    integer, mask = _EXPONENTS[array.dtype]
    entries = np.ascontiguousarray(array).reshape(-1).view(integer)
    parts = (entries[start : start + _PART] for start in range(0, entries.size, _PART))
    return not any(((part & integer(mask)) == mask).any() for part in parts)


def floating(name: str, value: Any, axes: str) -> np.ndarray:
    """Checks that a value is an array of finite floats, and returns it as a host array.

    Args:
        name: The value's name, for error messages.
        axes: The expected axes, for error messages, such as "(tokens, channels)".

    Raises:
        TypeError: The value is not an array of floats.
        ValueError: The array has NaN or infinite entries.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for tensors that require gradients
        array = np.asarray(None)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not is_floating(array.dtype):
        raise TypeError(f"{assignment(name, value)} should be a floating-point array {axes}")
    if not is_finite(array):
        raise ValueError(f"{name} {'have' if name.endswith('s') else 'has'} NaN or infinite entries")
    return array
