"""The conditional UNet of Stable Diffusion 1.x and 2.x (diffusers' `UNet2DConditionModel`)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.arrays import at_least_float32
from sega_jax.nn.config import build
from sega_jax.nn.layers import (
    ACTIVATIONS,
    Attention,
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    Resample,
    ResnetBlock,
    double,
)

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")

# Options of diffusers' UNet under which it is another network than this one.
_FIXED = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
# Without effect here: dropout is for training, attention is in float32 anyway, the others belong to
# options that _FIXED rules out.
_IGNORED = (
    "dropout",
    "upcast_attention",
    "addition_time_embed_dim",
    "addition_embed_type_num_heads",
    "projection_class_embeddings_input_dim",
)


class UNetConfig(NamedTuple):
    """The fields of `unet/config.json` that shape the network, with diffusers' defaults.

    A number may also be a tuple with one entry a level where diffusers allows it. `attention_head_dim`
    is, against its name, the number of heads.
    """

    sample_size: int | tuple[int, int] = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (_DOWN[0],) * 3 + (_DOWN[1],)
    up_block_types: tuple[str, ...] = (_UP[0],) + (_UP[1],) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    time_embedding_dim: int = 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads a config.json.

        Raises:
            ValueError: the config describes a network that this module does not compute; the message
                names the option and the supported values.
        """
        choices = {"down_block_types": _DOWN, "up_block_types": _UP, "act_fn": tuple(ACTIVATIONS)}
        self = build(cls, config, "UNet", fixed=_FIXED, choices=choices, ignored=_IGNORED)
        count = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"UNet config: {name} has {len(getattr(self, name))} entries for {count} block_out_channels"
                )
        for level, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"UNet config: {channels} channels cannot be split into norm_num_groups {self.norm_num_groups}"
                )
            if channels % self.level("attention_head_dim", level):
                raise ValueError(
                    f"UNet config: {channels} channels cannot be split into"
                    f" {self.level('attention_head_dim', level)} heads (attention_head_dim)"
                )
        return self

    def level(self, name: str, level: int) -> int:
        """The entry of a number that may be given for each level."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return value
        if len(value) != len(self.block_out_channels):
            raise ValueError(
                f"UNet config: {name} has {len(value)} entries for {len(self.block_out_channels)} block_out_channels"
            )
        return value[level]


def sinusoid(timestep: jax.Array, channels: int, *, flip: bool, shift: int) -> jax.Array:
    """The embedding of [batch] timesteps as [batch, channels] (Vaswani et al. 2017; Ho et al. 2020).

    [cos, sin] with `flip`, else [sin, cos]. Frequencies are rounded where torch rounds them, since at
    t = 999 a difference in the last digit is one of 6e-5 in the phase.
    """
    dtype = at_least_float32(timestep.dtype)
    half = channels // 2
    exponent = np.arange(half, dtype=dtype) * np.array(-math.log(10000), dtype) / np.array(half - shift, dtype)
    frequency = np.exp(exponent.astype(np.float64)).astype(dtype)
    phase = timestep.astype(dtype)[:, None] * frequency[None]
    parts = [jnp.sin(phase), jnp.cos(phase)]
    return jnp.pad(jnp.concatenate(parts[::-1] if flip else parts, -1), ((0, 0), (0, channels % 2)))


class TimestepEmbedding(nnx.Module):
    def __init__(self, inputs: int, outputs: int, activation: str):
        self.activation = activation
        self.linear_1 = Linear(inputs, outputs)
        self.linear_2 = Linear(outputs, outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


class GEGLU(nnx.Module):
    """value * gelu(gate), the value in the first half of the projection (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int):
        self.proj = Linear(channels, 2 * hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.proj(x), 2, -1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, channels: int):
        # torch's list has a dropout in the middle, which has no parameters.
        self.net = nnx.List([GEGLU(channels, 4 * channels), None, Linear(4 * channels, channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward; each pre-normalised, with a residual."""

    def __init__(self, channels: int, context: int, heads: int, implementation: str):
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads, implementation=implementation)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, context, heads, implementation=implementation)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        normal = self.norm1(x)
        x = x + self.attn1(normal, normal)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Transformer blocks over the positions of a picture [batch, height, width, channels]."""

    def __init__(self, c: UNetConfig, level: int, implementation: str):
        channels = c.block_out_channels[level]
        # SD 1.x projects by 1x1 convolutions, 2.x by linear layers: the same sums, other shapes in the file.
        project = Linear if c.use_linear_projection else lambda i, o: Conv(i, o, 1)
        self.norm = GroupNorm(c.norm_num_groups, channels, 1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(
                    channels,
                    c.level("cross_attention_dim", level),
                    c.level("attention_head_dim", level),
                    implementation,
                )
                for _ in range(c.level("transformer_layers_per_block", level))
            ]
        )
        self.proj_out = project(channels, channels)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        h = self.proj_in(self.norm(x))
        tokens = h.reshape(h.shape[0], -1, h.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(h.shape))


class DownBlock(nnx.Module):
    def __init__(self, c: UNetConfig, level: int, embedding: int, implementation: str):
        outputs = c.block_out_channels[level]
        inputs = c.block_out_channels[max(level - 1, 0)]
        layers = c.level("layers_per_block", level)
        self.resnets = nnx.List([_resnet(c, inputs if i == 0 else outputs, outputs, embedding) for i in range(layers)])
        cross = c.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = nnx.List([Transformer(c, level, implementation) for _ in range(layers)] if cross else [])
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = nnx.List([] if last else [Resample(outputs, stride=2)])

    def __call__(self, x: jax.Array, embedding: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for down in self.downsamplers:
            x = down(x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    def __init__(self, c: UNetConfig, embedding: int, implementation: str):
        channels = c.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(c, channels, channels, embedding) for _ in range(2)])
        self.attentions = nnx.List([Transformer(c, len(c.block_out_channels) - 1, implementation)])

    def __call__(self, x: jax.Array, embedding: jax.Array, context: jax.Array) -> jax.Array:
        x = self.attentions[0](self.resnets[0](x, embedding), context)
        return self.resnets[1](x, embedding)


class UpBlock(nnx.Module):
    """`step` counts from the deepest level; the attention settings are those of the level it restores."""

    def __init__(self, c: UNetConfig, step: int, embedding: int, implementation: str):
        count = len(c.block_out_channels)
        level = count - 1 - step
        outputs = c.block_out_channels[level]
        before = c.block_out_channels[min(level + 1, count - 1)]
        below = c.block_out_channels[max(level - 1, 0)]
        layers = c.level("layers_per_block", level) + 1
        self.resnets = nnx.List(
            [
                _resnet(
                    c,
                    (before if i == 0 else outputs) + (below if i == layers - 1 else outputs),
                    outputs,
                    embedding,
                )
                for i in range(layers)
            ]
        )
        cross = c.up_block_types[step] == "CrossAttnUpBlock2D"
        self.attentions = nnx.List([Transformer(c, level, implementation) for _ in range(layers)] if cross else [])
        self.upsamplers = nnx.List([Resample(outputs)] if level else [])

    def __call__(self, x: jax.Array, embedding: jax.Array, context: jax.Array, skips: list[jax.Array]) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], -1), embedding)
            if self.attentions:
                x = self.attentions[i](x, context)
        for up in self.upsamplers:
            # Where downsampling rounded an odd size up, the doubled picture is one line too large.
            height, width = skips[-1].shape[1:3]
            x = up(double(x)[:, :height, :width])
        return x


