"""Stable Diffusion 2.x's x4 upscaler, whose latents have the same size as the noisy low-resolution picture."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.method.arguments import changed
from sega_jax.method.schedules import Scheduler, from_config
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.nn.config import built
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems import clip_text, diffusion, latent_space
from sega_jax.systems.base import Checkpoint, Given, Saved, Setup, Sizes, System, listed
from sega_jax.systems.clip_text import ClipCall
from sega_jax.systems.diffusion_call import AutoencodedCall, ConditionedCall, DiffusionCall
from sega_jax.systems.low_res import LowResNoise, Upscaling
from sega_jax.systems.stable_diffusion import ADAPTERS, NETWORKS, SAMPLER
from sega_jax.text.files import read_json

NOISE = "low_res_scheduler"
# diffusers' defaults for autoencoder configs without scaling_factor and for model_index.json without max_noise_level.
_SCALING_FACTOR = 0.08333
_MAX_NOISE_LEVEL = 350


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UpscalerCall(ClipCall, ConditionedCall, AutoencodedCall):
    """The arguments for calling the x4 upscaler, with diffusers' defaults."""

    steps: Any = changed(DiffusionCall, "steps", 75)
    guidance_scale: Any = changed(DiffusionCall, "guidance_scale", 9.0)
    noise_level: Any = changed(ConditionedCall, "noise_level", 20)


class Models(NamedTuple):
    """The networks of a checkpoint."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    @classmethod
    def build(
        cls,
        text_encoder: Mapping[str, Any] | CLIPTextModel,
        unet: Mapping[str, Any] | UNet2DConditionModel,
        vae: Mapping[str, Any] | AutoencoderKL,
        attention: str = "xla",
    ) -> "Models":
        """Builds networks from their configs, with shapes instead of parameters; existing networks are kept.

        Raises:
            ValueError: A config is not supported, or the networks do not fit together.
        """
        if isinstance(vae, Mapping):
            vae = {"scaling_factor": _SCALING_FACTOR, **vae}
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig, attention)
        width, net = text_encoder.config.hidden_size, unet.config
        diffusion.check_context(net, width, f"the text encoder's hidden_size {width}")
        if net.has_size_conditioning or net.adds_keys or not net.num_class_embeds:
            raise ValueError(
                f"the UNet takes no low-resolution picture, but {TITLE} needs one: num_class_embeds is"
                f" {net.num_class_embeds or None}; give the upscaler's UNet"
            )
        latent_space.check_channels(net, vae.config, more=3)
        return cls(text_encoder, unet, vae)


TITLE = "Stable Diffusion's x4 upscaler"


def sizes(models: Models) -> Sizes:
    """Returns the picture sizes that a checkpoint supports.

    The low-resolution picture has the same size as the latents.
    """
    auto = models.vae.config
    return Sizes(auto.latent_channels, auto.factor, auto.factor, None, auto.factor)


def setup(call: UpscalerCall, given: Given) -> Setup:
    """Sets up a call; see `sega_jax.systems.diffusion.setup`."""
    picture_sizes = sizes(given.models)
    image, low_res = diffusion.low_res_of(call, given)
    return diffusion.setup(
        call,
        given,
        picture_sizes,
        diffusion.table(call, given.scheduler),
        image=image,
        low_res=low_res,
        image_noise=call.image_noise,
        vae=given.models.vae,
        tiled=call.tiled,
    )


def extras(folder: Path, index: Mapping[str, Any], models: Models) -> Upscaling:
    """Reads the settings for adding noise to low-resolution pictures; model_index.json may limit the noise level.

    Raises:
        ValueError: The scheduler's config is not supported.
    """
    scheduler = from_config(read_json(folder / NOISE / "scheduler_config.json"), strict=False)
    max_level = scheduler.options["num_train_timesteps"] - 1
    max_level = min(max_level, models.unet.config.num_class_embeds - 1, index.get("max_noise_level", _MAX_NOISE_LEVEL))
    return Upscaling(LowResNoise(scheduler, max_level))


def schedulers(extras: Upscaling) -> dict[str, Scheduler]:
    """Returns {folder: scheduler} for the scheduler that adds noise to low-resolution pictures."""
    return {NOISE: extras.low_res_noise.scheduler}


def notice(index: Mapping[str, Any]) -> str | None:
    """Returns a warning if a checkpoint has DeepFloyd-IF's safety checker, which differs from Stable Diffusion's.

    diffusers saves an upscaler with this checker if it is the last stage of DeepFloyd-IF's cascade.
    """
    if listed(index, "safety_checker") != "IFSafetyChecker":
        return None
    return (
        "has DeepFloyd-IF's safety checker, which is not supported: pictures are neither checked nor watermarked;"
        " give safety_checker=False to load it without this warning"
    )


SYSTEM = System(
    name="x4_upscaler",
    title=TITLE,
    checkpoint=Checkpoint(
        recognise=lambda index: NOISE in index,
        models=Models,
        networks=NETWORKS,
        build=Models.build,
        tokenizer=clip_text.tokenizer,
        schedulers=("scheduler", NOISE),
        extras=extras,
        extras_type=Upscaling,
        notice=notice,
        saved=Saved(
            "StableDiffusionUpscalePipeline",
            entries=lambda extras: {"max_noise_level": extras.low_res_noise.max_level},
            schedulers=schedulers,
        ),
        adapters=ADAPTERS._replace(kinds=()),
    ),
    text=clip_text.READER,
    sampler=SAMPLER._replace(
        sizes=sizes,
        table=diffusion.table,
        setup=setup,
        encoder=lambda models: None,
        encode_image=None,
    ),
    call=UpscalerCall,
)
