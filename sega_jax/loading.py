"""`load`: a checkpoint's folder to a `Pipeline`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax import orbax, schedules
from sega_jax.checkpoint import CheckpointError, Tensors, fill, read_json
from sega_jax.parallel import Devices
from sega_jax.pipeline import Pipeline
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text import Tokenizer

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    attention: str | None = None,
) -> Pipeline:
    """Loads a Stable Diffusion checkpoint, a folder in diffusers layout with safetensors weights, or what
    `sega-jax-convert` made of one.

    Args:
        source: the folder, which holds `model_index.json`.
        dtype: of the networks, float32, bfloat16 or float16; None is bfloat16 on accelerators (float16 on
            GPUs older than that) and float32 on the CPU. Guidance and solver are in float32 whatever it is.
        variant: "fp16" reads the files that are named so; the dtype is `dtype` all the same.
        devices: to spread pictures over; None is all of this host.
        attention: "xla", or "cudnn" for GPUs from compute capability 8.0 on in half precision; None picks.

    Raises:
        FileNotFoundError: no such folder.
        TypeError: the source is no path, or the devices are none.
        CheckpointError: the folder is no checkpoint, or a file is missing, broken or does not fit.
        ValueError: an unknown dtype or attention, or a config that is not supported.
    """
    folder = checkpoint_folder(source)
    where = Devices(devices)
    dtype = _dtype(dtype, where)
    attention = _attention(attention, dtype, where)

    models, tokenizer, scheduler = describe(folder, attention)

    def component(part: str, module: Any) -> Any:
        with open_weights(folder / part, variant, module.rename) as weights:
            return fill(module, weights, dtype, where.place)

    models = Models(*(component(part, module) for part, module in models._asdict().items()))
    return Pipeline(models, tokenizer, scheduler, where)


def describe(folder: Path, attention: str = "xla") -> tuple[Models, Tokenizer, schedules.Scheduler]:
    """What a checkpoint's folder holds beside the weights; the networks are without values.

    Raises:
        CheckpointError: a file is missing, broken, or describes what is not supported.
    """
    configs = {part: read_json(folder / part / "config.json") for part in Models._fields}
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        models = Models.build(**configs, attention=attention)
        scheduler = schedules.from_config(scheduler_config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    embeddings = models.text_encoder.embeddings
    tokenizer = Tokenizer(
        folder / "tokenizer",
        embeddings.position_embedding.embedding.shape[0],
        embeddings.token_embedding.embedding.shape[0],
    )
    return models, tokenizer, scheduler


def weight_stem(part: str) -> str:
    """The name of a network's weight file in diffusers layout, without ending."""
    return "model" if part == "text_encoder" else "diffusion_pytorch_model"


def open_weights(folder: Path, variant: str | None, rename: Callable[[str], str]) -> Tensors | orbax.OrbaxTensors:
    """The weights of the network whose folder this is, in diffusers layout or from Orbax.

    Raises:
        CheckpointError: they are missing or broken.
    """
    if not (folder / orbax.ARRAYS).is_dir():
        return Tensors(folder, weight_stem(folder.name), variant, rename)
    if variant is not None:
        raise CheckpointError(f"{folder} holds an Orbax checkpoint, which has no variants; leave {variant!r} out")
    return orbax.OrbaxTensors(folder, rename)


def checkpoint_folder(source: str | Path) -> Path:
    """The folder of a Stable Diffusion checkpoint.

    Raises:
        TypeError, FileNotFoundError, CheckpointError: it is none; nothing large was read.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source={source!r} should be the path of a folder")
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give one in diffusers layout (with model_index.json, unet, vae, text_encoder,"
            " tokenizer and scheduler)"
        )
    _check_kind(folder)
    return folder


def _check_kind(folder: Path) -> None:
    parts = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    index = folder / "model_index.json"
    if not index.is_file():
        hint = (
            "; it looks like one part of a checkpoint, give the folder above"
            if (folder / "config.json").is_file()
            else ""
        )
        raise CheckpointError(f"{folder} has no model_index.json, so it is no checkpoint in diffusers layout{hint}")
    entries = read_json(index)
    if "text_encoder_2" in entries:
        raise CheckpointError(
            f"{folder} is a {entries.get('_class_name')} with two text encoders, expected Stable Diffusion 1.x or 2.x"
        )
    for part, expected in parts.items():
        found = entries.get(part)
        found = found[1] if isinstance(found, list) and len(found) == 2 else None
        if found != expected or not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder} is a {entries.get('_class_name')} whose {part} is"
                f" {found or 'missing'}; expected Stable Diffusion 1.x or 2.x, with {expected} in the folder {part}"
            )


def _dtype(dtype: DTypeLike | None, where: Devices) -> np.dtype:
    if dtype is None:
        platform = where.devices[0].platform
        old = platform == "gpu" and not all(map(_is_ampere, where.devices))
        return np.dtype("float32" if platform == "cpu" else "float16" if old else jnp.bfloat16)
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} should be one of {', '.join(DTYPES[:3])}, or None for the device's")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype float64 needs jax.config.update('jax_enable_x64', True) first")
    return jnp.dtype(dtype)


def _is_ampere(device: jax.Device) -> bool:
    """Whether a GPU is NVIDIA's of compute capability 8.0 or more, with bfloat16 and flash kernels."""
    try:
        return device.platform == "gpu" and float(device.compute_capability) >= 8
    except (AttributeError, ValueError):  # another maker's GPU names its architecture
        return False


def _attention(attention: str | None, dtype: np.dtype, where: Devices) -> str:
    if attention not in (None, "xla", "cudnn"):
        raise ValueError(f"attention={attention!r} should be 'xla', 'cudnn' or None")
    able = dtype.name in ("bfloat16", "float16") and all(map(_is_ampere, where.devices))
    if attention == "cudnn" and not able:
        raise ValueError(
            "attention='cudnn' needs GPUs of compute capability 8.0 or more and dtype bfloat16 or float16,"
            f" got {where.devices[0].device_kind} and {dtype.name}"
        )
    return attention or ("cudnn" if able else "xla")
