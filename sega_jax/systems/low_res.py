"""The low-resolution picture that conditions an upscaler, and the noise that is added to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.schedules import Row, Scheduler
from sega_jax.systems.programs import LOW_RES, recorded_call


class LowResNoise(NamedTuple):
    """How low-resolution pictures are noised: by the forward process of a training, at a timestep, the noise level."""

    scheduler: Scheduler
    most: int  # the highest level


class Upscaling(NamedTuple):
    """What the folder of an upscaler says besides its networks."""

    low_res_noise: LowResNoise


class LowResCondition(NamedTuple):
    """The low-resolution picture of every row. The network sees signal * picture + noise * z."""

    picture: Any  # [rows, height, width, 3] in [-1, 1], without noise
    level: Any  # int32 [rows], the timestep at which the training had as much noise; an input of the network
    signal: Any  # [rows]
    noise: Any  # [rows]
    anew: Any  # bool [rows], whether z is drawn at every call, or once
    z: Any = None  # in place of what is drawn, [rows, 1 or calls, height, width, 3] with the state's sides; or None


def noised(key: jax.Array, low_res: LowResCondition, call: Row) -> jax.Array:
    """Returns the low-resolution pictures as the network sees them at this call, [rows, height, width, 3].

    All branches see the same noise, so that their differences are not differences of noise. DeepFloyd-IF's own code
    draws it again for the prompt and for its absence, at every call.
    """
    dtype = low_res.picture.dtype
    z = _drawn(key, low_res, call) if low_res.z is None else _given(low_res.z, call)
    signal, noise = (share.astype(dtype)[:, None, None, None] for share in (low_res.signal, low_res.noise))
    return signal * low_res.picture + noise * z


def _drawn(key: jax.Array, low_res: LowResCondition, call: Row) -> jax.Array:
    keys = jax.vmap(
        lambda k, fresh: jax.random.fold_in(jax.random.fold_in(k, LOW_RES), jnp.where(fresh, call.call, 0))
    )(key, low_res.anew)
    return jax.vmap(lambda k: jax.random.normal(k, low_res.picture.shape[1:], low_res.picture.dtype))(keys)


def _given(z: Any, call: Row) -> jax.Array:
    return recorded_call(z, jnp.minimum(call.call, z.shape[1] - 1))


def resized(picture: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes pictures [rows, ..., channels] to [rows, *size, channels], by bilinear interpolation between their
    outermost positions, which stay where they are (torch's `align_corners`)."""
    for axis, count in enumerate(size, 1):
        before = picture.shape[axis]
        if before != count:
            at = np.linspace(0, before - 1, count)
            weights = np.maximum(1 - abs(at[:, None] - np.arange(before)), 0).astype(picture.dtype)
            product = jnp.tensordot(weights, picture, (1, axis), precision="highest")
            picture = jnp.moveaxis(product, 0, axis)
    return picture
