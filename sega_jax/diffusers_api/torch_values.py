"""Reads torch values (dtypes, devices, tensors and random generators) without importing torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sega_jax.method.checks import brief
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import DTYPES
from sega_jax.pipelines.messages import warn

# Device names for accelerators, and the values of `device_map` that let the library choose.
_ACCELERATORS = ("cuda", "gpu", "tpu", "mps", "xpu", "npu", "hpu", "rocm")
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# The largest seed that a picture can have, and an upper bound on the number of pictures in a call. The pictures have
# the seeds s, s + 1, ...
_MAX_SEED, _MAX_PICTURES = 2**32 - 1, 2**17


def is_dtype(value: Any) -> bool:
    """Returns whether a value is a torch, JAX or NumPy dtype, or the name of a supported dtype."""
    if str(value).startswith("torch.") or (isinstance(value, str) and value in DTYPES):
        return True
    return isinstance(value, np.dtype) or (isinstance(value, type) and hasattr(value, "dtype"))


def one_dtype(value: Any) -> Any:
    """Returns the single dtype to use for all networks.

    Args:
        value: a dtype, or {component: dtype}.

    Raises:
        ValueError: the dtypes differ.
    """
    if not isinstance(value, Mapping):
        return value
    names = set(map(str, value.values()))
    if len(names) > 1:
        raise ValueError(f"torch_dtype={brief(value)} has different dtypes; give one dtype for all networks")
    return next(iter(value.values()), None)


def devices_of(value: Any, current: Devices) -> Devices:
    """Converts a device, or the name of a device, to `Devices`.

    Args:
        value: a name such as "cuda", "cuda:1" or "cpu", a torch device, one or more JAX devices, or None.
        current: the pipeline's devices. They are returned if `value` is None, if it refers to these devices, or if it
            names an accelerator but JAX has none.

    Raises:
        TypeError, ValueError: `value` is not a device, or there is no device with the given index.
    """
    if value is None or isinstance(value, Devices):
        return value or current
    if isinstance(value, jax.Device):
        value = [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return current if list(value) == current.devices else Devices(value)
    name = f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()
    match = re.fullmatch(r"([a-z_0-9]+?)(?::(\d+))?", name)
    kind, number = (match[1], match[2]) if match else ("", None)
    if kind in _AUTOMATIC:
        return current
    if kind not in (*_ACCELERATORS, "cpu"):
        raise ValueError(f"device={brief(value)} should be 'cuda', 'cuda:0', 'cpu', or devices from jax.devices()")
    platform = current.devices[0].platform
    if kind == "cpu":
        return current if platform == "cpu" else Devices(jax.local_devices(backend="cpu")[:1])
    accelerators = [device for device in jax.local_devices() if device.platform != "cpu"]
    if not accelerators:
        warn(f"JAX has no accelerator for {name!r}; the pipeline stays on {platform}")
        return current
    if number is None:
        return current if platform != "cpu" else Devices(accelerators)
    if int(number) >= len(accelerators):
        raise ValueError(
            f"device={brief(value)} does not exist; JAX has {len(accelerators)} accelerators, numbered from 0"
        )
    chosen = [accelerators[int(number)]]
    return current if chosen == current.devices else Devices(chosen)


def array(value: Any, *, pictures: bool = False) -> Any:
    """Converts torch tensors to NumPy arrays: float64 tensors to float64, all other tensors to float32.

    Args:
        value: a tensor, or a list of tensors and other values. Other values are returned unchanged.
        pictures: whether to move torch's channel axis, the third from the end, to the end.
    """
    if isinstance(value, list | tuple):
        return [array(entry, pictures=pictures) for entry in value]
    if not (type(value).__module__.startswith("torch") and callable(getattr(value, "detach", None))):
        return value
    value = value.detach().cpu()
    value = np.asarray(value if str(value.dtype) == "torch.float64" else value.float())
    return np.moveaxis(value, -3, -1) if pictures and value.ndim >= 3 else value


def is_generator(value: Any) -> bool:
    """Returns whether a value is a torch random generator."""
    return callable(getattr(value, "initial_seed", None)) and callable(getattr(value, "manual_seed", None))


def is_key(value: Any) -> bool:
    """Returns whether a value is a JAX random key."""
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


class Seeds:
    """The seeds of torch generators.

    The seed of a generator is its `initial_seed`. As in torch, using a generator again gives a different picture:
    `advance` reseeds each generator with a number derived from its last seed. JAX draws the noise, so the pictures
    differ from torch's.

    Args:
        generators: a generator or a seed, or a list of these.

    Attributes:
        value: the seed, or a list of seeds.
    """

    def __init__(self, generators: Any):
        is_list = isinstance(generators, list | tuple)
        self._next: dict[int, tuple[Any, int]] = {}
        seeds = [self._draw(generator) for generator in (generators if is_list else [generators])]
        self.value: int | list[int] = seeds if is_list else seeds[0]

    def _draw(self, generator: Any) -> int:
        if not is_generator(generator):
            return generator
        _, state = self._next.get(id(generator), (generator, generator.initial_seed()))
        self._next[id(generator)] = generator, int(np.random.SeedSequence(state).generate_state(1)[0])
        return state if state <= _MAX_SEED - _MAX_PICTURES else state % (_MAX_SEED - _MAX_PICTURES)

    def advance(self) -> None:
        """Reseeds the generators for the next call."""
        for generator, state in self._next.values():
            generator.manual_seed(state)
