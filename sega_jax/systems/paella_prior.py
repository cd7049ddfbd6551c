"""Embeddings of pictures drawn for embeddings of texts, by Paella's prior."""

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.nn.prior import PriorModel

# Of the published inference code.
STEPS, SCALE = 60, 3.0


def sample_prior(prior: PriorModel, text: jax.Array, noise: jax.Array) -> jax.Array:
    """Draws by DDPM (Ho et al. 2020), guided without a classifier against no text, which is zeros.

    Args:
        text: embeddings [rows, channels].
        noise: standard normal, [1 + calls, rows, channels] in float32 or wider: where to start, and of every call. The
            last call's is not used.

    Returns:
        Embeddings [rows, channels] in the dtype of the noise.
    """
    dtype = noise.dtype

    def call(x, given):
        (t, signal, share, before), z = given
        both = jnp.concatenate([x, x]), jnp.broadcast_to(t, (2 * len(x),)), jnp.concatenate([text, 0 * text])
        cond, uncond = jnp.split(prior(*both).astype(dtype), 2)
        eps = uncond + jnp.asarray(SCALE, dtype) * (cond - uncond)
        mean = (x - (1 - share) / jnp.sqrt(1 - signal) * eps) / jnp.sqrt(share)
        return mean + jnp.sqrt((1 - share) * before / (1 - signal)) * z, None

    columns = (column.astype(dtype) for column in _table(len(noise) - 1))
    return jax.lax.scan(call, noise[0], (tuple(map(jnp.asarray, columns)), noise[1:]))[0]


def _table(calls: int) -> tuple[np.ndarray, ...]:
    """Of every call its noise level, the share of signal abar, that of the step alone, and the share of noise after
    it (0 after the last); the cosine schedule (Nichol & Dhariwal 2021), bounded as in the published code."""
    t = np.linspace(1, 0, calls + 2)[1:]
    shift = 0.008
    bars = np.cos((t + shift) / (1 + shift) * np.pi / 2) ** 2 / np.cos(shift / (1 + shift) * np.pi / 2) ** 2
    bars = np.clip(bars, 1e-4, 0.9999)
    return t[:-1], bars[:-1], bars[:-1] / bars[1:], np.append(1 - bars[1:-1], 0)


def noise(key: jax.Array, channels: int) -> jax.Array:
    """What `sample_prior` takes, float32 of typed keys [rows]."""
    drawn = jax.vmap(lambda k: jax.random.normal(k, (1 + STEPS, channels), jnp.float32))(key)
    return jnp.moveaxis(drawn, 0, 1)
