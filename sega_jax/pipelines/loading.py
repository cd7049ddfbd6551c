"""`load`: a checkpoint to a `Pipeline`."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method import schedules
from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.safety import SafetyCheckerConfig, StableDiffusionSafetyChecker
from sega_jax.nn.t5 import T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines import sources
from sega_jax.pipelines.components import as_module, as_scheduler, checked_scheduler
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import Embeddings
from sega_jax.pipelines.images import Noising
from sega_jax.pipelines.paella import PaellaPipeline
from sega_jax.pipelines.pipeline import Models, Pipeline
from sega_jax.pipelines.safety import FeatureExtractor, Safety
from sega_jax.systems import deepfloyd, paella
from sega_jax.systems.registry import CHECKER, PAELLA, UPSCALER, XL, Kind, entry, has_other_checker, kind_of, optional
from sega_jax.text.tokenizers import T5Tokenizer, Tokenizer, TokenizerPair
from sega_jax.weights.lora import merged
from sega_jax.weights.lora import read as read_lora
from sega_jax.weights.pull import CheckpointError, Weights, fill, read_json
from sega_jax.weights.textual_inversion import added
from sega_jax.weights.textual_inversion import read as read_words

PREDICTIONS = ("epsilon", "v_prediction")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# The model that comes along.
DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"


def load(
    source: str | Path = DEMO,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | Devices | None = None,
    attention: str | None = None,
    scheduler: Any = None,
    safety_checker: bool | Safety | None = True,
    text_encoder: CLIPTextModel | T5EncoderModel | bool | None = None,
    text_encoder_2: CLIPTextModelWithProjection | None = None,
    unet: UNet2DConditionModel | None = None,
    vae: AutoencoderKL | None = None,
    tokenizer: Tokenizer | TokenizerPair | T5Tokenizer | str | Path | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
    lora: str | Path | Mapping[str | Path, float] | None = None,
    textual_inversion: str | Path | Mapping[str, str | Path] | None = None,
) -> Pipeline | PaellaPipeline:
    """Loads a checkpoint of Stable Diffusion, also XL, of its x4 upscaler, or of a stage of DeepFloyd-IF, in diffusers
    layout with safetensors weights or as `sega-jax-convert` made it of one; Stable Diffusion 1.x, 2.x or XL in a single
    file; or Paella as `sega-jax-convert` made it.

    DeepFloyd-IF's safety checker, which is another than Stable Diffusion's, and its watermark are not of this library:
    its pictures are neither checked nor marked, and a warning says so.

    Args:
        source: a folder, which holds `model_index.json`; or "owner/name" on the Hugging Face hub, of which the
            files that are needed are fetched into the hub's cache, after a look at the index. By default the demo
            model that comes along, of cartoon portraits of 128x128 pixels (`sega_jax.demo`). Or a single file
            (.safetensors, or .ckpt, of which nothing is run) with the names of the original repositories, as
            model-sharing sites have them: what it is shows in its names and shapes, and `tokenizer` or `config` has
            the vocabulary, which it does not hold.
        revision: a branch, tag or commit on the hub.
        dtype: of the networks, float32, bfloat16 or float16; None is bfloat16 on accelerators (float16 on
            GPUs older than that) and float32 on the CPU. Guidance and solver are in float32 whatever it is.
        variant: "fp16" reads the files that are named so; the dtype is `dtype` all the same.
        devices: to spread pictures over; None is all of this host. `pipe.devices` of another pipeline shares its
            compiled programs, too, where the networks are of the same shapes.
        attention: "xla"; "cudnn" for GPUs from compute capability 8.0 on in half precision; or "pallas", JAX's flash
            kernel for TPUs, in bfloat16 or float32. None is "cudnn" where that can be, else "xla".
        scheduler: in place of the checkpoint's: a class name of diffusers', a config, or a folder with one. Paella has
            none.
        safety_checker: whether to load the one that the checkpoint may have, which makes pictures black that it
            flags; with False or None its files are not read. `pipe.safety` of another pipeline is taken as it is.
            True means nothing for DeepFloyd-IF, but a warning where the checkpoint has one.
        text_encoder, text_encoder_2, unet, vae: of another pipeline (`pipe.models.unet`), in place of the checkpoint's,
            whose files are then not read. `text_encoder=False` does without DeepFloyd-IF's, which is larger than the
            rest: prompts are then embeddings.
        tokenizer: another pipeline's; or its folder, such as `tokenizer` of any checkpoint of Stable Diffusion 1.x. XL
            has two of the same vocabulary, which pad with the end and with the first token: one is enough.
        config: of a single file, a folder in diffusers layout whose configs, tokenizer and scheduler it has; weights
            are not looked for there. None is as published: Stable Diffusion 1.5, 2.1, or XL's base.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction"; None is what the scheduler's config
            says. Files of Stable Diffusion 2.x do not show it: None is v there, as in diffusers, and "epsilon" is
            for 2.0-base and 2.1-base.
        ema: whether to take the UNet's moving average where a single file has that, too; by default, as in diffusers,
            the last step's weights.
        lora: of Stable Diffusion, a LoRA's safetensors file to merge into the weights, or several with their scales,
            {"style.safetensors": 0.8}; see `merge_lora`.
        textual_inversion: of Stable Diffusion, {word: file} of words to add, {"<cat-toy>": "cat.safetensors"}, or a
            file that names its word; see `add_words`.

    Raises:
        FileNotFoundError: no such folder or file.
        TypeError: the source is no path, the devices are none, or a component is something else.
        CheckpointError: the source is no checkpoint or cannot be fetched, or a file is missing, broken or does not
            fit.
        ValueError: an unknown dtype or attention, a config that is not supported, or a new word that the tokenizer has.
    """
    given = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet, "vae": vae}
    given = {part: value for part, value in given.items() if value is not None}
    check_checker(safety_checker)
    if not (tokenizer is None or isinstance(tokenizer, Tokenizer | TokenizerPair | T5Tokenizer | str | os.PathLike)):
        raise TypeError(f"tokenizer={tokenizer!r} should be another pipeline's (pipe.tokenizer), or a folder")
    if prediction_type not in (None, *PREDICTIONS):
        raise ValueError(f"prediction_type={prediction_type!r} should be one of {', '.join(PREDICTIONS)}, or None")
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = pick_dtype(dtype, where)
    attention = pick_attention(attention, dtype, where)
    scheduler = checked_scheduler(scheduler)
    checkpoint = sources.find(source, revision, config, prediction_type)
    given = _given(given, checkpoint.kind)
    if checkpoint.kind is PAELLA:
        choices = {"scheduler": scheduler, "tokenizer": tokenizer, "prediction_type": prediction_type}
        for name, value in choices.items():
            if value is not None:
                raise ValueError(f"{name} is given, of which Paella has no choice; leave it out")
    without = [*given, *([] if safety_checker is True else [CHECKER])]
    reads = tokenizer is None and text_encoder is not False
    folder = checkpoint.fetch(variant, without=without if reads else [*without, "tokenizer"])
    checkpoint.check(variant, ema=ema, reads=tokenizer is None)

    found = describe(folder, attention, scheduler, tokenizer, safety_checker, given)
    if prediction_type is not None:
        found = found._replace(scheduler=predicting(found.scheduler, prediction_type))
    if safety_checker is True and has_other_checker(folder):
        warnings.warn(
            f"{folder} has DeepFloyd-IF's safety checker, which is not supported: pictures go unchecked and without a"
            " watermark; safety_checker=False is loading without this warning",
            stacklevel=2,
        )
    changes = [] if lora is None else read_lora(found.models, lora)
    words = [] if textual_inversion is None else read_words(found.models, found.tokenizer, textual_inversion)
    networks = dict.fromkeys(found.models._fields)
    for part, module in found.networks.items():
        if part in given or (part == CHECKER and found.safety is safety_checker):
            networks[part] = where.place(module)
        else:
            weights = checkpoint.weights(part, module, variant, ema=ema)
            networks[part] = filled(weights, module, dtype, where)
    safety = found.safety and found.safety._replace(checker=networks.pop(CHECKER))
    models, tokenizer = added(merged(type(found.models)(**networks), changes), found.tokenizer, words)
    if isinstance(models, paella.Models):
        return PaellaPipeline(models, tokenizer, where)
    return Pipeline(models, tokenizer, found.scheduler, where, safety, found.noising, found.zeros)


def load_text(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | Devices | None = None,
) -> Callable[[Sequence[str]], np.ndarray]:
    """The text encoder alone of a DeepFloyd-IF stage: a function of words to embeddings [texts, tokens, channels].

    Args:
        source, dtype, variant, devices: as of `load`.

    Raises:
        As `load`; and CheckpointError: the checkpoint is of another kind, or has no text encoder.
    """
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = pick_dtype(dtype, where)
    checkpoint = sources.find(source)
    check_reads(checkpoint)
    folder = checkpoint.fetch(variant, without=["unet", CHECKER])
    found = describe(folder, safety_checker=False)
    encoder = found.models.text_encoder
    network = filled(checkpoint.weights("text_encoder", encoder, variant), encoder, dtype, where)
    return partial(Embeddings(deepfloyd.encode, where), network, found.tokenizer)


def check_checker(value: Any) -> None:
    """Whether `load` can be given this as its safety_checker.

    Raises:
        TypeError: it cannot.
    """
    if not (value is None or isinstance(value, bool | Safety)):
        what = type(value).__name__ if callable(value) else repr(value)
        raise TypeError(f"safety_checker={what} should be True for the checkpoint's own, or False or None")


def check_reads(source: sources.Source) -> None:
    """Whether a checkpoint has the text encoder of DeepFloyd-IF.

    Raises:
        CheckpointError: it has not.
    """
    if source.kind.models is not deepfloyd.Models or "text_encoder" not in source.parts:
        raise CheckpointError(
            f"{source.name} has no text encoder of DeepFloyd-IF; name a checkpoint with one, as the first stage's are"
        )


def filled(weights: Weights, module: Any, dtype: DTypeLike, where: Devices) -> Any:
    """The network with its weights on the devices; they are closed.

    Raises:
        CheckpointError: they are broken or do not fit.
    """
    with weights:
        return fill(module, weights, dtype, where.place)


def predicting(scheduler: schedules.Scheduler, prediction_type: str) -> schedules.Scheduler:
    """The scheduler for another prediction."""
    return schedules.from_config(scheduler.config | {"prediction_type": prediction_type}, strict=False)


def _given(given: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Networks in place of the checkpoint's, None for none.

    Raises:
        TypeError, ValueError: something else, or a network that a checkpoint of this kind does not have.
    """
    found = {}
    for part, value in given.items():
        if part not in kind.parts:
            raise ValueError(f"{part} is given, which {kind.name} does not have")
        if value is False and part in optional(kind):
            found[part] = None
        else:
            found[part] = as_module(part, value, kind.parts[part])
    return found


