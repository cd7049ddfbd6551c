"""Decoding in tiles, for pictures whose activations do not fit in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# As in diffusers, neighbouring tiles overlap by 1 / SHARES of their side and are blended where they overlap.
SHARES = 4


def tiled(decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, factor: int) -> jax.Array:
    """Decodes latents tile by tile, as diffusers' `AutoencoderKL.tiled_decode` (0.42.1) does.

    The result differs slightly from decoding without tiles, because each tile is decoded on its own.

    Args:
        decode: The function that decodes latents of any height and width.
        latents: [batch, height, width, c].
        tile: The side of a tile in latent positions, a multiple of 4. Tiles at the right and bottom edges may be
            smaller.
        factor: The height and width in pixels that one latent position covers.

    Returns:
        [batch, factor x height, factor x width, channels].
    """
    step, fade = tile - tile // SHARES, tile // SHARES * factor
    tops, lefts = (range(0, side, step) for side in latents.shape[1:3])
    corners = [(top, left) for top in tops for left in lefts]
    tiles = {(top, left): latents[:, top : top + tile, left : left + tile] for top, left in corners}
    decoded: dict[tuple[int, int], jax.Array] = {}
    for shape in dict.fromkeys(one.shape for one in tiles.values()):
        same_shape = [corner for corner in corners if tiles[corner].shape == shape]
        # `map` decodes one tile at a time, so memory holds the activations of only one tile.
        pictures = jax.lax.map(decode, jnp.stack([tiles[corner] for corner in same_shape]))
        decoded |= dict(zip(same_shape, pictures, strict=True))
    rows = []
    for top in tops:
        for left in lefts:
            if top:
                decoded[top, left] = _faded(decoded[top - step, left], decoded[top, left], fade, 1)
            if left:
                decoded[top, left] = _faded(decoded[top, left - step], decoded[top, left], fade, 2)
        cropped = [decoded[top, left][:, : step * factor, : step * factor] for left in lefts]
        rows.append(jnp.concatenate(cropped, 2))
    return jnp.concatenate(rows, 1)


def _faded(before: jax.Array, after: jax.Array, fade: int, axis: int) -> jax.Array:
    """Returns the tile `after`, whose first `fade` positions along an axis are blended linearly with the last positions
    of the tile `before`."""
    fade = min(before.shape[axis], after.shape[axis], fade)
    steps = (np.arange(fade) / fade).reshape((-1, 1, 1) if axis == 1 else (1, -1, 1))[None]
    share = jnp.asarray(steps, after.dtype)
    end = jax.lax.slice_in_dim(before, before.shape[axis] - fade, None, axis=axis)
    begin = jax.lax.slice_in_dim(after, 0, fade, axis=axis)
    rest = jax.lax.slice_in_dim(after, fade, None, axis=axis)
    return jnp.concatenate([end * (1 - share) + begin * share, rest], axis)
