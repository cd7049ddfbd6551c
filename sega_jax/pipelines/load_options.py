"""The options of `load`, declared once, and the choices that depend on the devices."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.argument_kinds import Choice, Flag, Kind, Opaque, Words
from sega_jax.method.arguments import argument, check_arguments
from sega_jax.method.checks import brief, check_choice, did_you_mean
from sega_jax.pipelines.adapter_options import Loras, NewWords
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.safety import Safety

PREDICTIONS = ("epsilon", "v_prediction")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ATTENTIONS = ("xla", "cudnn", "pallas")
# The options for files that change a checkpoint's networks.
ADAPTERS = ("lora", "textual_inversion")
# The model that comes along.
DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"


class Location(Kind):
    """The path of a folder or file, or a name on the hub."""

    noun = "a path, or owner/name on the hub"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name}={brief(value)} should be the path of a folder, or owner/name on the hub")
        return value


class Revision(Words):
    """A branch, tag or commit."""

    noun = "a branch, tag or commit"

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} should be the name of a branch or tag, or a commit")
        return value


class OptionalChoice(Choice):
    """One of several names, or None."""

    def check(self, name: str, value: Any) -> str:
        return check_choice(name, value, self.names, ", or None")


class SchedulerChoice(Kind):
    """A scheduler by any of its names."""

    noun = "a class name of diffusers', a config, or a folder with one"

    def check(self, name: str, value: Any) -> Any:
        return checked_scheduler(value)

    def parse(self, name: str, text: str) -> str:
        checked_scheduler(text)
        return text


class DevicesChoice(Kind):
    """Devices of JAX; in the shell how many of this host's, or their numbers."""

    noun = (
        "devices of JAX, or `pipe.devices` of another pipeline, which bring its compiled programs along if the networks"
        " have the same shapes"
    )
    metavar = "COUNT|NUMBERS"

    def parse(self, name: str, text: str) -> list[jax.Device]:
        known = jax.local_devices()
        try:
            numbers = [int(part) for part in text.removesuffix(",").split(",")]
        except ValueError:
            raise ValueError(
                f"{name}={text!r} should be how many devices, such as 2, or their numbers, such as 0,2"
            ) from None
        if "," not in text:
            if not 1 <= numbers[0] <= len(known):
                raise ValueError(f"{name}={text} should be from 1 to {len(known)}, as many as this host has")
            return known[: numbers[0]]
        if not all(0 <= number < len(known) for number in numbers):
            raise ValueError(f"{name}={text} should be numbers from 0 to {len(known) - 1}, of this host's {len(known)}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name}={text} names a device twice; leave one out")
        return [known[number] for number in numbers]


class TokenizerChoice(Kind):
    """Another pipeline's tokenizer, or its folder; the family checks which."""

    noun = "a tokenizer of another pipeline (`pipe.tokenizer`), or its folder"

    def check(self, name: str, value: Any) -> Any:
        if not (isinstance(value, str | os.PathLike | tuple) or callable(value)):
            raise TypeError(f"tokenizer={value!r} should be another pipeline's (pipe.tokenizer), or a folder")
        return value


class NetworkChoice(Kind):
    """A network of another pipeline, or where one is published alone; the family checks which."""

    noun = (
        "a folder with config.json and weights, a single file with diffusers' or the original names, owner/name on the"
        " hub, or a network of another pipeline (`pipe.models.unet`)"
    )
    metavar = "PATH|NAME"

    def check(self, name: str, value: Any) -> Any:
        if value == "":
            raise ValueError(f"{name}='' should be {self.noun}")
        return value


