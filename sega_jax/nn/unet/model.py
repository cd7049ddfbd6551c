"""The complete UNet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.layers import ACTIVATIONS, Conv, Embed, GroupNorm, Linear, spread
from sega_jax.nn.unet.blocks import DownBlock, MidBlock, UpBlock
from sega_jax.nn.unet.config import UNetConfig
from sega_jax.nn.unet.embedding import TextTimeEmbedding, TimestepEmbedding, sinusoid


class Context(NamedTuple):
    """The conditioning of Stable Diffusion XL's UNet."""

    states: jax.Array  # the text encoders' hidden states, [batch, tokens, cross_attention_dim]
    pooled: jax.Array  # the text's pooled embedding, [batch, channels]
    sizes: jax.Array  # float [batch, 6] in pixels: original height, width; top, left of the crop; target height, width


class Projected(NamedTuple):
    """A context projected by a UNet, valid for all timesteps and every x."""

    pooled: jax.Array | None  # [batch, embedding], added to the timestep's embedding; None if there is none
    attended: list[list[Any]]  # for each block, the keys and values of its attention modules


class UNet2DConditionModel(nnx.Module):
    """The conditional UNet, in the layout of diffusers.

    `__call__(x, timestep, context, class_labels=None, guidance=None)` returns [batch, height, width, out_channels] in
    at least float32. Its arguments are:

        x: [batch, height, width, in_channels]. For DeepFloyd-IF, height and width must be multiples of 2 ** (levels -
            1).
        timestep: [batch], kept in float32 or wider.
        context: [batch, tokens, cross_attention_dim], or its projection by `project`. For DeepFloyd-IF it is
            [batch, tokens, encoder_hid_dim], for Stable Diffusion XL a `Context`.
        class_labels: [batch], for upscalers only: the noise level of the low-resolution picture, whose channels are
            part of x. It is an integer below `num_class_embeds`; for DeepFloyd-IF, it may be any number.
        guidance: [batch, time_cond_proj_dim], for UNets with this option only: the result of `guidance_embedding` for
            the guidance scale.

    The context may have several adjacent branches for each row of x, [batch x branches, tokens, ...]. The output then
    has batch x branches rows, and the layers before the first use of text are computed once for all branches.
    """

    def __init__(self, config: UNetConfig, attention: str = "xla"):
        c, channels = config, config.block_out_channels
        embedding = c.time_embedding_dim or 4 * channels[0]
        levels = range(len(channels))
        self.config = c
        self.conv_in = Conv(c.in_channels, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], embedding, c.act_fn, c.time_cond_proj_dim)
        self.class_embedding = _class_embedding(c, embedding)
        self.add_embedding = _add_embedding(c, embedding)
        text = c.level("cross_attention_dim", 0)
        self.encoder_hid_proj = Linear(c.encoder_hid_dim, text) if c.encoder_hid_dim else None
        self.down_blocks = nnx.List([DownBlock(c, i, embedding, attention) for i in levels])
        self.mid_block = MidBlock(c, embedding, attention) if c.middle_resnets else None
        self.up_blocks = nnx.List([UpBlock(c, i, embedding, attention) for i in levels])
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], c.norm_eps)
        self.conv_out = Conv(channels[0], c.out_channels)

    @staticmethod
    def rename(name: str) -> str:
        return name

    def project(self, context: jax.Array | Context) -> Projected:
        """Projects the text for all attention modules. All calls with the same text can share the result."""
        dtype = self.conv_in.kernel[...].dtype
        pooled: jax.Array | None = None
        if self.config.has_size_conditioning:
            assert isinstance(context, Context)
            assert self.add_embedding is not None
            wave = self._wave(context.sizes.reshape(-1), self.config.addition_time_embed_dim)
            pooled_and_sizes = jnp.concatenate([context.pooled.astype(dtype), wave.reshape(len(context.sizes), -1)], -1)
            states, pooled = context.states.astype(dtype), self.add_embedding(pooled_and_sizes)
        else:
            assert not isinstance(context, Context)
            states = context.astype(dtype)
            if self.add_embedding is not None:
                pooled = self.add_embedding(states)
        if self.encoder_hid_proj is not None:
            states = self.encoder_hid_proj(states)
        middle = [] if self.mid_block is None else [self.mid_block]
        blocks: list[DownBlock | MidBlock | UpBlock] = [*self.down_blocks, *middle, *self.up_blocks]
        return Projected(pooled, [[attention.project(states) for attention in block.attentions] for block in blocks])

    def __call__(
        self,
        x: jax.Array,
        timestep: jax.Array,
        context: jax.Array | Context | Projected,
        class_labels: jax.Array | None = None,
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        pooled, attended = context if isinstance(context, Projected) else self.project(context)
        embedding, texts = self._embed(timestep, pooled, class_labels, guidance), iter(attended)
        x = self.conv_in(x.astype(self.conv_in.kernel[...].dtype))
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, embedding, next(texts))
            skips += new
        if self.mid_block is not None:
            x = self.mid_block(x, embedding, next(texts))
        for up_block in self.up_blocks:
            x = up_block(x, embedding, next(texts), skips)
        # Guidance subtracts predictions from each other. In half precision, few significant digits of a difference
        # would remain.
        return self.conv_out.widened(ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x)))

    def _embed(
        self,
        timestep: jax.Array,
        pooled: jax.Array | None,
        class_labels: jax.Array | None,
        guidance: jax.Array | None,
    ) -> jax.Array:
        """Returns the embedding [batch, embedding] that is passed to all resnets."""
        c = self.config
        if class_labels is None and self.class_embedding is not None:
            raise ValueError(
                "this UNet needs class_labels, the noise level of the low-resolution picture, but none were given"
            )
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("this UNet takes no class_labels; leave them out")
        if (guidance is None) != (not c.time_cond_proj_dim):
            raise ValueError("UNets with time_cond_proj_dim require `guidance`, and other UNets do not accept it")

        embedding = self.time_embedding(self._wave(timestep), guidance)
        if self.class_embedding is not None:
            assert class_labels is not None
            levels = class_labels if c.num_class_embeds else self._wave(class_labels.astype(timestep.dtype))
            embedding += self.class_embedding(levels)
        if pooled is not None:
            embedding = spread(embedding, pooled) + pooled
        return ACTIVATIONS[c.time_embedding_act_fn](embedding) if c.time_embedding_act_fn else embedding

    def _wave(self, steps: jax.Array, channels: int | None = None) -> jax.Array:
        c = self.config
        wave = sinusoid(steps, channels or c.block_out_channels[0], flip=c.flip_sin_to_cos, shift=c.freq_shift)
        return wave.astype(self.conv_in.kernel[...].dtype)


def _add_embedding(c: UNetConfig, embedding: int) -> TextTimeEmbedding | TimestepEmbedding | None:
    if c.has_size_conditioning:
        return TimestepEmbedding(c.projection_class_embeddings_input_dim, embedding, c.act_fn)
    heads = c.addition_embed_type_num_heads
    return TextTimeEmbedding(c.text_dim, embedding, heads) if c.addition_embed_type else None


def _class_embedding(c: UNetConfig, embedding: int) -> Embed | TimestepEmbedding | None:
    if c.num_class_embeds:
        return Embed(c.num_class_embeds, embedding)
    return TimestepEmbedding(c.block_out_channels[0], embedding, c.act_fn) if c.class_embed_type else None
