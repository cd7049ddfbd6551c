"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), with latents, a CLIP text encoder and a UNet."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.nn.config import built
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems import adapters, clip_text, diffusion, latent_space
from sega_jax.systems.adapters import AdapterNames
from sega_jax.systems.base import Checkpoint, Given, Network, Sampler, Saved, Setup, Sizes, System
from sega_jax.systems.clip_text import ClipCall
from sega_jax.systems.diffusion_call import StartingCall
from sega_jax.systems.lora_kinds import LoraKind, any_of, attends_to, has
from sega_jax.systems.original_files import STABLE_DIFFUSION_FILE
from sega_jax.weights.textual_inversion import TextEncoders

NETWORKS = {
    "text_encoder": Network(
        CLIPTextModel,
        CLIPTextConfig,
        "model",
        also=clip_text.CLIP_CLASSES,
        options=clip_text.options,
        published=CLIPTextModel.published,
    ),
    "unet": Network(UNet2DConditionModel, UNetConfig, options=UNetConfig.fixed),
    "vae": Network(AutoencoderKL, AutoencoderConfig),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusionCall(ClipCall, StartingCall):
    """The arguments for calling Stable Diffusion 1.x or 2.x."""


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
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig, attention)
        width, net = text_encoder.config.hidden_size, unet.config
        diffusion.check_context(net, width, f"the text encoder's hidden_size {width}")
        latent_space.check_channels(net, vae.config)
        if net.has_size_conditioning:
            raise ValueError(
                "the UNet has addition_embed_type text_time, like Stable Diffusion XL's, but the other networks belong"
                " to Stable Diffusion 1.x or 2.x; take all networks from one checkpoint"
            )
        if net.adds_keys or net.num_class_embeds:
            raise ValueError(
                f"the UNet has mid_block_type {net.mid_block_type} and num_class_embeds {net.num_class_embeds or None},"
                " like DeepFloyd-IF's or an upscaler's; a checkpoint with text_encoder, unet and vae must be a"
                " Stable Diffusion text-to-image model"
            )
        return cls(text_encoder, unet, vae)


def sizes(models: Models) -> Sizes:
    """Returns the picture sizes that a checkpoint supports."""
    return latent_space.latent_sizes(models.unet.config, models.vae.config)


def setup(call: StableDiffusionCall, given: Given) -> Setup:
    """Sets up a call; see `sega_jax.systems.diffusion.setup`."""
    return diffusion.setup(
        call,
        given,
        sizes(given.models),
        diffusion.table_from_picture(call, given.scheduler),
        image=call.image,
        image_noise=call.image_noise,
        vae=given.models.vae,
        tiled=call.tiled,
    )


def denoiser(unet: UNet2DConditionModel, text: Any, settings: Any, own: Any, x: Any) -> Any:
    """Returns a function (x, call) -> the predictions of all branches; see `sega_jax.systems.diffusion.denoiser`."""
    return diffusion.denoiser(unet, text.states, settings, own, x)


def recognise(index: Mapping[str, Any]) -> bool:
    """Returns True: this family is the fallback, and its errors name the parts that other checkpoints lack."""
    return True


# LoRA names for the text encoder's layers, in families with one text encoder.
_ONLY_TEXT = r"^lora_te_.*(self_attn_[qkv]_proj|mlp_fc1)$"
ADAPTERS = AdapterNames(
    {"text_encoder": adapters.TEXT, "unet": adapters.UNET},
    TextEncoders("Stable Diffusion 1.x or 2.x", {"clip_l": "text_encoder"}, "768 or 1024"),
    (
        LoraKind("Stable Diffusion 1.x", any_of(attends_to(768), has(_ONLY_TEXT, 768))),
        LoraKind("Stable Diffusion 2.x", any_of(attends_to(1024), has(_ONLY_TEXT, 1024))),
    ),
)

SAMPLER = Sampler(
    sizes=sizes,
    networks=lambda models: models.unet,
    table=diffusion.table_from_picture,
    static=diffusion.static,
    setup=setup,
    initial=diffusion.initial,
    denoiser=denoiser,
    solver=diffusion.solver,
    draw=diffusion.draw,
    check=diffusion.check,
    defaults=diffusion.defaults,
    decoder=lambda models: models.vae,
    decode=latent_space.decode_latents,
    encoder=lambda models: models.vae,
    encode_image=latent_space.encode_image,
)

SYSTEM = System(
    name="stable_diffusion",
    title="Stable Diffusion 1.x or 2.x",
    checkpoint=Checkpoint(
        recognise,
        Models,
        NETWORKS,
        Models.build,
        clip_text.tokenizer,
        single_file=STABLE_DIFFUSION_FILE,
        adapters=ADAPTERS,
        saved=Saved("StableDiffusionPipeline", entries=lambda extras: {"image_encoder": [None, None]}),
        unchecked={
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
    ),
    text=clip_text.READER,
    sampler=SAMPLER,
    call=StableDiffusionCall,
)