class CheckerChoice(Flag):
    """True, False, None, or another pipeline's safety checker."""

    def check(self, name: str, value: Any) -> Any:
        check_checker(value)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class LoadOptions:
    """The options of `load`, checked as far as that needs no checkpoint.

    Raises:
        TypeError, ValueError: an option is of another type, or unknown.
    """

    source: str | Path = argument(
        DEMO,
        Location(),
        "a folder in diffusers layout (with model_index.json; weights are .safetensors, .bin, or .msgpack as diffusers"
        " wrote it for Flax) or from sega-jax-convert; owner/name on the Hugging Face hub, of which the files that are"
        " needed are fetched into the hub's cache; or a single file (.safetensors, or a pickle such as .ckpt, of which"
        " nothing is run) of Stable Diffusion 1.x, 2.x or XL with the names of the original repositories, also on the"
        " hub (owner/name/file). Its vocabulary is fetched from the hub, unless `tokenizer` or `config` gives it. The"
        " demo model draws cartoon portraits",
        sweep=True,
    )
    _: dataclasses.KW_ONLY
    revision: str | None = argument(
        None, Revision(), "the branch, tag or commit of a repository on the hub", sweep=True, shell=True
    )
    dtype: DTypeLike | None = argument(
        None,
        Opaque("float32, bfloat16 or float16"),
        "the dtype of the networks; by default bfloat16 on accelerators (float16 on GPUs without it) and float32 on"
        " CPUs. Guidance and solver always use float32",
        sweep=True,
        shell=True,
    )
    variant: str | None = argument(
        None,
        Words(),
        'the variant of the weight files, such as "fp16"; it does not change the dtype',
        sweep=True,
        shell=True,
    )
    devices: Sequence[jax.Device] | Devices | None = argument(
        None,
        DevicesChoice(),
        "the devices that share the pictures; by default all of this host. The shell takes how many, such as 2, or"
        " their numbers, such as 0,2, or 1, for number 1 alone",
        shell=True,
    )
    attention: str | None = argument(
        None,
        OptionalChoice(*ATTENTIONS),
        '"cudnn" is for GPUs from compute capability 8.0 on in half precision, "pallas" JAX\'s flash kernel for TPUs in'
        ' bfloat16 or float32. None is "cudnn" where that works, else "xla"',
        sweep=True,
    )
    scheduler: Any = argument(None, SchedulerChoice(), "replaces the checkpoint's scheduler", shell=True)
    safety_checker: bool | Safety | None = argument(
        True,
        CheckerChoice(),
        "whether to load the checkpoint's safety checker, if there is one, which makes flagged pictures black."
        " `pipe.safety` of another pipeline may be given instead. With False or None its files are not read",
        sweep=True,
        shell=True,
    )
    text_encoder: Any = argument(
        None,
        NetworkChoice(),
        "replaces the checkpoint's text encoder, whose files are not read. False loads none, if the family allows it;"
        " prompts must then be embeddings",
    )
    text_encoder_2: Any = argument(None, NetworkChoice(), "replaces the checkpoint's second text encoder")
    unet: Any = argument(None, NetworkChoice(), "replaces the checkpoint's UNet", shell=True)
    vae: Any = argument(None, NetworkChoice(), "replaces the checkpoint's autoencoder", shell=True)
    networks: Mapping[str, Any] | None = argument(
        None,
        Opaque("networks, or their files, by the names of their folders"),
        "replaces networks of the checkpoint, for any family",
    )
    tokenizer: Any = argument(
        None,
        TokenizerChoice(),
        "replaces the checkpoint's tokenizer; SDXL needs only one, because its two share a vocabulary",
        shell=True,
    )
    config: str | Path | None = argument(
        None,
        Location(),
        "a folder or repository in diffusers layout that gives a single file its configs, tokenizer and scheduler; by"
        " default those of Stable Diffusion 1.5, 2.1 or SDXL base",
        shell=True,
    )
    prediction_type: str | None = argument(
        None,
        OptionalChoice(*PREDICTIONS),
        "what the UNet predicts; by default the scheduler's config decides. A single file of Stable Diffusion 2.x does"
        ' not show it: the default is "v_prediction", as in diffusers, and 2.0-base and 2.1-base need "epsilon"',
        shell=True,
    )
    ema: bool = argument(False, Flag(), "whether to use the UNet's moving average, if a single file has it", shell=True)
    lora: str | Path | Mapping[str | Path, float] | None = argument(
        None,
        Loras(),
        "LoRAs to merge into the weights (`sega_jax.merge_lora`)",
        shell=True,
    )
    textual_inversion: str | Path | Mapping[str, str | Path] | None = argument(
        None,
        NewWords(),
        "words to add (`sega_jax.add_words`)",
        shell=True,
    )

    def __post_init__(self) -> None:
        check_arguments(self)

    @property
    def replaced(self) -> dict[str, Any]:
        """The networks that stand in place of the checkpoint's, by name."""
        names = ("text_encoder", "text_encoder_2", "unet", "vae")
        own = {name: getattr(self, name) for name in names}
        return {name: value for name, value in own.items() if value is not None} | dict(self.networks or {})


