"""Stable Diffusion 1.x and 2.x and the x4 upscaler of 2.x: latents, CLIP text, and a UNet that predicts the noise
or v; the upscaler's sees a small picture besides.

Five pure functions of one device's share of the rows, each compiled once: `encode` takes tokens to
text, `start` keys to noise, `advance` a carry through a chunk of the schedule, `decode` latents to
pictures, `check` pictures to flags. `generate` is the composition of the first four, for research and
export.

Latents and pictures are channels last. Axes: rows of the batch, branches (2 + n: unconditional, prompt,
concepts), tokens, channels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32
from sega_jax.method.schedules import Row
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.nn.config import built
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems.base import Method, Settings, Sizes, Usual, advance, start
from sega_jax.systems.base import embed as embed

USUAL, UPSCALING = Usual(50, 7.5), Usual(75, 9.0, 20)


class Models(NamedTuple):
    """The networks of a checkpoint, without values or filled."""

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
        """Networks without values from the three config.json; networks that are built stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig)
        text, net, auto = text_encoder.config, unet.config, vae.config
        for level in range(len(net.block_out_channels)):
            if (context := net.level("cross_attention_dim", level)) != text.hidden_size:
                raise ValueError(
                    f"the UNet's cross_attention_dim {context} is not the text encoder's hidden_size"
                    f" {text.hidden_size}; do the two belong together?"
                )
        upscales = net.num_class_embeds and net.in_channels == auto.latent_channels + 3
        if not net.in_channels - 3 * bool(upscales) == net.out_channels == auto.latent_channels:
            raise ValueError(
                f"the UNet takes {net.in_channels} channels to {net.out_channels}, the VAE has"
                f" {auto.latent_channels}: only text-to-image checkpoints are supported, where all are equal"
            )
        if net.tells_sizes:
            raise ValueError(
                "a UNet of addition_embed_type text_time is Stable Diffusion XL's: only text-to-image checkpoints of"
                " Stable Diffusion 1.x and 2.x have this layout"
            )
        if net.adds_keys or (net.num_class_embeds and not upscales):
            raise ValueError(
                f"a UNet of mid_block_type {net.mid_block_type} and num_class_embeds {net.num_class_embeds or None} is"
                " DeepFloyd-IF's or an upscaler's: only text-to-image checkpoints of Stable Diffusion are supported"
            )
        return cls(text_encoder, unet, vae)

    @property
    def predictor(self) -> UNet2DConditionModel:
        """What `advance` takes."""
        return self.unet

    @property
    def decoder(self) -> AutoencoderKL:
        """What `decode` takes."""
        return self.vae

    @property
    def reader(self) -> CLIPTextModel:
        """What `encode` takes."""
        return self.text_encoder

    def text_shape(self, tokens: int) -> tuple[int, int]:
        """Of the embedding of a text of so many tokens."""
        return tokens, self.unet.config.level("cross_attention_dim", 0)

    @property
    def sizes(self) -> Sizes:
        return sizes(self.unet.config, self.vae.config)

    @property
    def usual(self) -> Usual:
        """diffusers' defaults."""
        return UPSCALING if self.sizes.enlarges else USUAL


def sizes(net: UNetConfig, auto: AutoencoderConfig) -> Sizes:
    """Of what a UNet and an autoencoder make."""
    if net.in_channels > auto.latent_channels:
        # The small picture is as large as the latents.
        return Sizes(auto.latent_channels, auto.factor, auto.factor, None, auto.factor)
    height, width = net.sample_size if isinstance(net.sample_size, tuple) else (net.sample_size,) * 2
    return Sizes(auto.latent_channels, auto.factor, auto.factor, (height * auto.factor, width * auto.factor))


def encode(text_encoder: CLIPTextModel, ids: jax.Array) -> jax.Array:
    """int32 ids [texts, tokens] -> hidden states [texts, tokens, channels]."""
    return text_encoder(ids)


def decode(vae: AutoencoderKL, latents: jax.Array, *, tile: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Latents [rows, ...] -> float32 pictures [rows, height, width, 3] in [0, 1], and whether each row
    of latents and picture is finite, bool [rows]. They are decoded in tiles of `tile` positions a side, or whole."""
    # One picture after another: a decoder's activations are far larger than its picture.
    image = jax.lax.map(lambda one: vae.decode(one[None], tile)[0], latents / vae.config.scaling_factor)
    image = image.astype(at_least_float32(image.dtype))
    finite = jnp.isfinite(image).all((1, 2, 3)) & jnp.isfinite(latents).all((1, 2, 3))
    return jnp.clip(image / 2 + 0.5, 0, 1), finite


def check(safety_checker: StableDiffusionSafetyChecker, pixels: jax.Array) -> jax.Array:
    """Pictures that the host resized and normalised, [rows, side, side, 3] -> whether each is flagged, bool [rows]."""
    return safety_checker(pixels)


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
        ids: int32 [rows, 2 + n, tokens]: the negative prompt, the prompt, the concepts.
        table: of a `Scheduler` for a number of steps.
        latents: to start from, [rows, *shape] (then `settings.key` serves a solver's fresh noise only).
        shape: (height, width, channels) of the latents.

    Returns:
        Float32 pictures [rows, height, width, 3] in [0, 1], which no safety checker has seen.
    """
    text = encode(models.text_encoder, ids.reshape(-1, ids.shape[-1]))
    text = text.reshape(*ids.shape, text.shape[-1])
    carry = start(
        settings, latents, table.initial_scale[0], shape=shape, method=method, dtype=at_least_float32(text.dtype)
    )
    carry, _ = advance(models.unet, text, carry, table, settings, method=method)
    return decode(models.vae, carry.x)[0]
