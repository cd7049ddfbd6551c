"""Encoding, decoding and picture sizes for families whose states are an autoencoder's latents."""

from typing import Any

import jax
import jax.numpy as jnp

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.unet import UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems.base import Sizes
from sega_jax.systems.programs import POSTERIOR, normal


def encode_image(vae: AutoencoderKL, key: jax.Array, pictures: jax.Array, noise: Any = None) -> jax.Array:
    """Encodes pictures [rows, height, width, 3] in [-1, 1] to normalised latents [rows, ...].

    As in diffusers, the latents are sampled from the normal distribution that the encoder predicts. The standard normal
    `noise` used for sampling has the shape of the latents; if None, it is drawn from the rows' keys.
    """
    mean, logvar = jax.lax.map(lambda one: tuple(part[0] for part in vae.encode(one[None])), pictures)
    mean, logvar = (part.astype(at_least_float32(part.dtype)) for part in (mean, logvar))
    z = normal(key, POSTERIOR, mean.shape[1:], mean.dtype) if noise is None else jnp.asarray(noise, mean.dtype)
    latents_mean, latents_std = _statistics(vae, mean.dtype)
    return (mean + jnp.exp(logvar / 2) * z - latents_mean) * (vae.config.scaling_factor / latents_std)


def decode_latents(vae: AutoencoderKL, latents: jax.Array, *, tile: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Decodes latents [rows, ...] to pictures with values in [0, 1], optionally in tiles.

    Args:
        tile: The side length of a tile in latent positions; None decodes each picture without tiles.

    Returns:
        Pictures [rows, height, width, 3] in float32 or wider, and bool [rows]: whether each row's latents and picture
        are finite.
    """
    # Pictures are decoded one at a time, because a decoder's activations are far larger than its picture.
    mean, std = _statistics(vae, latents.dtype)
    image = jax.lax.map(lambda one: vae.decode(one[None], tile)[0], latents * std / vae.config.scaling_factor + mean)
    image = image.astype(at_least_float32(image.dtype))
    finite = jnp.isfinite(image).all((1, 2, 3)) & jnp.isfinite(latents).all((1, 2, 3))
    return jnp.clip(image / 2 + 0.5, 0, 1), finite


def _statistics(vae: AutoencoderKL, dtype: Any) -> tuple[Any, Any]:
    """Returns the mean and standard deviation of an autoencoder's latents, as arrays with one entry for each channel.

    If the config has none, returns (0, 1).
    """
    c = vae.config
    if not c.latents_mean:
        return 0.0, 1.0
    shape = (1, 1, 1, c.latent_channels)
    return jnp.asarray(c.latents_mean, dtype).reshape(shape), jnp.asarray(c.latents_std, dtype).reshape(shape)


def latent_sizes(net: UNetConfig, auto: AutoencoderConfig) -> Sizes:
    """Returns the picture sizes that a UNet and an autoencoder support."""
    height, width = net.sample_size if isinstance(net.sample_size, tuple) else (net.sample_size,) * 2
    return Sizes(auto.latent_channels, auto.factor, auto.factor, (height * auto.factor, width * auto.factor))


def check_channels(net: UNetConfig, auto: AutoencoderConfig, more: int = 0) -> None:
    """Checks that a UNet has as many output channels as the latents, and `more` additional input channels.

    Raises:
        ValueError: The numbers of channels do not match.
    """
    if not net.in_channels - more == net.out_channels == auto.latent_channels:
        raise ValueError(
            f"the UNet has {net.in_channels} input and {net.out_channels} output channels, and the VAE has"
            f" {auto.latent_channels} latent channels: expected {auto.latent_channels + more} input and"
            f" {auto.latent_channels} output channels; inpainting and depth models are not supported"
        )
