"""The low-resolution picture that conditions an upscaler, and the noise added to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.schedules import Row, Scheduler
from sega_jax.systems.programs import LOW_RES, recorded_call


class LowResNoise(NamedTuple):
    """The forward process that adds noise to low-resolution pictures. A noise level is a timestep of this process."""

    scheduler: Scheduler
    max_level: int  # the highest noise level


class Upscaling(NamedTuple):
    """The settings of an upscaler's checkpoint that are not part of a network."""

    low_res_noise: LowResNoise


class LowResCondition(NamedTuple):
    """The low-resolution picture of every row.

    The network's input is signal * picture + noise * z, where z is normal noise.
    """

    picture: Any  # [rows, height, width, 3] in [-1, 1], without noise
    # int32 [rows], the network's input for the noise level: the training timestep with the same amount of noise
    level: Any
    signal: Any  # [rows]
    noise: Any  # [rows]
    fresh: Any  # bool [rows], whether z is drawn at every call instead of once
    z: Any = None  # z as [rows, 1 or calls, height, width, 3], with the state's height and width; drawn if None


def noised(key: jax.Array, low_res: LowResCondition, call: Row) -> jax.Array:
    """Returns the noisy low-resolution pictures for one model call, [rows, height, width, 3].

    All branches of a row get the same noise, so that the noise does not affect the differences between the branches'
    predictions. The original DeepFloyd-IF code instead draws separate noise for the conditional and the unconditional
    branch.
    """
    dtype = low_res.picture.dtype
    z = _draw(key, low_res, call) if low_res.z is None else _select(low_res.z, call)
    signal, noise = (share.astype(dtype)[:, None, None, None] for share in (low_res.signal, low_res.noise))
    return signal * low_res.picture + noise * z


def _draw(key: jax.Array, low_res: LowResCondition, call: Row) -> jax.Array:
    keys = jax.vmap(
        lambda k, fresh: jax.random.fold_in(jax.random.fold_in(k, LOW_RES), jnp.where(fresh, call.call, 0))
    )(key, low_res.fresh)
    return jax.vmap(lambda k: jax.random.normal(k, low_res.picture.shape[1:], low_res.picture.dtype))(keys)


def _select(z: Any, call: Row) -> jax.Array:
    return recorded_call(z, jnp.minimum(call.call, z.shape[1] - 1))


def resized(picture: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes pictures [rows, ..., channels] to [rows, *size, channels] by linear interpolation along each axis.

    The centres of the corner pixels stay in place, as with `align_corners=True` in torch.
    """
    for axis, count in enumerate(size, 1):
        old_count = picture.shape[axis]
        if old_count != count:
            positions = np.linspace(0, old_count - 1, count)
            weights = np.maximum(1 - abs(positions[:, None] - np.arange(old_count)), 0).astype(picture.dtype)
            product = jnp.tensordot(weights, picture, (1, axis), precision="highest")
            picture = jnp.moveaxis(product, 0, axis)
    return picture