def check_checker(value: Any) -> None:
    """Checks that `load` can be given this as its safety_checker.

    Raises:
        TypeError: it cannot.
    """
    if not (value is None or isinstance(value, bool | Safety)):
        what = type(value).__name__ if callable(value) else repr(value)
        raise TypeError(f"safety_checker={what} should be True for the checkpoint's own, or False or None")


def pick_dtype(dtype: DTypeLike | None, devices: Devices) -> np.dtype:
    """Returns a dtype of networks, or the devices' own in place of None.

    Raises:
        ValueError: another dtype.
    """
    if dtype is None:
        platform = devices.devices[0].platform
        old = platform == "gpu" and not all(map(_is_ampere, devices.devices))
        return np.dtype("float32" if platform == "cpu" else "float16" if old else jnp.bfloat16)
    if str(dtype).startswith("torch."):
        dtype = str(dtype).removeprefix("torch.")
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        hint = did_you_mean(dtype, DTYPES[:3], whole_dtype)
        raise ValueError(f"dtype={dtype!r} should be one of {', '.join(DTYPES[:3])}, or None for the device's{hint}")
    # JAX adds its options to this object at run time.
    if name == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError("dtype float64 needs jax.config.update('jax_enable_x64', True) first")
    return jnp.dtype(dtype)


def whole_dtype(name: str) -> str:
    """Returns the whole name of a dtype that is shortened, such as "fp16" or "bf16"."""
    return re.sub(r"^(bf|f)p?(?=\d)", lambda match: f"{match[1]}loat", name.lower())


def _is_ampere(device: jax.Device) -> bool:
    """Tells whether a GPU is NVIDIA's of compute capability 8.0 or more, with bfloat16 and flash kernels."""
    try:
        return device.platform == "gpu" and float(device.compute_capability) >= 8
    except (AttributeError, ValueError):  # another maker's GPU names its architecture
        return False


def pick_attention(attention: str | None, dtype: np.dtype, devices: Devices) -> str:
    """Returns an implementation of attention, or the one that suits the devices in place of None.

    Raises:
        ValueError: an unknown one, or one that the devices do not have.
    """
    if attention is not None:
        OptionalChoice(*ATTENTIONS).check("attention", attention)
    able = dtype.name in ("bfloat16", "float16") and all(map(_is_ampere, devices.devices))
    if attention == "cudnn" and not able:
        raise ValueError(
            "attention='cudnn' needs GPUs of compute capability 8.0 or more and dtype bfloat16 or float16,"
            f" got {devices.devices[0].device_kind} and {dtype.name}"
        )
    tpus = dtype.name in ("bfloat16", "float32") and all(device.platform == "tpu" for device in devices.devices)
    if attention == "pallas" and not tpus:
        raise ValueError(
            "attention='pallas' needs TPUs and dtype bfloat16 or float32,"
            f" got {devices.devices[0].device_kind} and {dtype.name}"
        )
    return attention or ("cudnn" if able else "xla")
