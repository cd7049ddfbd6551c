"""The networks' dtype and attention implementation: checks, and defaults that depend on the devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.checks import did_you_mean
from sega_jax.method.naming import assignment, in_python
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import ATTENTIONS, DTYPES, OptionalChoice


def pick_dtype(dtype: DTypeLike | None, devices: Devices) -> np.dtype:
    """Returns the dtype of the networks; if `dtype` is None, this is the default for the devices.

    Raises:
        ValueError: The dtype is not supported, or float64 is not enabled in JAX.
    """
    if dtype is None:
        platform = devices.devices[0].platform
        lacks_bfloat16 = platform == "gpu" and not all(map(_is_ampere, devices.devices))
        return np.dtype("float32" if platform == "cpu" else "float16" if lacks_bfloat16 else jnp.bfloat16)
    if str(dtype).startswith("torch."):
        dtype = str(dtype).removeprefix("torch.")
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        hint = did_you_mean(dtype, DTYPES[:3], whole_dtype)
        raise ValueError(
            f"{assignment('dtype', dtype)} should be one of {', '.join(DTYPES[:3])}"
            + in_python(", or None for the devices' default")
            + hint
        )
    # mypy does not recognise this option, because JAX defines its options at run time.
    if name == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(
            f"{assignment('dtype', 'float64')} needs 64-bit JAX; set the environment variable JAX_ENABLE_X64=1"
            + in_python(", or call jax.config.update('jax_enable_x64', True) first")
        )
    return jnp.dtype(dtype)


def whole_dtype(name: str) -> str:
    """Expands an abbreviated dtype name such as "fp16" or "bf16"."""
    return re.sub(r"^(bf|f)p?(?=\d)", lambda match: f"{match[1]}loat", name.lower())


def _is_ampere(device: jax.Device) -> bool:
    """Returns whether a device is an NVIDIA GPU with compute capability 8.0 or higher.

    bfloat16 and flash kernels need such a GPU.
    """
    try:
        return device.platform == "gpu" and float(device.compute_capability) >= 8
    except (AttributeError, ValueError):  # for other vendors' GPUs, this is an architecture name
        return False


def pick_attention(attention: str | None, dtype: np.dtype, devices: Devices) -> str:
    """Returns the attention implementation to use; if `attention` is None, the best one for the devices and the dtype.

    Raises:
        ValueError: The implementation is unknown, or does not support the devices or the dtype.
    """
    if attention is not None:
        OptionalChoice(*ATTENTIONS).check("attention", attention)
    cudnn_works = dtype.name in ("bfloat16", "float16") and all(map(_is_ampere, devices.devices))
    if attention == "cudnn" and not cudnn_works:
        raise ValueError(
            f"{assignment('attention', attention)} needs GPUs of compute capability 8.0 or higher and dtype bfloat16"
            f" or float16, got {devices.devices[0].device_kind} and {dtype.name}"
        )
    pallas_works = dtype.name in ("bfloat16", "float32") and all(device.platform == "tpu" for device in devices.devices)
    if attention == "pallas" and not pallas_works:
        raise ValueError(
            f"{assignment('attention', attention)} needs TPUs and dtype bfloat16 or float32,"
            f" got {devices.devices[0].device_kind} and {dtype.name}"
        )
    return attention or ("cudnn" if cudnn_works else "pallas" if pallas_works else "xla")
