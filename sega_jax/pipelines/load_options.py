"""The options of `load`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from sega_jax.method.argument_kinds import Choice, Flag, Kind, Opaque, Words
from sega_jax.method.arguments import argument, check_arguments
from sega_jax.method.checks import check_choice
from sega_jax.method.naming import assignment, in_python
from sega_jax.pipelines.adapter_options import Loras, NewWords
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.safety import Safety

PREDICTIONS = ("epsilon", "v_prediction")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ATTENTIONS = ("xla", "cudnn", "pallas")
# The options whose files modify a checkpoint's networks.
ADAPTERS = ("lora", "textual_inversion")
# The folder of the demo model that comes with the package.
DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"


class Location(Kind):
    """The path of a folder or file, or a name on the hub."""

    noun = "a path, or owner/name on the hub"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{assignment(name, value)} should be the path of a folder, or owner/name on the hub")
        return value


class Revision(Words):
    """A branch, tag or commit of a repository."""

    noun = "a branch, tag or commit"

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{assignment(name, value)} should be the name of a branch or tag, or a commit hash")
        return value

    def parse(self, name: str, text: str) -> str:
        return _name(name, text)


class Variant(Words):
    """The variant of weight files."""

    def parse(self, name: str, text: str) -> str:
        return _name(name, text)


def _name(name: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{assignment(name, text)} is empty; give a name, or leave the option out")
    return text


class OptionalChoice(Choice):
    """One of several names, or None."""

    def check(self, name: str, value: Any) -> str:
        return check_choice(name, value, self.names, ", or None")


class SchedulerChoice(Kind):
    """A scheduler in any form that `as_scheduler` accepts."""

    noun = "a diffusers class name, a config, or a folder with one"

    def check(self, name: str, value: Any) -> Any:
        return checked_scheduler(value)

    def parse(self, name: str, text: str) -> str:
        checked_scheduler(text)
        return text


class DevicesChoice(Kind):
    """JAX devices; on the command line, a device count or a list of device numbers."""

    noun = (
        "JAX devices, or another pipeline's `pipe.devices` to reuse its compiled programs for networks of the same"
        " shapes"
    )
    metavar = "COUNT|NUMBERS"

    def parse(self, name: str, text: str) -> list[jax.Device]:
        known = jax.local_devices()
        try:
            numbers = [int(part) for part in text.removesuffix(",").split(",")]
        except ValueError:
            raise ValueError(
                f"{assignment(name, text)} should be a number of devices, such as 2, or device numbers, such as 0,2"
            ) from None
        if "," not in text:
            if not 1 <= numbers[0] <= len(known):
                raise ValueError(
                    f"{assignment(name, text)} should be from 1 to {len(known)}, the number of devices of this host"
                )
            return known[: numbers[0]]
        if not all(0 <= number < len(known) for number in numbers):
            raise ValueError(
                f"{assignment(name, text)} should be device numbers from 0 to {len(known) - 1}; this host has"
                f" {len(known)} devices"
            )
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{assignment(name, text)} lists a device twice; list each device once")
        return [known[number] for number in numbers]


class TokenizerChoice(Kind):
    """A tokenizer from another pipeline, or a tokenizer's folder. The family checks the type later."""

    noun = "another pipeline's tokenizer (`pipe.tokenizer`), or a tokenizer's folder"

    def check(self, name: str, value: Any) -> Any:
        if not (isinstance(value, str | os.PathLike | tuple) or callable(value)):
            raise TypeError(
                f"{assignment(name, value)} should be another pipeline's tokenizer (pipe.tokenizer), or a folder"
            )
        return value


class NetworkChoice(Kind):
    """A network from another pipeline, or a network's files. The family checks the type later."""

    noun = (
        "a folder with config.json and weights, a weight file with diffusers' or the original names, owner/name on the"
        " hub, or a network from another pipeline, such as `pipe.models.unet`"
    )
    metavar = "PATH|NAME"

    def check(self, name: str, value: Any) -> Any:
        if value == "":
            raise ValueError(
                f"{assignment(name, value)} should be a folder with config.json and weights, a weight file, or"
                " owner/name"
                " on the hub" + in_python(", or a network from another pipeline")
            )
        return value


