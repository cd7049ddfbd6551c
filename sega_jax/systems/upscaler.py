"""The x4 upscaler of Stable Diffusion 2.x: latents conditioned on a noisy low-resolution picture of their size."""

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
_SCALING_FACTOR = 0.08333  # of diffusers' pipeline, where the autoencoder's config names none
_MOST_NOISE = 350  # likewise, where the index names none


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UpscalerCall(ClipCall, ConditionedCall, AutoencodedCall):
    """A call of the x4 upscaler, with diffusers' defaults."""

    steps: Any = changed(DiffusionCall, "steps", 75)
    guidance_scale: Any = changed(DiffusionCall, "guidance_scale", 9.0)
    noise_level: Any = changed(ConditionedCall, "noise_level", 20)


class Models(NamedTuple):
    """The networks of a checkpoint, with or without values."""

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
        """Builds networks without values from the contents of their config.json; networks stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        if isinstance(vae, Mapping):
            vae = {"scaling_factor": _SCALING_FACTOR, **vae}
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig)
        width, net = text_encoder.config.hidden_size, unet.config
        diffusion.check_context(net, width, f"the text encoder's hidden_size {width}")
        if net.has_size_conditioning or net.adds_keys or not net.num_class_embeds:
            raise ValueError(
                f"the UNet takes no small picture, which {TITLE}'s does: num_class_embeds is"
                f" {net.num_class_embeds or None}"
            )
        latent_space.check_channels(net, vae.config, more=3)
        return cls(text_encoder, unet, vae)


TITLE = "Stable Diffusion's x4 upscaler"


def sizes(models: Models) -> Sizes:
    """Returns the sizes of a checkpoint's pictures. The low-resolution picture is as large as the latents."""
    auto = models.vae.config
    return Sizes(auto.latent_channels, auto.factor, auto.factor, None, auto.factor)


def setup(call: UpscalerCall, given: Given) -> Setup:
    """Sets a call up; see `sega_jax.systems.diffusion.setup`."""
    made = sizes(given.models)
    image, low_res = diffusion.low_res_of(call, given)
    return diffusion.setup(
        call,
        given,
        made,
        diffusion.table(call, given.scheduler),
        image=image,
        low_res=low_res,
        image_noise=call.image_noise,
        vae=given.models.vae,
        tiled=call.tiled,
    )


def extras(folder: Path, index: Mapping[str, Any], models: Models) -> Upscaling:
    """Reads how low-resolution pictures are noised; the index may bound the level.

    Raises:
        ValueError: the config is not supported.
    """
    scheduler = from_config(read_json(folder / NOISE / "scheduler_config.json"), strict=False)
    most = scheduler.options["num_train_timesteps"] - 1
    most = min(most, models.unet.config.num_class_embeds - 1, index.get("max_noise_level", _MOST_NOISE))
    return Upscaling(LowResNoise(scheduler, most))


def schedulers(extras: Upscaling) -> dict[str, Scheduler]:
    """Returns the scheduler that noises low-resolution pictures, by its folder."""
    return {NOISE: extras.low_res_noise.scheduler}


def notice(index: Mapping[str, Any]) -> str | None:
    """Warns where a checkpoint has DeepFloyd-IF's safety checker, which is not Stable Diffusion's. The upscaler has it
    as well if diffusers saved it as the last stage of that cascade."""
    if listed(index, "safety_checker") != "IFSafetyChecker":
        return None
    return (
        "has DeepFloyd-IF's safety checker, which is not supported: pictures go unchecked and without a watermark;"
        " safety_checker=False loads it without this warning"
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
