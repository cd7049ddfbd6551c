"""Paella's prior, which turns a CLIP text embedding into a CLIP picture embedding (the published `PriorModel`, after
Ramesh et al. 2022, arXiv 2204.06125)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.config import build
from sega_jax.nn.layers import LayerNorm, Linear, gelu
from sega_jax.nn.paella import wave


class PriorConfig(NamedTuple):
    """The arguments of the published class. The defaults describe `prior_v1.pt`."""

    clip_r: int = 1024
    c_hidden: int = 1280
    c_r: int = 64
    num_blocks: int = 48

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PriorConfig":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        self = build(cls, config, "prior")
        if self.c_r < 4:
            raise ValueError(f"prior config: c_r={self.c_r} should be at least 4")
        return self


class Block(nnx.List):
    """A linear layer, a norm, a gelu (without parameters), a linear layer and a norm."""

    def __init__(self, inputs: int, channels: int):
        hidden = 4 * channels
        first, last = Linear(inputs, hidden, bias=False), Linear(hidden, channels, bias=False)
        super().__init__([first, LayerNorm(hidden), None, last, LayerNorm(channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, norm, _, last, norm_out = self
        return norm_out(last(gelu(norm(first(x)))))


class PriorModel(nnx.Module):
    """Paella's prior. `__call__(x, r, text)` returns the predicted noise in a picture embedding.

    x: [batch, clip_r], the noisy embedding; r: [batch] in [0, 1], the noise level (kept in float32 or wider);
    text: [batch, clip_r], the embedding of the text, or zeros for no text -> [batch, clip_r] in the dtype of the
    parameters. All embeddings are unnormalised OpenCLIP embeddings.
    """

    def __init__(self, config: PriorConfig):
        c = config
        inputs = c.clip_r + c.c_hidden + c.c_r
        blocks = [Block(inputs, c.c_hidden) for _ in range(c.num_blocks)]
        self.config = c
        self.blocks: nnx.List[Any] = nnx.List([Linear(c.clip_r, c.c_hidden), *blocks, Linear(c.c_hidden, c.clip_r)])

    @staticmethod
    def rename(name: str) -> str:
        return name

    def __call__(self, x: jax.Array, r: jax.Array, text: jax.Array) -> jax.Array:
        first, *blocks, last = self.blocks
        dtype = first.kernel[...].dtype
        conditions = [text.astype(dtype), wave(r, self.config.c_r).astype(dtype)]
        x = first(x.astype(dtype))
        for block in blocks:
            x = x + block(jnp.concatenate([x, *conditions], -1))
        return last(x)
