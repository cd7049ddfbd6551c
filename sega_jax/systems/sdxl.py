"""Stable Diffusion XL (Podell et al. 2023), with latents, two CLIP text encoders and a UNet with size conditioning."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.argument_kinds import Integer, Pair
from sega_jax.method.arguments import argument, changed
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.config import built
from sega_jax.nn.unet import Context, UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems import adapters, clip_text, diffusion, latent_space, sdxl_text
from sega_jax.systems.adapters import AdapterNames
from sega_jax.systems.base import Checkpoint, Given, Network, Saved, Setup, System, listed
from sega_jax.systems.call import MAX_PIXELS
from sega_jax.systems.clip_text import ClipCall, tokenizer_folder
from sega_jax.systems.diffusion_call import DiffusionCall, StartingCall
from sega_jax.systems.lora_kinds import LoraKind, any_of, attends_to, has
from sega_jax.systems.original_files import SDXL_FILE
from sega_jax.systems.sdxl_text import SDXLText
from sega_jax.systems.sizes import size_conditioning
from sega_jax.systems.stable_diffusion import NETWORKS
from sega_jax.systems.stable_diffusion import SAMPLER as STABLE_DIFFUSION
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights.textual_inversion import TextEncoders

_SIZE = Pair(Integer(1, MAX_PIXELS), "two whole numbers, or two for each picture")
_CORNER = Pair(Integer(0, MAX_PIXELS), "two whole numbers, or two for each picture")
# A pattern for layer names that occur only in this family's LoRAs.
_OWN_LAYERS = r"^(lora_te2|text_encoder_2|(text_encoders_)?clip_g)_|blocks?_.*_transformer_blocks_[1-9]_|add_embedding"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLCall(ClipCall, StartingCall):
    """The arguments for calling Stable Diffusion XL, with diffusers' defaults.

    Without a negative prompt, the unconditional text is all zeros, or the encoded empty text if
    `force_zeros_for_empty_prompt` is false in model_index.json.
    """

    guidance_scale: Any = changed(DiffusionCall, "guidance_scale", 5.0)
    original_size: Any = argument(
        None,
        _SIZE,
        "size conditioning: the height and width of the picture before it was resized and cropped",
        default_text="the size of the result",
        unit="pixels",
        varies="row",
        sweep=True,
        shell=True,
    )
    crops_top_left: Any = argument(
        None,
        _CORNER,
        "size conditioning: the top and left edges of the crop",
        default_text="0,0",
        unit="pixels",
        varies="row",
        sweep=True,
        shell=True,
    )
    target_size: Any = argument(
        None,
        _SIZE,
        "size conditioning: the height and width of the cropped picture",
        default_text="the size of the result",
        unit="pixels",
        varies="row",
        sweep=True,
        shell=True,
    )


class Models(NamedTuple):
    """The networks of a checkpoint."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    @classmethod
    def build(
        cls,
        text_encoder: Mapping[str, Any] | CLIPTextModel,
        text_encoder_2: Mapping[str, Any] | CLIPTextModelWithProjection,
        unet: Mapping[str, Any] | UNet2DConditionModel,
        vae: Mapping[str, Any] | AutoencoderKL,
        attention: str = "xla",
    ) -> "Models":
        """Builds networks from their configs, with shapes instead of parameters; existing networks are kept.

        Raises:
            ValueError: A config is not supported, or the networks do not fit together.
        """
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        text_encoder_2 = built(text_encoder_2, CLIPTextModelWithProjection, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig, attention)
        one, two, net = text_encoder.config, text_encoder_2.config, unet.config
        if not net.has_size_conditioning or net.adds_keys or net.num_class_embeds:
            raise ValueError(
                f"the UNet has addition_embed_type {net.addition_embed_type or None} and num_class_embeds"
                f" {net.num_class_embeds or None}, but Stable Diffusion XL's UNet has addition_embed_type text_time"
            )
        channels = one.hidden_size + two.hidden_size
        diffusion.check_context(
            net, channels, f"the sum of the text encoders' hidden sizes, {one.hidden_size} + {two.hidden_size}"
        )
        if net.pooled_dim != two.projection_dim or net.pooled_dim > channels:
            raise ValueError(
                f"the UNet takes a pooled text of {net.pooled_dim} channels (projection_class_embeddings_input_dim"
                " minus 6 * addition_time_embed_dim), but the second text encoder's projection_dim is"
                f" {two.projection_dim}: only the base model's layout is supported, not the refiner's"
            )
        if one.max_position_embeddings != two.max_position_embeddings:
            raise ValueError(
                f"the text encoders read {one.max_position_embeddings} and {two.max_position_embeddings} tokens; take"
                " both from one checkpoint"
            )
        latent_space.check_channels(net, vae.config)
        return cls(text_encoder, text_encoder_2, unet, vae)


class Extras(NamedTuple):
    """The settings of a checkpoint that are not part of a network."""

    zero_negative: bool = True  # whether a missing negative prompt means all zeros instead of the encoded empty text


