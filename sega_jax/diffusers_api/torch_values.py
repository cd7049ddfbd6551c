"""Values of torch in pasted code, which are understood without torch: dtypes, devices and random generators."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sega_jax.method.checks import brief
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import DTYPES
from sega_jax.pipelines.messages import warn

# What diffusers' code calls an accelerator, and the words for all of them.
_ACCELERATORS = ("cuda", "gpu", "tpu", "mps", "xpu", "npu", "hpu", "rocm")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_MOST_SEED, _FEW = 2**32 - 1, 2**17  # seeds of pictures, and more pictures than a call makes


def is_dtype(value: Any) -> bool:
    """Tells whether a value is a dtype of torch, JAX or NumPy."""
    if str(value).startswith("torch.") or (isinstance(value, str) and value in DTYPES):
        return True
    return isinstance(value, np.dtype) or (isinstance(value, type) and hasattr(value, "dtype"))


def one_dtype(value: Any) -> Any:
    """Returns the one dtype of all networks, which torch's code may name by component.

    Raises:
        ValueError: components have different dtypes.
    """
    if not isinstance(value, Mapping):
        return value
    named = set(map(str, value.values()))
    if len(named) > 1:
        raise ValueError(f"torch_dtype={brief(value)} has several dtypes; give one, all networks have the same here")
    return next(iter(value.values()), None)


def devices_of(value: Any, current: Devices) -> Devices:
    """Returns the devices that a name or device stands for; `current` where it stands for these.

    Args:
        value: "cuda", "cuda:1", "cpu" and the like, a device of torch, one or several devices of JAX, or None.

    Raises:
        TypeError, ValueError: it is something else, or there is no such device.
    """
    if value is None or isinstance(value, Devices):
        return value or current
    if isinstance(value, jax.Device):
        value = [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return current if list(value) == current.devices else Devices(value)
    name = f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()
    found = re.fullmatch(r"([a-z_0-9]+?)(?::(\d+))?", name)
    kind, number = (found[1], found[2]) if found else ("", None)
    if kind in _SPREAD:
        return current
    if kind not in (*_ACCELERATORS, "cpu"):
        raise ValueError(f"device={brief(value)} should be 'cuda', 'cuda:0', 'cpu', or devices of jax.devices()")
    platform = current.devices[0].platform
    if kind == "cpu":
        return current if platform == "cpu" else Devices(jax.local_devices(backend="cpu")[:1])
    accelerators = [device for device in jax.local_devices() if device.platform != "cpu"]
    if not accelerators:
        warn(f"JAX sees no accelerator for {name!r}; the pipeline stays on {platform}")
        return current
    if number is None:
        return current if platform != "cpu" else Devices(accelerators)
    if int(number) >= len(accelerators):
        raise ValueError(f"device={brief(value)}: JAX sees {len(accelerators)} accelerators, counted from 0")
    chosen = [accelerators[int(number)]]
    return current if chosen == current.devices else Devices(chosen)


def array(value: Any, *, pictures: bool = False) -> Any:
    """Returns tensors of torch as arrays on the host, in at least float32, and everything else as it is.

    Args:
        pictures: whether the third axis from the end, torch's channels, goes last.
    """
    if isinstance(value, list | tuple):
        return [array(one, pictures=pictures) for one in value]
    if not (type(value).__module__.startswith("torch") and callable(getattr(value, "detach", None))):
        return value
    value = value.detach().cpu()
    value = np.asarray(value if str(value.dtype) == "torch.float64" else value.float())
    return np.moveaxis(value, -3, -1) if pictures and value.ndim >= 3 else value


def is_generator(value: Any) -> bool:
    """Tells whether a value is a random generator of torch."""
    return callable(getattr(value, "initial_seed", None)) and callable(getattr(value, "manual_seed", None))


def is_key(value: Any) -> bool:
    """Tells whether a value is a key of JAX."""
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


class Seeds:
    """The seeds that generators of torch stand for: the number that each was seeded with.

    As in torch, a generator that is used again gives another picture: `advance` reseeds it with a number that follows
    from the last one. The pictures differ from torch's, which draws its noise in another way.
    """

    def __init__(self, generators: Any):
        several = isinstance(generators, list | tuple)
        self._next: dict[int, tuple[Any, int]] = {}
        seeds = [self._draw(one) for one in (generators if several else [generators])]
        self.value: int | list[int] = seeds if several else seeds[0]

    def _draw(self, generator: Any) -> int:
        if not is_generator(generator):
            return generator
        _, state = self._next.get(id(generator), (generator, generator.initial_seed()))
        self._next[id(generator)] = generator, int(np.random.SeedSequence(state).generate_state(1)[0])
        return state if state <= _MOST_SEED - _FEW else state % (_MOST_SEED - _FEW)

    def advance(self) -> None:
        """Seeds the generators for their next pictures."""
        for generator, state in self._next.values():
            generator.manual_seed(state)
