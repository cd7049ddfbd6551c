"""DeepFloyd-IF's first and second stage: pixels, T5 text, and a UNet that predicts the noise and its variance; the
second stage's sees the first one's picture besides (Saharia et al. 2022).

The pure functions are those of `sega_jax.systems.stable_diffusion`, but for the checker, which there is none of.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.nn.config import built
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.systems.base import Sizes, Usual
from sega_jax.systems.base import advance as advance
from sega_jax.systems.base import start as start


class Models(NamedTuple):
    """The networks of a stage, without values or filled; without its text encoder, prompts are embeddings."""

    text_encoder: T5EncoderModel | None
    unet: UNet2DConditionModel

    @classmethod
    def build(
        cls,
        text_encoder: Mapping[str, Any] | T5EncoderModel | None,
        unet: Mapping[str, Any] | UNet2DConditionModel,
        attention: str = "xla",
    ) -> "Models":
        """Networks without values from the config.json; networks that are built stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        text_encoder = built(text_encoder, T5EncoderModel, T5Config)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        net = unet.config
        if not net.adds_keys or net.in_channels != (6 if net.class_embed_type else 3) or net.out_channels not in (3, 6):
            raise ValueError(
                f"a UNet of mid_block_type {net.mid_block_type}, class_embed_type {net.class_embed_type or None} and"
                f" {net.in_channels} channels to {net.out_channels} is of no stage of DeepFloyd-IF, whose first takes"
                " 3 channels, and whose second takes 6 and has class_embed_type timestep"
            )
        if text_encoder is not None and text_encoder.config.d_model != net.text_dim:
            raise ValueError(
                f"the UNet's encoder_hid_dim {net.text_dim} is not the text encoder's d_model"
                f" {text_encoder.config.d_model}; do the two belong together?"
            )
        return cls(text_encoder, unet)

    @property
    def reader(self) -> T5EncoderModel | None:
        """What `encode` takes."""
        return self.text_encoder

    def text_shape(self, tokens: int) -> tuple[int, int]:
        """Of the embedding of a text of so many tokens."""
        return tokens, self.unet.config.text_dim

    @property
    def predictor(self) -> UNet2DConditionModel:
        """What `advance` takes."""
        return self.unet

    @property
    def decoder(self) -> None:
        """What `decode` takes."""
        return None

    @property
    def sizes(self) -> Sizes:
        net = self.unet.config
        usual = net.sample_size if isinstance(net.sample_size, tuple) else (net.sample_size,) * 2
        multiple = 2 ** (len(net.block_out_channels) - 1)
        return Sizes(3, 1, multiple, usual, 4 if net.class_embed_type else 0)

    @property
    def usual(self) -> Usual:
        """diffusers' defaults."""
        return Usual(50, 4.0, 250) if self.sizes.enlarges else Usual(100, 7.0)


def encode(text_encoder: T5EncoderModel, tokens: jax.Array) -> jax.Array:
    """int32 ids and mask [texts, 2, tokens] -> hidden states [texts, tokens, channels], also of padding, which the
    UNet attends to."""
    return text_encoder(tokens[:, 0], tokens[:, 1])


def decode(_: None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixels [rows, height, width, 3] in [-1, 1] -> in [0, 1], and whether each row is finite, bool [rows]."""
    return jnp.clip(x / 2 + 0.5, 0, 1), jnp.isfinite(x).all((1, 2, 3))
