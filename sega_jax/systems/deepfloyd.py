"""The first and second stages of DeepFloyd-IF, which use pixel states, T5 and a UNet that predicts noise and variance.

The second stage's UNet also takes the first stage's picture as input (Saharia et al. 2022).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.arguments import changed
from sega_jax.method.schedules import from_config
from sega_jax.nn.config import built
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.systems import adapters, diffusion, upscaler
from sega_jax.systems.adapters import AdapterNames
from sega_jax.systems.base import Checkpoint, Given, Network, Sampler, Saved, Setup, Sizes, System, TextReader
from sega_jax.systems.clip_text import checked_states, tokenizer_folder
from sega_jax.systems.conditioning import Text, conditioning
from sega_jax.systems.diffusion_call import ConditionedCall, DiffusionCall
from sega_jax.systems.lora_kinds import LoraKind, has
from sega_jax.systems.low_res import LowResNoise, Upscaling
from sega_jax.text.files import read_json
from sega_jax.text.tokenizers import T5Tokenizer

NOISE = "image_noising_scheduler"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage1Call(DiffusionCall):
    """The arguments for calling the first stage, with diffusers' defaults."""

    steps: Any = changed(DiffusionCall, "steps", 100)
    guidance_scale: Any = changed(DiffusionCall, "guidance_scale", 7.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage2Call(ConditionedCall):
    """The arguments for calling the second stage, with diffusers' defaults."""

    steps: Any = changed(DiffusionCall, "steps", 50)
    guidance_scale: Any = changed(DiffusionCall, "guidance_scale", 4.0)
    noise_level: Any = changed(ConditionedCall, "noise_level", 250)


class Models(NamedTuple):
    """The networks of a stage. Without a text encoder, prompts must be given as embeddings."""

    text_encoder: T5EncoderModel | None
    unet: UNet2DConditionModel

    @classmethod
    def build(
        cls,
        text_encoder: Mapping[str, Any] | T5EncoderModel | None,
        unet: Mapping[str, Any] | UNet2DConditionModel,
        attention: str = "xla",
    ) -> "Models":
        """Builds networks from their configs, with shapes instead of parameters; existing networks are kept.

        Raises:
            ValueError: A config is not supported, or the networks do not fit together.
        """
        text_encoder = built(text_encoder, T5EncoderModel, T5Config)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        net = unet.config
        if not net.adds_keys or net.in_channels != (6 if net.class_embed_type else 3) or net.out_channels not in (3, 6):
            raise ValueError(
                f"a UNet with mid_block_type {net.mid_block_type}, class_embed_type {net.class_embed_type or None},"
                f" {net.in_channels} input and {net.out_channels} output channels does not belong to DeepFloyd-IF: the"
                " first stage has 3 input channels; the second stage has 6 and uses class_embed_type timestep"
            )
        if text_encoder is not None and text_encoder.config.d_model != net.text_dim:
            raise ValueError(
                f"the UNet's encoder_hid_dim {net.text_dim} is not the text encoder's d_model"
                f" {text_encoder.config.d_model}; take both from one checkpoint"
            )
        return cls(text_encoder, unet)


def build_stage(enlarges: bool, title: str) -> Callable[..., Models]:
    """Returns the `build` function of one stage, which rejects the other stage's UNet."""

    def build(text_encoder: Any, unet: Any, attention: str = "xla") -> Models:
        models = Models.build(text_encoder, unet, attention)
        if bool(models.unet.config.class_embed_type) != enlarges:
            takes = "takes no low-resolution picture" if enlarges else "takes a low-resolution picture"
            raise ValueError(f"the UNet {takes}, but {title} takes {'one' if enlarges else 'none'}; give its UNet")
        return models

    return build


@conditioning
class T5Text(Text):
    """Text conditioning for DeepFloyd-IF.

    Example:
        >>> import numpy as np
        >>> from sega_jax import T5Text
        >>> T5Text(np.zeros((2, 77, 4096), np.float32))[0]
        T5Text(states=float32[1, 77, 4096])
    """

    states: Any  # [texts, tokens, channels], including the padding, which the UNet attends to


def encode(text_encoder: T5EncoderModel, tokens: jax.Array) -> T5Text:
    """Encodes texts from their token ids and mask, int32 [texts, 2, tokens]."""
    return T5Text(text_encoder(tokens[:, 0], tokens[:, 1]))


def check(models: Models, tokenizer: T5Tokenizer | None, value: Any) -> T5Text:
    """Returns a user's text conditioning as a `T5Text` with one row.

    Raises:
        TypeError, ValueError: The value belongs to a different family or has the wrong shape.
    """
    tokens = None if tokenizer is None else tokenizer.length
    return T5Text(checked_states(value, T5Text, tokens, models.unet.config.text_dim, several=False))


def sizes(models: Models) -> Sizes:
    """Returns the picture sizes that a stage supports. Its states are pictures."""
    net = models.unet.config
    default = net.sample_size if isinstance(net.sample_size, tuple) else (net.sample_size,) * 2
    multiple = 2 ** (len(net.block_out_channels) - 1)
    return Sizes(3, 1, multiple, default, 4 if net.class_embed_type else 0)


def setup_1(call: Stage1Call, given: Given) -> Setup:
    """Sets up a call of the first stage; see `sega_jax.systems.diffusion.setup`."""
    return diffusion.setup(call, given, sizes(given.models), diffusion.table(call, given.scheduler))


def setup_2(call: Stage2Call, given: Given) -> Setup:
    """Sets up a call of the second stage; see `sega_jax.systems.diffusion.setup`."""
    image, low_res = diffusion.low_res_of(call, given)
    picture_sizes = sizes(given.models)
    return diffusion.setup(
        call,
        given,
        picture_sizes,
        diffusion.table(call, given.scheduler),
        image=image,
        low_res=low_res,
        image_noise=call.image_noise,
    )


def denoiser(unet: UNet2DConditionModel, text: T5Text, settings: Any, own: Any, x: Any) -> Any:
    """Returns a function (x, call) -> the predictions of all branches; see `sega_jax.systems.diffusion.denoiser`."""
    return diffusion.denoiser(unet, text.states, settings, own, x)


def decode(_: None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Converts pixels [rows, height, width, 3] in [-1, 1] to pictures in [0, 1].

    Returns:
        The pictures, and bool [rows]: whether each row is finite.
    """
    return jnp.clip(x / 2 + 0.5, 0, 1), jnp.isfinite(x).all((1, 2, 3))


def tokenizer(folder: Path, models: Models, override: Any) -> T5Tokenizer | None:
    """Returns the user's tokenizer, or reads one from the user's folder (by default, the stage's folder).

    If the stage has no text encoder, no files are read: the result is the user's tokenizer object, or None.

    Raises:
        TypeError, CheckpointError: The tokenizer has the wrong type or cannot be read.
    """
    if isinstance(override, T5Tokenizer):
        return override
    if models.text_encoder is None:
        return None
    return T5Tokenizer(tokenizer_folder(folder, override, "a T5 tokenizer"), models.text_encoder.config.vocab_size)


def extras_2(folder: Path, index: Mapping[str, Any], models: Models) -> Upscaling:
    """Reads the settings for adding noise to the second stage's low-resolution pictures.

    Raises:
        ValueError: The scheduler's config is not supported.
    """
    scheduler = from_config(read_json(folder / NOISE / "scheduler_config.json"), strict=False)
    return Upscaling(LowResNoise(scheduler, scheduler.options["num_train_timesteps"] - 1))


def _is_stage(index: Mapping[str, Any]) -> bool:
    return str(index.get("_class_name")).startswith("IF") and "vae" not in index


# The entries in model_index.json for a stage without DeepFloyd-IF's safety checker and watermark.
UNCHECKED: dict[str, Any] = {
    **{part: [None, None] for part in ("safety_checker", "feature_extractor", "watermarker")},
    "requires_safety_checker": False,
}
TITLE_1, TITLE_2 = "DeepFloyd-IF's first stage", "DeepFloyd-IF's second stage"
_CHECKPOINT = Checkpoint(
    recognise=lambda index: _is_stage(index) and NOISE not in index,
    models=Models,
    networks={
        "text_encoder": Network(T5EncoderModel, T5Config, "model", optional=True, options=T5Config.fixed),
        "unet": Network(UNet2DConditionModel, UNetConfig, options=UNetConfig.fixed),
    },
    build=build_stage(False, TITLE_1),
    tokenizer=tokenizer,
    notice=upscaler.notice,
    saved=Saved("IFPipeline", entries=lambda extras: UNCHECKED),
    adapters=AdapterNames(
        {"text_encoder": adapters.TEXT_WITHOUT_FORMER, "unet": adapters.UNET_WITHOUT_ORIGINAL},
        kinds=(LoraKind("DeepFloyd-IF", has(r"attentions_\d+_add_[kv]_proj")),),
    ),
)
_READER = TextReader(
    type=T5Text, parts=("text_encoder",), networks=lambda models: models.text_encoder, encode=encode, check=check
)
_SAMPLER = Sampler(
    sizes=sizes,
    networks=lambda models: models.unet,
    table=diffusion.table,
    static=diffusion.static,
    setup=setup_1,
    initial=diffusion.initial,
    denoiser=denoiser,
    solver=diffusion.solver,
    draw=diffusion.draw,
    check=diffusion.check,
    defaults=diffusion.defaults,
    decoder=lambda models: None,
    decode=decode,
)

STAGE_2 = System(
    name="deepfloyd_stage_2",
    title=TITLE_2,
    checkpoint=_CHECKPOINT._replace(
        recognise=lambda index: _is_stage(index) and NOISE in index,
        build=build_stage(True, TITLE_2),
        schedulers=("scheduler", NOISE),
        extras=extras_2,
        extras_type=Upscaling,
        saved=Saved(
            "IFSuperResolutionPipeline",
            entries=lambda extras: UNCHECKED,
            schedulers=lambda extras: {NOISE: extras.low_res_noise.scheduler},
        ),
    ),
    text=_READER,
    sampler=_SAMPLER._replace(setup=setup_2),
    call=Stage2Call,
)
STAGE_1 = System(
    name="deepfloyd_stage_1",
    title=TITLE_1,
    checkpoint=_CHECKPOINT,
    text=_READER,
    sampler=_SAMPLER,
    call=Stage1Call,
    stages={"stage2": STAGE_2, "upscaler": upscaler.SYSTEM},
)