class Description(NamedTuple):
    """What a checkpoint's folder holds beside the weights; the networks are without values."""

    models: Models | paella.Models
    tokenizer: Tokenizer | TokenizerPair | T5Tokenizer | None
    scheduler: schedules.Scheduler | None
    safety: Safety | None
    noising: Noising | None
    zeros: bool = False

    @property
    def networks(self) -> dict[str, Any]:
        """All networks that are there, by the names of their folders."""
        checker = None if self.safety is None else self.safety.checker
        return {part: module for part, module in {**self.models._asdict(), CHECKER: checker}.items() if module}


def describe(
    folder: Path,
    attention: str = "xla",
    scheduler: Any = None,
    tokenizer: Tokenizer | TokenizerPair | T5Tokenizer | None = None,
    safety_checker: bool | Safety | None = True,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> Description:
    """Reads the configs of a checkpoint; what is given in place of a part of it, as to `load`, is taken as it is.

    Raises:
        CheckpointError: a file is missing, broken, or describes what is not supported.
        TypeError, ValueError: a scheduler is given and is none.
    """
    kind, index = kind_of(folder), read_json(folder / "model_index.json")
    given = {part: None for part in optional(kind) if entry(index, part) is None} | dict(given)
    configs = {part: given[part] if part in given else read_json(folder / part / "config.json") for part in kind.parts}
    if kind is PAELLA:
        return _describe_paella(folder, configs, attention)
    if kind is UPSCALER and isinstance(configs["vae"], Mapping):
        # That of diffusers' pipeline, where none is named.
        configs["vae"] = {"scaling_factor": 0.08333, **configs["vae"]}
    config = folder / "scheduler" / "scheduler_config.json"
    if scheduler is not None:
        scheduler = as_scheduler(scheduler, read_json(config) if config.is_file() else None)
    try:
        scheduler = scheduler or schedules.from_config(read_json(config))
        models = kind.models.build(**configs, attention=attention)
        if bool(models.sizes.enlarges) != bool(kind.noising):
            takes = "takes a small picture" if models.sizes.enlarges else "takes no small picture"
            raise ValueError(f"the UNet {takes}, which {kind.name}'s does{'' if kind.noising else ' not'}")
        noising = kind.noising and _noising(folder / kind.noising, index, models)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if kind is XL:
        tokenizer = _pair(folder, tokenizer, models)
    elif not isinstance(tokenizer, Tokenizer | T5Tokenizer):
        tokenizer = _tokenizer(Path(os.path.expanduser(tokenizer or folder / "tokenizer")), models.text_encoder)
    if not isinstance(safety_checker, Safety):
        safety_checker = _safety(folder) if safety_checker and not has_other_checker(folder) else None
    zeros = kind is XL and index.get("force_zeros_for_empty_prompt", True) is not False
    return Description(models, tokenizer, scheduler, safety_checker, noising, zeros)


def _pair(folder: Path, given: Any, models: Models) -> TokenizerPair:
    """The tokenizers of Stable Diffusion XL: of one vocabulary, whose padding differs."""
    if isinstance(given, TokenizerPair):
        return given
    if isinstance(given, T5Tokenizer):
        raise TypeError("tokenizer=T5Tokenizer should be CLIP's, or another pipeline's of Stable Diffusion XL")
    if given is not None and not isinstance(given, Tokenizer):
        given = _tokenizer(Path(os.path.expanduser(given)), models.text_encoder)
    if given is not None:
        return given.pair()
    first = _tokenizer(folder / "tokenizer", models.text_encoder)
    return TokenizerPair(first, _tokenizer(folder / "tokenizer_2", models.text_encoder_2))


def _tokenizer(
    folder: Path, network: CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel | None
) -> Tokenizer | T5Tokenizer | None:
    """The tokenizer of a text encoder, None without one."""
    if network is None:
        return None
    if isinstance(network, T5EncoderModel):
        return T5Tokenizer(folder, network.config.vocab_size)
    return Tokenizer(folder, network.config.max_position_embeddings, network.config.vocab_size)


def _describe_paella(folder: Path, configs: Mapping[str, Any], attention: str) -> Description:
    try:
        models = paella.Models.build(**configs, attention=attention)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    tokenizer = None
    if models.clip is not None:
        text = models.clip.config
        tokenizer = Tokenizer(folder / "tokenizer", text.max_position_embeddings, text.vocab_size)
    return Description(models, tokenizer, None, None, None)


def _noising(folder: Path, index: Mapping[str, Any], models: Models) -> Noising:
    """How an upscaler's small pictures are noised; the x4 upscaler's index may bound it."""
    scheduler = schedules.from_config(read_json(folder / "scheduler_config.json"), strict=False)
    most = scheduler.options["num_train_timesteps"] - 1
    if count := models.unet.config.num_class_embeds:
        most = min(most, count - 1, index.get("max_noise_level", 350))
    return Noising(scheduler, most)


def _safety(folder: Path) -> Safety | None:
    """The safety checker without values, and its preprocessing; None where the checkpoint has none."""
    name, part = entry(read_json(folder / "model_index.json"), CHECKER), folder / CHECKER
    if name is None:
        return None
    if not part.is_dir():
        warnings.warn(f"{folder} names a safety checker that it does not have: pictures go unchecked", stacklevel=3)
        return None
    try:
        if name != StableDiffusionSafetyChecker.__name__:
            raise ValueError(f"it is {name}, expected {StableDiffusionSafetyChecker.__name__}")
        config = SafetyCheckerConfig.from_dict(read_json(part / "config.json"))
        extractor = FeatureExtractor(folder / "feature_extractor", config.vision_config.image_size)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} has a safety checker that cannot be used; safety_checker=False leaves it out: {error}"
        ) from None
    return Safety(extractor, StableDiffusionSafetyChecker(config))


