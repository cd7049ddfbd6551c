"""Paella's VQGAN, which converts pictures to grids of tokens and back (Esser et al. 2021; Paella's published model)."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.config import build
from sega_jax.nn.layers import Conv, DoublingConv, Embed, Linear, along, gelu, normalise, parameter, shuffle, unshuffle

# The side, in pixels, of the squares that the first level turns into channels.
_PATCH = 2


class VQConfig(NamedTuple):
    """The arguments of the published class. The defaults describe `vqgan_f4.pt`.

    The continuous latents are divided by `scale_factor`.
    """

    levels: int = 2
    bottleneck_blocks: int = 12
    c_hidden: int = 384
    c_latent: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.3764

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VQConfig":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        self = build(cls, config, "VQGAN")
        if self.levels > 10 or self.c_hidden % 2 ** (self.levels - 1):
            raise ValueError(
                f"VQGAN config: c_hidden={self.c_hidden} cannot be halved from level to level for levels={self.levels}"
            )
        return self

    @property
    def factor(self) -> int:
        """The height and width in pixels that one token covers."""
        return _PATCH * 2 ** (self.levels - 1)


class BatchNorm(nnx.Module):
    """Batch normalisation with the running statistics from training."""

    def __init__(self, channels: int):
        self.scale = parameter(channels)
        self.bias = parameter(channels)
        self.running_mean = parameter(channels)
        self.running_var = parameter(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        scale, bias, mean, variance = (
            along(p[...], wide) for p in (self.scale, self.bias, self.running_mean, self.running_var)
        )
        return ((wide - mean) * lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


class ResBlock(nnx.Module):
    """A depthwise convolution with edge padding, and an MLP at each position, each with a residual connection.

    Six learned numbers scale and shift the inputs of the two parts and scale their outputs.
    """

    def __init__(self, channels: int):
        hidden = 4 * channels
        self.depthwise: nnx.List[Any] = nnx.List([None, Conv(channels, channels, padding=0, groups=channels)])
        self.channelwise: nnx.List[Any] = nnx.List([Linear(channels, hidden), None, Linear(hidden, channels)])
        self.gammas = parameter(6)

    def __call__(self, x: jax.Array) -> jax.Array:
        g = self.gammas[...]
        h = jnp.pad(self._modulated(x, g[0], g[1]), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        x = x + self.depthwise[1](h) * g[2]
        h = gelu(self.channelwise[0](self._modulated(x, g[3], g[4])))
        return x + self.channelwise[2](h) * g[5]

    def _modulated(self, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        normal = normalise(x, 1e-6)
        return (normal * (1 + scale.astype(normal.dtype)) + shift.astype(normal.dtype)).astype(x.dtype)


class Chain(nnx.List):
    """A sequence of layers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self:
            x = layer(x)
        return x


class VectorQuantize(nnx.Module):
    """A codebook of vectors [codebook_size, c_latent]."""

    def __init__(self, size: int, channels: int):
        self.codebook = Embed(size, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the index of the nearest entry for each vector, int32 [...] for [..., channels].

        Distances are computed in at least float32.
        """
        codes = self.codebook.embedding[...]
        dtype = at_least_float32(x.dtype)
        codes, x = codes.astype(dtype), x.astype(dtype)
        # By default, accelerators round the inputs of a matrix product. The norm of x does not affect which entry is
        # nearest, so it is omitted.
        near = jnp.matmul(x, codes.T, precision=lax.Precision.HIGHEST)
        return jnp.argmin(along(jnp.square(codes).sum(-1), near) - 2 * near, -1).astype(jnp.int32)


class VQModel(nnx.Module):
    """Converts pictures [batch, height, width, 3] in [0, 1] to tokens and back.

    Tokens are int32 [batch, height / f, width / f] below `codebook_size`, where f is `config.factor`. Decoded pictures
    are not clipped to [0, 1].
    """

    def __init__(self, config: VQConfig):
        c = config
        channels = [c.c_hidden // 2**i for i in reversed(range(c.levels))]
        steps = list(itertools.pairwise(channels))
        self.config = c
        self.in_block: nnx.List[Any] = nnx.List([None, Conv(3 * _PATCH**2, channels[0], 1)])
        self.down_blocks = Chain(
            [
                ResBlock(channels[0]),
                *(layer for i, o in steps for layer in (Conv(i, o, 4, stride=2, padding=1), ResBlock(o))),
                Chain([Conv(channels[-1], c.c_latent, 1, bias=False), BatchNorm(c.c_latent)]),
            ]
        )
        self.vquantizer = VectorQuantize(c.codebook_size, c.c_latent)
        self.up_blocks = Chain(
            [
                Chain([Conv(c.c_latent, channels[-1], 1)]),
                *(ResBlock(channels[-1]) for _ in range(c.bottleneck_blocks)),
                *(layer for o, i in reversed(steps) for layer in (DoublingConv(i, o, 4), ResBlock(o))),
            ]
        )
        self.out_block = nnx.List([Conv(channels[0], 3 * _PATCH**2, 1)])

    @staticmethod
    def rename(name: str) -> str:
        return name

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens and the continuous latents of pictures.

        Args:
            image: [batch, height, width, 3], with a height and width divisible by f = `config.factor`.

        Returns:
            The tokens, int32 [batch, height / f, width / f], and the latents before quantisation, divided by
            `scale_factor`, [batch, height / f, width / f, c_latent].

        Raises:
            ValueError: The height or width is not a multiple of f.
        """
        factor = self.config.factor
        if image.shape[1] % factor or image.shape[2] % factor:
            raise ValueError(
                f"pictures have {image.shape[1]}x{image.shape[2]} pixels; height and width should be multiples of"
                f" {factor}"
            )
        conv = self.in_block[1]
        x = self.down_blocks(conv(unshuffle(image.astype(conv.kernel[...].dtype), _PATCH)))
        return self.vquantizer(x), x / self.config.scale_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents to pictures. The latents, quantised or not, have the form that `encode` returns."""
        return self._decode(latents * self.config.scale_factor)

    def decode_indices(self, tokens: jax.Array) -> jax.Array:
        """Decodes tokens to pictures."""
        return self._decode(self.vquantizer.codebook(tokens))

    def _decode(self, x: jax.Array) -> jax.Array:
        conv = self.out_block[0]
        return shuffle(conv(self.up_blocks(x.astype(conv.kernel[...].dtype))), _PATCH)
