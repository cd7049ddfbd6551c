"""The KL-autoencoder of Stable Diffusion (diffusers' `AutoencoderKL`)."""

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
    """The fields of `vae/config.json` that shape the network, with diffusers' defaults.

    `scaling_factor` brings latents to unit variance: the sampler's latents are the encoder's times it. `force_upcast`
    says that float16 does not hold its activations; Stable Diffusion XL minds it. `sample_size`, pixels a side of the
    training's pictures, is that of tiles where no other is said. With `latents_mean` and `latents_std`, one number a
    channel, the sampler's latents are (z - mean) scaling_factor / std of the encoder's z.
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
            ValueError: the config describes a network that this module does not compute.
        """
        fixed = {"shift_factor": (None, 0, 0.0)}
        choices = {
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "act_fn": tuple(ACTIVATIONS),
        }
        own = {"latents_mean": None, "latents_std": None}
        self = build(cls, {**config, **own}, "VAE", fixed=fixed, choices=choices)
        mean, std = _statistics(config)
        self = self._replace(latents_mean=mean, latents_std=std)
        if any(numbers and len(numbers) != self.latent_channels for numbers in (mean, std)):
            raise ValueError(
                f"VAE config: latents_mean and latents_std should have {self.latent_channels} numbers, one for each of"
                " latent_channels"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"VAE config: {channels} channels cannot be split into norm_num_groups {self.norm_num_groups}"
                )
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) not in (0, len(self.block_out_channels)):
                raise ValueError(
                    f"VAE config: {name} has {len(getattr(self, name))} entries for"
                    f" {len(self.block_out_channels)} block_out_channels"
                )
        return self

    @property
    def factor(self) -> int:
        """Pixels a latent position is wide."""
        return 2 ** (len(self.block_out_channels) - 1)


def _statistics(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of the latents by channel, where the config has them.

    Raises:
        ValueError: they are no numbers, there is one without the other, or a deviation is not positive.
    """
    given = {name: config[name] for name in ("latents_mean", "latents_std") if config.get(name) is not None}
    for name, value in given.items():
        numbers = value if isinstance(value, list | tuple) else [None]
        right = all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
        if not right or (name == "latents_std" and min(numbers) <= 0):
            kind = "positive numbers" if name == "latents_std" else "numbers"
            raise ValueError(f"VAE config: {name}={str(value)[:40]} should be a list of {kind}")
    if len(given) == 1:
        raise ValueError(f"VAE config: {next(iter(given))} is given alone; latents_mean and latents_std go together")
    return tuple(map(float, given.get("latents_mean", ()))), tuple(map(float, given.get("latents_std", ())))


class SpatialAttention(Attention):
    """One head over all positions of a picture, normalised before and added to its input.

    Unlike its base class, it takes no keys and values.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, 1, bias=True)
        self.group_norm = GroupNorm(groups, channels, _EPS)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens, *self.project(tokens)).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, c: AutoencoderConfig):
        channels = c.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(c, channels, channels) for _ in range(2)])
        self.attentions = nnx.List([SpatialAttention(channels, c.norm_num_groups)] if c.mid_block_add_attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nnx.Module):
    def __init__(self, c: AutoencoderConfig, level: int):
        outputs = c.block_out_channels[level]
        inputs = c.block_out_channels[max(level - 1, 0)]
        self.resnets = nnx.List([_resnet(c, inputs if i == 0 else outputs, outputs) for i in range(c.layers_per_block)])
        last = level == len(c.block_out_channels) - 1
        # Padded on the right and the bottom only, unlike the UNet's.
        self.downsamplers = nnx.List([] if last else [Downsample(outputs, padding=((0, 1), (0, 1)))])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nnx.Module):
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
    def __init__(self, c: AutoencoderConfig):
        channels = c.block_out_channels
        self.conv_in = Conv(c.in_channels, channels[0])
        self.down_blocks = nnx.List([EncoderBlock(c, i) for i in range(len(channels))])
        self.mid_block = MidBlock(c)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[-1], _EPS)
        self.conv_out = Conv(channels[-1], 2 * c.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, c: AutoencoderConfig):
        channels = c.block_out_channels
        self.conv_in = Conv(c.latent_channels, channels[-1])
        self.mid_block = MidBlock(c)
        self.up_blocks = nnx.List([DecoderBlock(c, i) for i in range(len(channels))])
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], _EPS)
        self.conv_out = Conv(channels[0], c.out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Pictures [batch, height, width, 3] in [-1, 1] to and from latents [batch, height/f, width/f, c],
    without `scaling_factor`; f is `config.factor`, c `config.latent_channels`."""

    def __init__(self, config: AutoencoderConfig):
        latent = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv(latent, latent, 1) if config.use_post_quant_conv else None

    @staticmethod
    def rename(name: str) -> str:
        """Files from before diffusers 0.18 name the attention's projections otherwise."""
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The posterior's mean and logarithm of the variance (clipped to [-30, 20])."""
        x = self.encoder(image.astype(self.encoder.conv_in.kernel[...].dtype))
        mean, logvar = jnp.split(x if self.quant_conv is None else self.quant_conv(x), 2, -1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, latents: jax.Array, tile: int | None = None) -> jax.Array:
        """Latents larger than `tile` positions a side, where that is given, in tiles (`sega_jax.nn.vae_tiling`)."""
        if tile is not None and max(latents.shape[1:3]) > tile:
            return tiled(self.decode, latents, tile, self.config.factor)
        x = latents.astype(self.decoder.conv_in.kernel[...].dtype)
        return self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x))
