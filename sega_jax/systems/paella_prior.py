"""Sampling from Paella's prior, which draws picture embeddings conditioned on text embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.nn.prior import PriorModel

# From the published inference code.
STEPS, SCALE = 60, 3.0


def sample_prior(prior: PriorModel, text: jax.Array, noise: jax.Array) -> jax.Array:
    """Draws picture embeddings with DDPM (Ho et al. 2020) and classifier-free guidance.

    The unconditional text embedding is all zeros.

    Args:
        text: Text embeddings [rows, channels].
        noise: Standard normal noise [1 + calls, rows, channels] in float32 or wider: the initial state, followed by the
            noise for every call. The last call's noise has no effect.

    Returns:
        Embeddings [rows, channels] in the dtype of the noise.
    """
    dtype = noise.dtype

    def call(x, inputs):
        (t, signal, share, next_noise), z = inputs
        both = jnp.concatenate([x, x]), jnp.broadcast_to(t, (2 * len(x),)), jnp.concatenate([text, 0 * text])
        cond, uncond = jnp.split(prior(*both).astype(dtype), 2)
        eps = uncond + jnp.asarray(SCALE, dtype) * (cond - uncond)
        mean = (x - (1 - share) / jnp.sqrt(1 - signal) * eps) / jnp.sqrt(share)
        return mean + jnp.sqrt((1 - share) * next_noise / (1 - signal)) * z, None

    columns = (column.astype(dtype) for column in _table(len(noise) - 1))
    return jax.lax.scan(call, noise[0], (tuple(map(jnp.asarray, columns)), noise[1:]))[0]


def _table(calls: int) -> tuple[np.ndarray, ...]:
    """Returns the cosine schedule (Nichol & Dhariwal 2021), clipped as in the published code.

    The columns, each [calls], are the noise level, alpha bar, the step's alpha, and 1 - alpha bar after the step (0
    after the last step).
    """
    t = np.linspace(1, 0, calls + 2)[1:]
    shift = 0.008
    bars = np.cos((t + shift) / (1 + shift) * np.pi / 2) ** 2 / np.cos(shift / (1 + shift) * np.pi / 2) ** 2
    bars = np.clip(bars, 1e-4, 0.9999)
    return t[:-1], bars[:-1], bars[:-1] / bars[1:], np.append(1 - bars[1:-1], 0)


def noise(key: jax.Array, channels: int) -> jax.Array:
    """Draws the float32 noise [1 + STEPS, rows, channels] for `sample_prior` from typed keys [rows]."""
    z = jax.vmap(lambda k: jax.random.normal(k, (1 + STEPS, channels), jnp.float32))(key)
    return jnp.moveaxis(z, 0, 1)
