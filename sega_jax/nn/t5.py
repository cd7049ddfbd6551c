"""The encoder of T5 v1.1 and ByT5 (Raffel et al. 2020; Shazeer 2020; Xue et al. 2022), in the layout of transformers'
`T5EncoderModel`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.config import build
from sega_jax.nn.layers import Embed, Linear, along, parameter


class T5Config(NamedTuple):
    """The fields of `text_encoder/config.json` that define the encoder, with transformers' defaults."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support, such as the original T5
                without gates, which transformers assumes if `feed_forward_proj` is missing.
        """
        fixed = {"feed_forward_proj": ("gated-gelu",)}
        self = build(cls, dict.fromkeys(fixed) | dict(config), "text encoder", fixed=fixed, strict=False)
        exact = self.relative_attention_num_buckets // 4
        if not 0 < exact < self.relative_attention_max_distance:
            raise ValueError(
                f"text encoder config: relative_attention_num_buckets {self.relative_attention_num_buckets} should be"
                f" at least 4 and below 4 times relative_attention_max_distance {self.relative_attention_max_distance}"
            )
        return self

    def fixed(self) -> dict[str, Any]:
        """Returns the options of transformers' config.json that are not fields and have only one supported value."""
        return {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def buckets(tokens: int, count: int, farthest: int) -> np.ndarray:
    """Returns the bucket for each key's position relative to each query, int [queries, keys] in [0, count).

    The second half of the buckets is for keys after the query. In each half, the first buckets hold one distance each.
    The others hold exponentially growing ranges of distances, up to `farthest`. The last bucket also holds all larger
    distances. Logarithms are computed in float32, because their rounding determines where the ranges end.
    """
    offset = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    distance, half = abs(offset), count // 2
    exact = half // 2
    position = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(farthest / exact))
    far = np.minimum(exact + (position * (half - exact)).astype(int), half - 1)
    return np.where(distance < exact, distance, far) + half * (offset > 0)


class RMSNorm(nnx.Module):
    """Divides the last axis by its root mean square (Zhang & Sennrich 2019). The result has the dtype of the
    parameter."""

    def __init__(self, channels: int, eps: float):
        self.eps = eps
        self.scale = parameter(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        normal = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (normal * along(self.scale[...], normal)).astype(self.scale[...].dtype)


class SelfAttention(nnx.Module):
    """Self-attention with a bias [batch or 1, heads, queries, keys]. Logits are not divided by the square root of the
    head width.
    """

    def __init__(self, c: T5Config, *, first: bool):
        self.heads = c.num_heads
        self.q = Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.k = Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.v = Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.o = Linear(c.num_heads * c.d_kv, c.d_model, bias=False)
        # All layers share the position bias of the first one.
        self.relative_attention_bias = Embed(c.relative_attention_num_buckets, c.num_heads) if first else None

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=bias.dtype) + bias
        weights = jax.nn.softmax(logits).astype(v.dtype)
        return self.o(jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(*x.shape[:2], -1))


class GatedGELU(nnx.Module):
    """gelu(gate) * value, where the gelu is approximated with tanh."""

    def __init__(self, channels: int, hidden: int):
        self.wi_0 = Linear(channels, hidden, bias=False)
        self.wi_1 = Linear(channels, hidden, bias=False)
        self.wo = Linear(hidden, channels, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    """Pre-normalised self-attention with a residual connection."""

    def __init__(self, c: T5Config, *, first: bool):
        self.SelfAttention = SelfAttention(c, first=first)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + self.SelfAttention(self.layer_norm(x), bias).astype(x.dtype)


class FeedForwardLayer(nnx.Module):
    """A pre-normalised feed-forward layer with a residual connection."""

    def __init__(self, c: T5Config):
        self.DenseReluDense = GatedGELU(c.d_model, c.d_ff)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.DenseReluDense(self.layer_norm(x)).astype(x.dtype)


class Block(nnx.Module):
    """An attention layer and a feed-forward layer."""

    def __init__(self, c: T5Config, *, first: bool):
        self.layer: nnx.List[Any] = nnx.List([AttentionLayer(c, first=first), FeedForwardLayer(c)])

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return self.layer[1](self.layer[0](x, bias))


class Encoder(nnx.Module):
    """A stack of blocks with a final norm."""

    def __init__(self, c: T5Config):
        self.block = nnx.List([Block(c, first=i == 0) for i in range(c.num_layers)])
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
    """The encoder of T5.

    `__call__(ids, mask)`: int32 [batch, tokens] and bool or int [batch, tokens], False for padding -> the last hidden
    state after the final norm, [batch, tokens, d_model].

    No token attends to padding, but padding positions get hidden states too. Between the layers, hidden states are at
    least float32, because large encoders exceed the range of float16.
    """

    def __init__(self, config: T5Config):
        self.config = config
        self.shared = Embed(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)

    @staticmethod
    def rename(name: str) -> str | None:
        """Maps a tensor name in a file to a parameter name, or to None for the tensors of a decoder.

        Files may store the embedding under one of two names or under both.
        """
        if name.startswith(("decoder.", "lm_head.")):
            return None
        return "shared.weight" if name == "encoder.embed_tokens.weight" else name

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        c, x = self.config, self.shared(ids)
        dtype = at_least_float32(x.dtype)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        indices = buckets(ids.shape[-1], c.relative_attention_num_buckets, c.relative_attention_max_distance)
        position = jnp.moveaxis(table(indices), -1, 0)[None].astype(dtype)
        padding = jnp.where(mask.astype(bool), 0, jnp.finfo(dtype).min).astype(dtype)[:, None, None, :]
        return self.encoder(x.astype(dtype), position + padding)
