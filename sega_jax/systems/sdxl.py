"""Stable Diffusion XL (Podell et al. 2023): latents, two CLIP texts, and a UNet that is told a pooled text and sizes,
too.

The pure functions are those of `stable_diffusion`. A text comes as one array, so that it goes wherever an embedding
does: [tokens + 1, channels], the states of both text encoders side by side, and in the last row the pooled text of the
second, filled up with zeros. Every branch has its own; sizes are of a row.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32
from sega_jax.method.sample import Carry
from sega_jax.method.schedules import Row
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.config import built
from sega_jax.nn.unet import Context, UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems import base, stable_diffusion
from sega_jax.systems.base import Method, Record, Settings, Sizes, Usual
from sega_jax.systems.base import start as start


class Models(NamedTuple):
    """The networks of a checkpoint, without values or filled."""

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
        """Networks without values from the four config.json; networks that are built stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        text_encoder_2 = built(text_encoder_2, CLIPTextModelWithProjection, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig)
        one, two, net, auto = text_encoder.config, text_encoder_2.config, unet.config, vae.config
        if not net.tells_sizes or net.adds_keys or net.num_class_embeds:
            raise ValueError(
                f"a UNet of addition_embed_type {net.addition_embed_type or None} and num_class_embeds"
                f" {net.num_class_embeds or None} is not Stable Diffusion XL's, whose addition_embed_type is text_time"
            )
        channels = one.hidden_size + two.hidden_size
        for level in range(len(net.block_out_channels)):
            if (context := net.level("cross_attention_dim", level)) != channels:
                raise ValueError(
                    f"the UNet's cross_attention_dim {context} is not what both text encoders have, {one.hidden_size} +"
                    f" {two.hidden_size}; do they belong together?"
                )
        if net.pooled_dim != two.projection_dim or net.pooled_dim > channels:
            raise ValueError(
                f"the UNet takes {net.pooled_dim} channels of a pooled text (projection_class_embeddings_input_dim less"
                f" six times addition_time_embed_dim), the second text encoder's projection_dim is"
                f" {two.projection_dim}: only Stable Diffusion XL's base layout is supported, not the refiner's"
            )
        if one.max_position_embeddings != two.max_position_embeddings:
            raise ValueError(
                f"the text encoders read {one.max_position_embeddings} and {two.max_position_embeddings} tokens; do"
                " they belong together?"
            )
        if not net.in_channels == net.out_channels == auto.latent_channels:
            raise ValueError(
                f"the UNet takes {net.in_channels} channels to {net.out_channels}, the VAE has"
                f" {auto.latent_channels}: only text-to-image checkpoints are supported, where all are equal"
            )
        return cls(text_encoder, text_encoder_2, unet, vae)

    @property
    def reader(self) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        """What `encode` takes."""
        return self.text_encoder, self.text_encoder_2

    @property
    def predictor(self) -> UNet2DConditionModel:
        """What `advance` takes."""
        return self.unet

    @property
    def decoder(self) -> AutoencoderKL:
        """What `decode` and `embed` take."""
        return self.vae

    def text_shape(self, tokens: int) -> tuple[int, int]:
        """Of the embedding of a text of so many tokens."""
        return tokens + 1, self.unet.config.level("cross_attention_dim", 0)

    @property
    def sizes(self) -> Sizes:
        return stable_diffusion.sizes(self.unet.config, self.vae.config)

    @property
    def usual(self) -> Usual:
        """diffusers' defaults."""
        return Usual(50, 5.0)


def encode(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: jax.Array) -> jax.Array:
    """int32 ids [texts, 2, tokens], of each encoder's own tokenizer -> [texts, tokens + 1, channels]."""
    one, two = encoders
    states, pooled = two.states(ids[:, 1])
    states = jnp.concatenate([one.penultimate(ids[:, 0]), states], -1)
    filled = jnp.pad(pooled[:, None], ((0, 0), (0, 0), (0, states.shape[-1] - pooled.shape[-1])))
    return jnp.concatenate([states, filled], 1)


def parted(text: Any, pooled: int) -> tuple[Any, Any]:
    """Texts [..., tokens + 1, channels] as two, as diffusers has them: states [..., tokens, channels], and the pooled
    texts [..., pooled]."""
    return text[..., :-1, :], text[..., -1, :pooled]


def advance(
    unet: UNet2DConditionModel,
    text: jax.Array,
    carry: Carry,
    table: Row,
    settings: Settings,
    *,
    method: Method,
    concepts: int | None = None,
) -> tuple[Carry, Record | None]:
    """As `common.advance`, with texts [rows, 2 + n, tokens + 1, channels] and the rows' sizes."""
    sizes = jnp.broadcast_to(jnp.asarray(settings.sizes)[:, None], (*text.shape[:2], 6))
    told = Context(*parted(text, unet.config.pooled_dim), sizes)
    return base.advance(unet, told, carry, table, settings, method=method, concepts=concepts)


def decode(vae: AutoencoderKL, latents: jax.Array, *, tile: int | None = None) -> tuple[jax.Array, jax.Array]:
    """As `stable_diffusion.decode`; in float32 where the weights are float16 and the config says that this does not
    hold the activations, as in diffusers."""
    return stable_diffusion.decode(_upcast(vae), latents, tile=tile)


def embed(vae: AutoencoderKL, key: jax.Array, pictures: jax.Array) -> jax.Array:
    """As `common.embed`, in the dtype of `decode`."""
    return base.embed(_upcast(vae), key, pictures)


def _upcast(vae: AutoencoderKL) -> AutoencoderKL:
    if vae.config.force_upcast and vae.decoder.conv_in.kernel[...].dtype == jnp.float16:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), vae)
    return vae


def generate(
    models: Models,
    ids: jax.Array,
    table: Row,
    settings: Settings,
    latents: jax.Array | None = None,
    *,
    shape: tuple[int, ...],
    method: Method,
) -> jax.Array:
    """The whole way from tokens to pictures as one pure function.

    Args:
        ids: int32 [rows, 2 + n, 2, tokens]: of the negative prompt, the prompt, the concepts, by each tokenizer.
        table: of a `Scheduler` for a number of steps.
        settings: with the rows' sizes.
        latents: to start from, [rows, *shape] (then `settings.key` serves a solver's fresh noise only).
        shape: (height, width, channels) of the latents.

    Returns:
        Float32 pictures [rows, height, width, 3] in [0, 1].
    """
    text = encode(models.reader, ids.reshape(-1, *ids.shape[2:]))
    text = text.reshape(*ids.shape[:2], *text.shape[1:])
    wide = at_least_float32(text.dtype)
    carry = start(settings, latents, table.initial_scale[0], shape=shape, method=method, dtype=wide)
    carry, _ = advance(models.unet, text, carry, table, settings, method=method)
    return decode(models.vae, carry.x)[0]
