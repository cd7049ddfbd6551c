"""Stable Diffusion's KL autoencoder (diffusers' `AutoencoderKL`)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.config import build
from sega_jax.nn.layers import ACTIVATIONS, Attention, Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from sega_jax.nn.vae_tiling import tiled

_EPS = 1e-6
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class AutoencoderConfig(NamedTuple):
    """The fields of `vae/config.json` that define the network, with diffusers' defaults.

    `scaling_factor` scales latents to unit variance: the sampler's latents are scaling_factor * z, where z are the
    encoder's latents. With `latents_mean` and `latents_std`, which have one number for each channel, the sampler's
    latents are (z - mean) * scaling_factor / std. `force_upcast` marks networks whose activations exceed the range of
    float16, such as Stable Diffusion XL's. `sample_size`, the side of the training pictures in pixels, is the default
    size of tiles.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    sample_size: int | tuple[int, int] = 32
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        fixed = {"shift_factor": (None, 0, 0.0)}
        choices = {
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "act_fn": tuple(ACTIVATIONS),
        }
        unread = {"latents_mean": None, "latents_std": None}
        self = build(cls, {**config, **unread}, "VAE", fixed=fixed, choices=choices)
        mean, std = _statistics(config)
        self = self._replace(latents_mean=mean, latents_std=std)
        if any(numbers and len(numbers) != self.latent_channels for numbers in (mean, std)):
            raise ValueError(
                f"VAE config: latents_mean and latents_std should each have {self.latent_channels} numbers, one for"
                " each latent channel"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"VAE config: {channels} channels cannot be split into {self.norm_num_groups} groups"
                    " (norm_num_groups)"
                )
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) not in (0, len(self.block_out_channels)):
                raise ValueError(
                    f"VAE config: {name} has {len(getattr(self, name))} entries, but block_out_channels has"
                    f" {len(self.block_out_channels)}; they should have one entry for each level"
                )
        return self

    @property
    def factor(self) -> int:
        """The height and width in pixels that one latent position covers."""
        return 2 ** (len(self.block_out_channels) - 1)