def pick_dtype(dtype: DTypeLike | None, where: Devices) -> np.dtype:
    """A dtype of networks, or in place of None that of the devices; ValueError for others."""
    if dtype is None:
        platform = where.devices[0].platform
        old = platform == "gpu" and not all(map(_is_ampere, where.devices))
        return np.dtype("float32" if platform == "cpu" else "float16" if old else jnp.bfloat16)
    if str(dtype).startswith("torch."):
        dtype = str(dtype).removeprefix("torch.")
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


def pick_attention(attention: str | None, dtype: np.dtype, where: Devices) -> str:
    if attention not in (None, "xla", "cudnn", "pallas"):
        raise ValueError(f"attention={attention!r} should be 'xla', 'cudnn', 'pallas' or None")
    able = dtype.name in ("bfloat16", "float16") and all(map(_is_ampere, where.devices))
    if attention == "cudnn" and not able:
        raise ValueError(
            "attention='cudnn' needs GPUs of compute capability 8.0 or more and dtype bfloat16 or float16,"
            f" got {where.devices[0].device_kind} and {dtype.name}"
        )
    of_tpus = dtype.name in ("bfloat16", "float32") and all(device.platform == "tpu" for device in where.devices)
    if attention == "pallas" and not of_tpus:
        raise ValueError(
            "attention='pallas' needs TPUs and dtype bfloat16 or float32,"
            f" got {where.devices[0].device_kind} and {dtype.name}"
        )
    return attention or ("cudnn" if able else "xla")
