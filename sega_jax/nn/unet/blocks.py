"""The levels of a UNet: resnets, attention in some levels, and resampling to the next level.

The argument `text` has one entry for each module in `attentions`: the result of the module's `project`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.layers import ACTIVATIONS, Downsample, Linear, ResnetBlock, Upsample, double, halve, spread
from sega_jax.nn.unet.attention import AddedAttention, Transformer
from sega_jax.nn.unet.config import UNetConfig


class ScaledResnetBlock(ResnetBlock):
    """A resnet with adaptive group normalisation (Dhariwal & Nichol 2021): the time embedding scales and shifts the
    result of the second norm.

    Its output is divided by `divisor`. `resample` is applied to the shortcut, and between the first activation and the
    first convolution.
    """

    def __init__(
        self,
        c: UNetConfig,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        divisor: float,
        resample: Callable[[jax.Array], jax.Array] | None = None,
    ):
        super().__init__(
            inputs, outputs, embedding=embedding, groups=c.norm_num_groups, eps=c.norm_eps, activation=c.act_fn
        )
        self.time_emb_proj = Linear(embedding, 2 * outputs)
        self.activate_time, self.divisor, self.resample = not c.resnet_skip_time_act, divisor, resample

    def __call__(self, x: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        assert embedding is not None
        assert self.time_emb_proj is not None
        act = ACTIVATIONS[self.activation]
        h = act(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.norm2(self.conv1(h))
        time = spread(self.time_emb_proj(act(embedding) if self.activate_time else embedding), h)
        scale, shift = jnp.split(time[:, None, None, :], 2, -1)
        h = self.conv2(act(spread(h, time) * (1 + scale) + shift))
        return (spread(x if self.conv_shortcut is None else self.conv_shortcut(x), h) + h) / self.divisor


class DownBlock(nnx.Module):
    """A level on the way down, which also returns the activations for the skip connections."""

    def __init__(self, c: UNetConfig, level: int, embedding: int, implementation: str):
        outputs = c.block_out_channels[level]
        inputs = c.block_out_channels[max(level - 1, 0)]
        layers = c.level("layers_per_block", level)
        self.resnets = nnx.List([_resnet(c, inputs if i == 0 else outputs, outputs, embedding) for i in range(layers)])
        cross = "CrossAttn" in c.down_block_types[level]
        transformers = c.transformer_layers(level) if cross else ()
        self.attentions = nnx.List([_attention(c, level, count, implementation) for count in transformers])
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = nnx.List([] if last else [_downsampler(c, outputs, embedding)])

    def __call__(self, x: jax.Array, embedding: jax.Array, text: Sequence[Any]) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if self.attentions:
                x = self.attentions[i](x, text[i])
            skips.append(x)
        for down in self.downsamplers:
            x = down(x, embedding) if isinstance(down, ResnetBlock) else down(x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """The deepest block: one resnet, or two with attention between them."""

    def __init__(self, c: UNetConfig, embedding: int, implementation: str):
        channels, level = c.block_out_channels[-1], len(c.block_out_channels) - 1
        divisor, count = c.mid_block_scale_factor, c.middle_resnets
        self.resnets = nnx.List([_resnet(c, channels, channels, embedding, divisor=divisor) for _ in range(count)])
        attends = count > 1
        self.attentions = nnx.List(
            [_attention(c, level, c.middle_layers, implementation, only_cross=False)] if attends else []
        )

    def __call__(self, x: jax.Array, embedding: jax.Array, text: Sequence[Any]) -> jax.Array:
        x = self.resnets[0](x, embedding)
        for attention, keys, resnet in zip(self.attentions, text, list(self.resnets)[1:], strict=True):
            x = resnet(attention(x, keys), embedding)
        return x


class UpBlock(nnx.Module):
    """A level on the way up. `step` counts from the deepest level. All settings are taken from the level of the same
    size on the way down.
    """

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
        cross = "CrossAttn" in c.up_block_types[step]
        transformers = c.transformer_layers(level, up=True) if cross else ()
        self.attentions = nnx.List([_attention(c, level, count, implementation) for count in transformers])
        self.upsamplers = nnx.List([_upsampler(c, outputs, embedding)] if level else [])

    def __call__(self, x: jax.Array, embedding: jax.Array, text: Sequence[Any], skips: list[jax.Array]) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, spread(skips.pop(), x)], -1), embedding)
            if self.attentions:
                x = self.attentions[i](x, text[i])
        for up in self.upsamplers:
            # If downsampling rounded an odd size up, doubling gives one row or column too many.
            x = up(x, embedding) if isinstance(up, ResnetBlock) else up(x, skips[-1].shape[1:3])
        return x


def _resnet(
    c: UNetConfig,
    inputs: int,
    outputs: int,
    embedding: int,
    *,
    divisor: float | None = None,
    resample: Callable[[jax.Array], jax.Array] | None = None,
) -> ResnetBlock:
    if c.adds_keys:
        divisor = c.resnet_out_scale_factor if divisor is None else divisor
        return ScaledResnetBlock(c, inputs, outputs, embedding, divisor=divisor, resample=resample)
    return ResnetBlock(
        inputs,
        outputs,
        embedding=embedding,
        groups=c.norm_num_groups,
        eps=c.norm_eps,
        activation=c.act_fn,
    )


def _attention(
    c: UNetConfig, level: int, layers: int, implementation: str, *, only_cross: bool | None = None
) -> AddedAttention | Transformer:
    if c.adds_keys:
        return AddedAttention(c, level, implementation)
    only_cross = bool(c.level("only_cross_attention", level)) if only_cross is None else only_cross
    return Transformer(c, level, layers, implementation, only_cross=only_cross)


def _downsampler(c: UNetConfig, channels: int, embedding: int) -> ResnetBlock | Downsample:
    return _resnet(c, channels, channels, embedding, resample=halve) if c.adds_keys else Downsample(channels)


def _upsampler(c: UNetConfig, channels: int, embedding: int) -> ResnetBlock | Upsample:
    return _resnet(c, channels, channels, embedding, resample=double) if c.adds_keys else Upsample(channels)