def _statistics(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation of each latent channel; each is () if the config has none.

    Raises:
        ValueError: An entry is not a number, a standard deviation is not positive, or only one of the two lists is set.
    """
    statistics = {name: config[name] for name in ("latents_mean", "latents_std") if config.get(name) is not None}
    for name, value in statistics.items():
        numbers = value if isinstance(value, list | tuple) else [None]
        finite = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        if not finite or (name == "latents_std" and min(numbers) <= 0):
            kind = "positive numbers" if name == "latents_std" else "numbers"
            raise ValueError(f"VAE config: {name}={str(value)[:40]} should be a list of {kind}")
    if len(statistics) == 1:
        raise ValueError(
            f"VAE config: only {next(iter(statistics))} is set; set both latents_mean and latents_std, or neither"
        )
    return tuple(map(float, statistics.get("latents_mean", ()))), tuple(map(float, statistics.get("latents_std", ())))


class SpatialAttention(Attention):
    """Self-attention with one head over all positions of a picture, pre-normalised and with a residual connection.

    Unlike in the base class, `__call__` takes no keys or values.
    """

    def __init__(self, channels: int, groups: int, implementation: str):
        super().__init__(channels, channels, 1, bias=True, implementation=implementation)
        self.group_norm = GroupNorm(groups, channels, _EPS)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens, *self.project(tokens)).reshape(x.shape)


class MidBlock(nnx.Module):
    """Two resnets, with optional attention between them."""

    def __init__(self, c: AutoencoderConfig, implementation: str):
        channels, attends = c.block_out_channels[-1], c.mid_block_add_attention
        self.resnets = nnx.List([_resnet(c, channels, channels) for _ in range(2)])
        self.attentions = nnx.List([SpatialAttention(channels, c.norm_num_groups, implementation)] if attends else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nnx.Module):
    """The resnets of a level, followed by downsampling except at the last level."""

    def __init__(self, c: AutoencoderConfig, level: int):
        outputs = c.block_out_channels[level]
        inputs = c.block_out_channels[max(level - 1, 0)]
        self.resnets = nnx.List([_resnet(c, inputs if i == 0 else outputs, outputs) for i in range(c.layers_per_block)])
        last = level == len(c.block_out_channels) - 1
        # Unlike the UNet, the encoder pads only on the right and at the bottom.
        self.downsamplers = nnx.List([] if last else [Downsample(outputs, padding=((0, 1), (0, 1)))])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nnx.Module):
    """The resnets of a level, followed by upsampling except at level 0; `step` counts from the deepest level."""

    def __init__(self, c: AutoencoderConfig, step: int):
        level = len(c.block_out_channels) - 1 - step
        outputs = c.block_out_channels[level]
        inputs = c.block_out_channels[min(level + 1, len(c.block_out_channels) - 1)]
        self.resnets = nnx.List(
            [_resnet(c, inputs if i == 0 else outputs, outputs) for i in range(c.layers_per_block + 1)]
        )
        self.upsamplers = nnx.List([Upsample(outputs)] if level else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        for up in self.upsamplers:
            x = up(x)
        return x


def _resnet(c: AutoencoderConfig, inputs: int, outputs: int) -> ResnetBlock:
    return ResnetBlock(inputs, outputs, embedding=None, groups=c.norm_num_groups, eps=_EPS, activation=c.act_fn)


class Encoder(nnx.Module):
    """Turns pictures into the concatenated mean and log-variance of the posterior."""

    def __init__(self, c: AutoencoderConfig, implementation: str):
        channels = c.block_out_channels
        self.conv_in = Conv(c.in_channels, channels[0])
        self.down_blocks = nnx.List([EncoderBlock(c, i) for i in range(len(channels))])
        self.mid_block = MidBlock(c, implementation)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[-1], _EPS)
        self.conv_out = Conv(channels[-1], 2 * c.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Turns latents into pictures."""

    def __init__(self, c: AutoencoderConfig, implementation: str):
        channels = c.block_out_channels
        self.conv_in = Conv(c.latent_channels, channels[-1])
        self.mid_block = MidBlock(c, implementation)
        self.up_blocks = nnx.List([DecoderBlock(c, i) for i in range(len(channels))])
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], _EPS)
        self.conv_out = Conv(channels[0], c.out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Converts pictures [batch, height, width, 3] in [-1, 1] to latents [batch, height / f, width / f, c] and back.

    f is `config.factor` and c is `config.latent_channels`. Neither method applies `scaling_factor`.

    Args:
        attention: The implementation of `sega_jax.nn.attention.attend`: "xla", "cudnn" or "pallas".
    """

    def __init__(self, config: AutoencoderConfig, attention: str = "xla"):
        latent = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, attention)
        self.decoder = Decoder(config, attention)
        self.quant_conv = Conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv(latent, latent, 1) if config.use_post_quant_conv else None

    @staticmethod
    def rename(name: str) -> str:
        """Maps a tensor name in a file to a parameter name. Before version 0.18, diffusers used other names for the
        attention projections."""
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the mean of the posterior and the logarithm of its variance, which is clipped to [-30, 20]."""
        x = self.encoder(image.astype(self.encoder.conv_in.kernel[...].dtype))
        mean, logvar = jnp.split(x if self.quant_conv is None else self.quant_conv(x), 2, -1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, latents: jax.Array, tile: int | None = None) -> jax.Array:
        """Decodes latents to pictures, in tiles (`sega_jax.nn.vae_tiling`) if a side is longer than `tile`
        positions."""
        if tile is not None and max(latents.shape[1:3]) > tile:
            return tiled(self.decode, latents, tile, self.config.factor)
        x = latents.astype(self.decoder.conv_in.kernel[...].dtype)
        return self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x))