def _resnet(c: UNetConfig, inputs: int, outputs: int, embedding: int) -> ResnetBlock:
    return ResnetBlock(
        inputs,
        outputs,
        embedding=embedding,
        groups=c.norm_num_groups,
        eps=c.norm_eps,
        activation=c.act_fn,
    )


class UNet2DConditionModel(nnx.Module):
    """`__call__(x, timestep, context)`, every size of x that is not empty:

    x: [batch, height, width, in_channels], timestep: [batch] (kept in float32 or wider),
    context: [batch, tokens, cross_attention_dim] -> [batch, height, width, out_channels] in the dtype
    of the parameters.
    """

    def __init__(self, config: UNetConfig, attention: str = "xla"):
        channels = config.block_out_channels
        embedding = config.time_embedding_dim or 4 * channels[0]
        levels = range(len(channels))
        self.config = config
        self.conv_in = Conv(config.in_channels, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], embedding, config.act_fn)
        self.down_blocks = nnx.List([DownBlock(config, i, embedding, attention) for i in levels])
        self.mid_block = MidBlock(config, embedding, attention)
        self.up_blocks = nnx.List([UpBlock(config, i, embedding, attention) for i in levels])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv(channels[0], config.out_channels)

    @staticmethod
    def rename(name: str) -> str:
        return name

    def __call__(self, x: jax.Array, timestep: jax.Array, context: jax.Array) -> jax.Array:
        c = self.config
        dtype = self.conv_in.kernel[...].dtype
        context = context.astype(dtype)
        wave = sinusoid(timestep, c.block_out_channels[0], flip=c.flip_sin_to_cos, shift=c.freq_shift)
        embedding = self.time_embedding(wave.astype(dtype))
        x = self.conv_in(x.astype(dtype))
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, embedding, context)
            skips += new
        x = self.mid_block(x, embedding, context)
        for block in self.up_blocks:
            x = block(x, embedding, context, skips)
        return self.conv_out(ACTIVATIONS[c.act_fn](self.conv_norm_out(x)))
