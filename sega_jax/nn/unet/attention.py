"""The UNet's self-attention and its attention to the text, in transformer blocks or as joint attention.

The `project` methods turn the text encoder's hidden states [batch, tokens, channels] into the keys and values that
`__call__` takes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.attention import attend
from sega_jax.nn.layers import Attention, Conv, GroupNorm, LayerNorm, Linear, gelu, spread
from sega_jax.nn.unet.config import TEXT_GROUPS, UNetConfig

Pair = tuple[jax.Array, jax.Array]


class GEGLU(nnx.Module):
    """value * gelu(gate), where the value is the first half of the projection and the gate the second (Shazeer
    2020)."""

    def __init__(self, channels: int, hidden: int):
        self.proj = Linear(channels, 2 * hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.proj(x), 2, -1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """A GEGLU and a linear layer."""

    def __init__(self, channels: int):
        # None replaces the dropout in torch's list, which has no parameters.
        self.net: nnx.List[Any] = nnx.List([GEGLU(channels, 4 * channels), None, Linear(4 * channels, channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text and a feed-forward layer, each pre-normalised and with a residual
    connection.

    With `only_cross`, the self-attention is replaced by a second attention to the text.
    """

    def __init__(self, channels: int, context: int, heads: int, implementation: str, *, only_cross: bool = False):
        self.only_cross = only_cross
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, context if only_cross else channels, heads, implementation=implementation)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, context, heads, implementation=implementation)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def project(self, context: jax.Array) -> list[Pair]:
        return [attn.project(context) for attn in ((self.attn1, self.attn2) if self.only_cross else (self.attn2,))]

    def __call__(self, x: jax.Array, text: Sequence[Pair]) -> jax.Array:
        normal = self.norm1(x)
        first, second = text if self.only_cross else (self.attn1.project(normal), *text)
        out = self.attn1(normal, *first)
        x = spread(x, out) + out
        out = self.attn2(self.norm2(x), *second)
        x = spread(x, out) + out
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Transformer blocks over a picture's positions [batch, height, width, channels]."""

    def __init__(self, c: UNetConfig, level: int, layers: int, implementation: str, *, only_cross: bool = False):
        channels = c.block_out_channels[level]
        # SD 1.x projects with 1x1 convolutions and SD 2.x with linear layers; only the shapes of the stored weights
        # differ.
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
                    only_cross=only_cross,
                )
                for _ in range(layers)
            ]
        )
        self.proj_out = project(channels, channels)

    def project(self, context: jax.Array) -> list[list[Pair]]:
        return [block.project(context) for block in self.transformer_blocks]

    def __call__(self, x: jax.Array, text: Sequence[Sequence[Pair]]) -> jax.Array:
        h = self.proj_in(self.norm(x))
        tokens = h.reshape(h.shape[0], -1, h.shape[-1])
        for block, pairs in zip(self.transformer_blocks, text, strict=True):
            tokens = block(tokens, pairs)
        return spread(x, tokens) + self.proj_out(tokens.reshape(-1, *h.shape[1:]))


class AddedAttention(nnx.Module):
    """Joint attention of a picture's positions [batch, height, width, channels] to the text and to each other.

    It has a residual connection (Nichol et al. 2022). As in DeepFloyd-IF, the text encoder's hidden states are
    normalised over channels and tokens, including padding.
    """

    def __init__(self, c: UNetConfig, level: int, implementation: str):
        channels, text = c.block_out_channels[level], c.level("cross_attention_dim", level)
        self.heads, self.implementation = channels // c.level("attention_head_dim", level), implementation
        self.group_norm = GroupNorm(c.norm_num_groups, channels, 1e-5)
        self.norm_cross = GroupNorm(TEXT_GROUPS, text, 1e-5)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.add_k_proj = Linear(text, channels)
        self.add_v_proj = Linear(text, channels)
        self.to_out = nnx.List([Linear(channels, channels)])

    def project(self, context: jax.Array) -> Pair:
        text = self.norm_cross(context)
        return self.add_k_proj(text), self.add_v_proj(text)

    def __call__(self, x: jax.Array, text: Pair) -> jax.Array:
        h, (keys, values) = self.group_norm(x).reshape(len(x), -1, x.shape[-1]), text
        out = attend(
            spread(self.to_q(h), keys),
            jnp.concatenate([keys, spread(self.to_k(h), keys)], 1),
            jnp.concatenate([values, spread(self.to_v(h), values)], 1),
            heads=self.heads,
            implementation=self.implementation,
        )
        return spread(x, out) + self.to_out[0](out).reshape(-1, *x.shape[1:])