class CheckerChoice(Flag):
    """True, False, None, or another pipeline's safety checker."""

    def check(self, name: str, value: Any) -> Any:
        check_checker(value)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class LoadOptions:
    """The options of `load`. Creating an instance checks everything that can be checked without the checkpoint.

    Raises:
        TypeError, ValueError: An option has the wrong type or value.
    """

    source: str | Path = argument(
        DEMO,
        Location(),
        "the checkpoint: a folder, a repository or a single file. Folders are in diffusers layout (model_index.json,"
        " and weights as .safetensors, .bin or diffusers' .msgpack for Flax) or come from sega-jax-convert."
        " Repositories on the Hugging Face hub are named owner/name; only the needed files are fetched, into the hub's"
        " cache. Single files, local or on the hub (owner/name/file), contain the weights of Stable Diffusion 1.x, 2.x"
        " or XL under their original names, as .safetensors or as a pickle such as .ckpt, whose code is never run."
        " Their vocabulary is fetched from the hub unless `tokenizer` or `config` provides it",
        sweep=True,
        default_text="the demo model, which draws cartoon portraits",
    )
    _: dataclasses.KW_ONLY
    revision: str | None = argument(
        None,
        Revision(),
        "the branch, tag or commit of a repository on the hub",
        sweep=True,
        shell=True,
        default_text="the main branch",
    )
    dtype: DTypeLike | None = argument(
        None,
        Opaque("float32, bfloat16 or float16"),
        "the dtype of the networks. Guidance and solvers always use float32. On TPUs, float32 arrays are multiplied"
        " with float32 precision, unless jax_default_matmul_precision is set",
        default_text="bfloat16 on accelerators (float16 on GPUs without bfloat16) and float32 on CPUs",
        sweep=True,
        shell=True,
        shell_help="the number format of the networks: float32, bfloat16 or float16",
    )
    variant: str | None = argument(
        None,
        Variant(),
        'the variant of the weight files to read, such as "fp16"; it does not change the dtype',
        sweep=True,
        shell=True,
        default_text="the files without a variant",
    )
    devices: Sequence[jax.Device] | Devices | None = argument(
        None,
        DevicesChoice(),
        "the devices that share the pictures",
        default_text="all devices of this host",
        shell=True,
        shell_help='how many devices share the pictures, or their numbers, as in "0,2" (and "1," for device 1 alone)',
    )
    attention: str | None = argument(
        None,
        OptionalChoice(*ATTENTIONS),
        'the attention implementation. "cudnn" needs GPUs of compute capability 8.0 or higher and half precision;'
        ' "pallas", JAX\'s flash kernel, needs TPUs and bfloat16 or float32',
        default_text='"cudnn" or "pallas" where it works, and "xla" elsewhere',
        sweep=True,
    )
    scheduler: Any = argument(
        None,
        SchedulerChoice(),
        "replaces the checkpoint's scheduler",
        shell=True,
        shell_help="the scheduler, which decides how each step removes noise: the name of a class of diffusers, such as"
        " EulerDiscreteScheduler, or a folder with its configuration",
        default_text="the checkpoint's",
    )
    safety_checker: bool | Safety | None = argument(
        True,
        CheckerChoice(),
        "load the checkpoint's safety checker, if it has one; flagged pictures are replaced with black ones. False and"
        " None skip it without reading its files. Another pipeline's `pipe.safety` replaces it",
        sweep=True,
        shell=True,
        shell_help="replace pictures that the checkpoint's safety checker flags with black ones, or do not load the"
        " safety checker",
    )
    text_encoder: Any = argument(
        None,
        NetworkChoice(),
        "replaces the checkpoint's text encoder; the checkpoint's files for it are not read. False loads no text"
        " encoder, if the family allows it; all texts must then be embeddings",
    )
    text_encoder_2: Any = argument(None, NetworkChoice(), "replaces the checkpoint's second text encoder")
    unet: Any = argument(
        None,
        NetworkChoice(),
        "replaces the checkpoint's UNet",
        shell=True,
        shell_help="another UNet: a folder, a weight file, or owner/name on the hub",
        default_text="the checkpoint's",
    )
    vae: Any = argument(
        None,
        NetworkChoice(),
        "replaces the checkpoint's autoencoder",
        shell=True,
        shell_help="another autoencoder: a folder, a weight file, or owner/name on the hub",
        default_text="the checkpoint's",
    )
    networks: Mapping[str, Any] | None = argument(
        None,
        Opaque("{folder name: network or its files}"),
        "replaces other networks of the checkpoint; the keys are folder names",
    )
    tokenizer: Any = argument(
        None,
        TokenizerChoice(),
        "replaces the checkpoint's tokenizer; SDXL needs only one, because its two tokenizers share a vocabulary",
        shell=True,
        shell_help="the folder of another tokenizer",
        default_text="the checkpoint's",
    )
    config: str | Path | None = argument(
        None,
        Location(),
        "for a single file, the folder or repository in diffusers layout that provides the configs, tokenizer and"
        " scheduler",
        default_text="the configs of Stable Diffusion 1.5, 2.1 or SDXL base",
        shell=True,
        shell_help="for a single file: the folder or repository with the configuration of its networks",
    )
    prediction_type: str | None = argument(
        None,
        OptionalChoice(*PREDICTIONS),
        "the UNet's prediction type. A Stable Diffusion 2.x single file has no config, so its default is"
        ' "v_prediction", as in diffusers; 2.0-base and 2.1-base need "epsilon"',
        default_text="the scheduler's config",
        shell=True,
        shell_help='what the UNet predicts; single files of Stable Diffusion 2.0-base and 2.1-base need "epsilon"',
    )
    ema: bool = argument(
        False,
        Flag(),
        "load the moving average of the UNet's weights from a single file",
        shell=True,
        shell_help="for a single file: load the moving average of the UNet's weights, if the file has one",
    )
    lora: str | Path | Mapping[str | Path, float] | None = argument(
        None,
        Loras(),
        "LoRAs to merge into the weights (`sega_jax.merge_lora`)",
        shell=True,
    )
    textual_inversion: str | Path | Mapping[str, str | Path] | None = argument(
        None,
        NewWords(),
        "textual-inversion words to add (`sega_jax.add_words`)",
        shell=True,
    )

    def __post_init__(self) -> None:
        check_arguments(self)

    @property
    def replaced(self) -> dict[str, Any]:
        """The replacements for the checkpoint's networks, as {name: replacement}."""
        names = ("text_encoder", "text_encoder_2", "unet", "vae")
        named = {name: getattr(self, name) for name in names}
        return {name: value for name, value in named.items() if value is not None} | dict(self.networks or {})


def check_checker(value: Any) -> None:
    """Checks the type of the option `safety_checker`.

    Raises:
        TypeError: The value is not a bool, None or a `Safety`.
    """
    if not (value is None or isinstance(value, bool | Safety)):
        shown = type(value).__name__ if callable(value) else repr(value)
        raise TypeError(
            f"safety_checker={shown} should be True (the checkpoint's own), False or None (no checker), or another"
            " pipeline's checker (pipe.safety)"
        )
