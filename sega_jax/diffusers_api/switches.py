"""Defines diffusers' methods that control where and how a pipeline runs. Some of them have no effect here."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.diffusers_api.torch_values import devices_of, is_dtype
from sega_jax.method.checks import check_float
from sega_jax.pipelines.device_defaults import pick_dtype
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.messages import collected
from sega_jax.pipelines.pipeline import Pipeline

# Methods that control how torch computes or where it stores weights. They do not change the pictures.
WITHOUT_EFFECT = (
    *("enable_attention_slicing", "disable_attention_slicing", "set_attention_slice"),
    *("enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention"),
    *("set_use_memory_efficient_attention_xformers", "enable_vae_slicing", "disable_vae_slicing"),
    *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
    *("maybe_free_model_hooks", "remove_all_hooks", "reset_device_map", "disable_freeu"),
    *("fuse_qkv_projections", "unfuse_qkv_projections", "enable_lora_hotswap", "set_lora_device"),
)
# {method that would change the pictures or do something unsupported: remedy}.
REFUSED = {
    "load_ip_adapter": "sega_jax has no IP-Adapters; to start from a picture, give image= to the call",
    "set_ip_adapter_scale": "sega_jax has no IP-Adapters; leave it out",
    "unload_ip_adapter": "sega_jax has no IP-Adapters; leave it out",
    "push_to_hub": "write a folder with save_pretrained and upload it with huggingface_hub.upload_folder",
    "save_lora_weights": "LoRAs are merged into the weights; save the merged weights with save_pretrained",
    "save_lora_adapter": "LoRAs are merged into the weights; save the merged weights with save_pretrained",
    "register_modules": "build a new pipeline with type(pipe)(**pipe.components | {...})",
    "enable_layerwise_casting": "give torch_dtype to from_pretrained",
    "progress_bar": "give progress= to the call, or use set_progress_bar_config",
}


_FACTORS = ("s1", "s2", "b1", "b2")


class Switches:
    """The methods that control where and how a pipeline runs."""

    pipeline: Pipeline
    _tiled: bool = False
    _progress: bool | None = None  # whether to show progress bars; None shows them in terminals and notebooks
    _bar: Mapping[str, Any] = MappingProxyType({})  # tqdm's options for progress bars

    def to(self, *args: Any, device: Any = None, dtype: Any = None, **options: Any) -> Self:
        """Moves the networks to devices and casts them.

        Args:
            args: a device, a dtype, or both. A device is "cuda" for all accelerators, "cuda:0" for the first one, or
                "cpu"; it may also be a torch device, or one or more JAX devices. Without an accelerator, "cuda" only
                causes a warning. A dtype is a torch, NumPy or JAX dtype, or its name.
            device, dtype: the device and the dtype as keyword arguments.
            options: `torch_dtype`, and options such as `memory_format` that have no effect here.

        Returns:
            The pipeline itself.

        Raises:
            TypeError, ValueError: an argument is not a device or dtype, or the device does not exist.
        """
        harmless = {"torch_dtype", "silence_dtype_warnings", "non_blocking", "memory_format"}
        if unknown := [name for name in options if name not in harmless]:
            raise TypeError(f"{unknown[0]} is not an argument of to(); it accepts a device and a dtype")
        dtype = options.get("torch_dtype") if dtype is None else dtype
        for arg in args:
            if is_dtype(arg):
                dtype = arg
            elif isinstance(arg, bool):  # torch's `non_blocking`
                continue
            elif arg is not None:
                device = arg
        with collected():
            devices = devices_of(device, self.pipeline.devices)
            cast = None if dtype is None else pick_dtype(dtype, devices)
            if devices is not self.pipeline.devices or cast not in (None, self.pipeline.dtype):
                self._move(devices, cast)
        return self

    def _move(self, devices: Devices, dtype: np.dtype | None) -> None:
        raise NotImplementedError

    @property
    def device(self) -> jax.Device:
        """The first device of the pipeline."""
        return self.pipeline.devices.devices[0]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the denoising network."""
        return self.pipeline.dtype

    def enable_vae_tiling(self, *args: Any, **options: Any) -> None:
        """Makes later calls decode large pictures in overlapping tiles; see the `tiled` argument of
        `sega_jax.Pipeline`.

        Raises:
            TypeError: the family does not support tiled decoding.
        """
        del args, options
        if "tiled" not in inspect.signature(self.pipeline.system.call).parameters:
            raise TypeError(f"{self.pipeline.system.title} has no tiled decoding; leave enable_vae_tiling out")
        self._tiled = True

    def disable_vae_tiling(self) -> None:
        """Makes later calls decode pictures without tiles."""
        self._tiled = False

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Checks that all factors are 1 (no effect), because FreeU is not supported.

        Raises:
            NotImplementedError: a factor is not 1.
        """
        factors = [check_float(name, value) for name, value in zip(_FACTORS, (s1, s2, b1, b2), strict=True)]
        if any(factor != 1 for factor in factors):
            raise NotImplementedError("enable_freeu: FreeU is not supported and would change the picture; leave it out")

    def set_progress_bar_config(self, **options: Any) -> None:
        """Sets tqdm's options for progress bars, such as `desc` and `leave`; `disable=True` hides the bars.

        Raises:
            TypeError: tqdm has no such option.
        """
        from tqdm import tqdm

        known = [name for name in inspect.signature(tqdm.__init__).parameters if name not in ("self", "iterable")]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"it accepts {', '.join(known)}"
                raise TypeError(f"{name} is not an argument of set_progress_bar_config; {hint}")
        disable = options.pop("disable", None)
        self._progress = None if disable is None else not disable
        self._bar = options


def cast_to(tree: Any, dtype: np.dtype) -> Any:
    """Returns a tree with its floating-point arrays cast to `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def _without_effect(name: str) -> Callable[..., None]:
    def method(self: Switches, *args: Any, **options: Any) -> None:
        del self, args, options

    method.__name__ = method.__qualname__ = name
    method.__doc__ = "Has no effect, because it controls only how torch computes and does not change the pictures."
    return method


def _refused(name: str, remedy: str) -> Callable[..., None]:
    def method(self: Switches, *args: Any, **options: Any) -> None:
        raise NotImplementedError(f"{name} is not supported: {remedy}")

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"Raises NotImplementedError: {remedy}."
    return method


def _add(names: Sequence[str], make: Callable[[str], Callable[..., None]]) -> None:
    for name in names:
        setattr(Switches, name, make(name))


_add(WITHOUT_EFFECT, _without_effect)
_add(list(REFUSED), lambda name: _refused(name, REFUSED[name]))