def setup(call: SDXLCall, given: Given) -> Setup:
    """Sets up a call; see `sega_jax.systems.diffusion.setup`."""

    def conditioning(size):
        names = ("original_size", "crops_top_left", "target_size")
        spread = (_spread(name, getattr(call, name), given) for name in names)
        return size_conditioning(size, given.rows, *spread).astype(given.dtype)

    return diffusion.setup(
        call,
        given,
        latent_space.latent_sizes(given.models.unet.config, given.models.vae.config),
        diffusion.table_from_picture(call, given.scheduler),
        image=call.image,
        image_noise=call.image_noise,
        size_conditioning=conditioning,
        vae=given.models.vae,
        tiled=call.tiled,
    )


def _spread(name: str, value: Any, given: Given) -> Any:
    return given.spread(name, value) if isinstance(value, list) else value


def denoiser(unet: UNet2DConditionModel, text: SDXLText, settings: Any, own: Any, x: Any) -> Any:
    """Returns a function (x, call) -> the predictions of all branches.

    The branches of a row share its size conditioning.
    """
    sizes = jnp.asarray(settings.own.size_conditioning)[:, None]
    sizes = jnp.broadcast_to(sizes, (*text.pooled.shape[:2], 6))
    return diffusion.denoiser(unet, Context(text.states, text.pooled, sizes), settings, own, x)


def decode(vae: AutoencoderKL, latents: jax.Array, *, tile: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Decodes latents as `sega_jax.systems.latent_space.decode_latents` does.

    As in diffusers, float16 weights are converted to float32 if `force_upcast` is set in the config, because
    activations would otherwise overflow.
    """
    return latent_space.decode_latents(_upcast(vae), latents, tile=tile)


def encode_image(vae: AutoencoderKL, key: jax.Array, pictures: jax.Array, noise: Any = None) -> jax.Array:
    """Encodes pictures as `sega_jax.systems.latent_space.encode_image` does, in the dtype that `decode` uses."""
    return latent_space.encode_image(_upcast(vae), key, pictures, noise)


def _upcast(vae: AutoencoderKL) -> AutoencoderKL:
    if vae.config.force_upcast and vae.decoder.conv_in.kernel[...].dtype == jnp.float16:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), vae)
    return vae


def tokenizer(folder: Path, models: Models, override: Any) -> TokenizerPair:
    """Returns the two tokenizers, which share a vocabulary but use different padding tokens.

    If the user passes a single tokenizer or folder, it is used for both text encoders.

    Raises:
        TypeError, CheckpointError: A tokenizer has the wrong type or cannot be read.
    """

    def read_one(path, network):
        return Tokenizer(path, network.config.max_position_embeddings, network.config.vocab_size)

    if isinstance(override, TokenizerPair):
        return override
    if override is not None:
        if not isinstance(override, Tokenizer):
            path = tokenizer_folder(folder, override, "a CLIP tokenizer, another SDXL pipeline's tokenizer,")
            override = read_one(path, models.text_encoder)
        return override.pair()
    return TokenizerPair(
        read_one(folder / "tokenizer", models.text_encoder), read_one(folder / "tokenizer_2", models.text_encoder_2)
    )


def extras(folder: Path, index: Mapping[str, Any], models: Models) -> Extras:
    """Reads from model_index.json whether a missing negative prompt means all zeros."""
    return Extras(index.get("force_zeros_for_empty_prompt", True) is not False)


def refuse(index: Mapping[str, Any]) -> str | None:
    """Returns the reason for rejecting the refiner, which lacks the first text encoder; None for other checkpoints."""
    if listed(index, "text_encoder_2") and not listed(index, "text_encoder"):
        return "is the Stable Diffusion XL refiner, which is not supported; give a checkpoint of the base model"
    return None


SYSTEM = System(
    name="sdxl",
    title="Stable Diffusion XL",
    checkpoint=Checkpoint(
        recognise=lambda index: "text_encoder_2" in index,
        models=Models,
        networks={
            **NETWORKS,
            "text_encoder_2": Network(
                CLIPTextModelWithProjection,
                CLIPTextConfig,
                "model",
                also=clip_text.CLIP_CLASSES,
                options=clip_text.options,
            ),
        },
        build=Models.build,
        tokenizer=tokenizer,
        tokenizers=("tokenizer", "tokenizer_2"),
        extras=extras,
        extras_type=Extras,
        refuse=refuse,
        single_file=SDXL_FILE,
        saved=Saved(
            "StableDiffusionXLPipeline",
            entries=lambda extras: {"force_zeros_for_empty_prompt": extras.zero_negative},
            tokenizers=lambda pair: {"tokenizer": pair.first, "tokenizer_2": pair.second},
        ),
        adapters=AdapterNames(
            {"text_encoder": adapters.TEXT, "text_encoder_2": adapters.TEXT_2, "unet": adapters.UNET},
            TextEncoders("Stable Diffusion XL", {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}, "768 and 1280"),
            (LoraKind("Stable Diffusion XL", any_of(attends_to(2048), has(_OWN_LAYERS))),),
        ),
    ),
    text=sdxl_text.READER,
    sampler=STABLE_DIFFUSION._replace(setup=setup, denoiser=denoiser, decode=decode, encode_image=encode_image),
    call=SDXLCall,
)
