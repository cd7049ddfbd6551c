"""The embeddings of the timestep, the guidance scale and the pooled text. Each embedding consists of one vector for
each picture."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.attention import attend
from sega_jax.nn.layers import ACTIVATIONS, LayerNorm, Linear, parameter


def sinusoid(timestep: jax.Array, channels: int, *, flip: bool, shift: int) -> jax.Array:
    """Returns the embedding [batch, channels] of timesteps [batch] (Vaswani et al. 2017; Ho et al. 2020).

    The order is [cos, sin] with `flip`, otherwise [sin, cos]. Frequencies are rounded as in torch, because a difference
    in their last digit changes the phase by 6e-5 at t = 999.
    """
    dtype = at_least_float32(timestep.dtype)
    half = channels // 2
    exponent = np.arange(half, dtype=dtype) * np.array(-math.log(10000), dtype) / np.array(half - shift, dtype)
    frequency = np.exp(exponent.astype(np.float64)).astype(dtype)
    phase = timestep.astype(dtype)[:, None] * frequency[None]
    parts = [jnp.sin(phase), jnp.cos(phase)]
    return jnp.pad(jnp.concatenate(parts[::-1] if flip else parts, -1), ((0, 0), (0, channels % 2)))


def guidance_embedding(scale: np.ndarray, channels: int) -> np.ndarray:
    """Returns the embedding [batch, channels] of guidance scales s [batch], float32 or wider.

    Networks distilled from classifier-free guidance take this embedding as an input (Meng et al. 2023; Luo et al.
    2023). The embedded number is 1000 w, where w = s - 1. The order is [sin, cos], and frequencies are rounded as in
    torch; see `sinusoid`.
    """
    dtype, half = scale.dtype, channels // 2
    exponent = np.arange(half, dtype=dtype) * -(np.log(np.array(10000, dtype)) / np.array(half - 1, dtype))
    frequency = np.exp(exponent.astype(np.float64)).astype(dtype)
    phase = (1000 * (scale - 1))[:, None] * frequency[None]
    return np.pad(np.concatenate([np.sin(phase), np.cos(phase)], -1), ((0, 0), (0, channels % 2)))


class TimestepEmbedding(nnx.Module):
    """Two linear layers, [batch, inputs] -> [batch, outputs].

    With `condition`, a second embedding with `condition` channels is projected and added to the input.
    """

    def __init__(self, inputs: int, outputs: int, activation: str, condition: int = 0):
        self.activation = activation
        self.linear_1 = Linear(inputs, outputs)
        self.cond_proj = Linear(condition, inputs, bias=False) if condition else None
        self.linear_2 = Linear(outputs, outputs)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        if self.cond_proj is not None:
            assert condition is not None
            x = x + self.cond_proj(condition.astype(x.dtype))
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


class AttentionPooling(nnx.Module):
    """Attention pooling, [batch, tokens, channels] -> [batch, channels].

    The query is the mean of the tokens plus a learned position embedding. It attends to itself and to the tokens.
    DeepFloyd-IF took this layer from CLIP's ResNets (Radford et al. 2021) and left out the output projection.
    """

    def __init__(self, channels: int, heads: int):
        self.heads = heads
        self.positional_embedding = parameter(1, channels)
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        mean = x.mean(1, keepdims=True) + self.positional_embedding[...][None]
        x = jnp.concatenate([mean, x], 1)
        return attend(self.q_proj(mean), self.k_proj(x), self.v_proj(x), heads=self.heads)[:, 0]


class TextTimeEmbedding(nnx.Module):
    """Pools the text encoder's hidden states [batch, tokens, channels] into a vector, which is added to the timestep's
    embedding."""

    def __init__(self, inputs: int, outputs: int, heads: int):
        self.norm1 = LayerNorm(inputs)
        self.pool = AttentionPooling(inputs, heads)
        self.proj = Linear(inputs, outputs)
        self.norm2 = LayerNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm2(self.proj(self.pool(self.norm1(x))))
