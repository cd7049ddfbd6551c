"""A decoder that takes one tile of the latents after another, for pictures whose activations memory does not hold."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Neighbouring tiles share a quarter of their side, over which one is faded into the other, as in diffusers.
SHARES = 4


def tiled(decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, factor: int) -> jax.Array:
    """Pictures [batch, factor height, factor width, channels] of latents [batch, height, width, c], whose tiles are
    decoded by themselves, as `AutoencoderKL.tiled_decode` of diffusers (0.42.1) does.

    What a decoder makes of a tile depends on the whole of it, so this is not quite the whole picture's.

    Args:
        decode: of latents of any height and width.
        tile: latent positions a side, a multiple of 4; tiles at the right and the bottom are smaller.
        factor: pixels a latent position is wide.
    """
    step, fade = tile - tile // SHARES, tile // SHARES * factor
    tops, lefts = (range(0, side, step) for side in latents.shape[1:3])
    places = [(top, left) for top in tops for left in lefts]
    cut = {(top, left): latents[:, top : top + tile, left : left + tile] for top, left in places}
    made: dict[tuple[int, int], jax.Array] = {}
    for shape in dict.fromkeys(one.shape for one in cut.values()):
        alike = [place for place in places if cut[place].shape == shape]
        # One after another: the activations of one are all that is there at once.
        decoded = jax.lax.map(decode, jnp.stack([cut[place] for place in alike]))
        made |= dict(zip(alike, decoded, strict=True))
    rows = []
    for top in tops:
        for left in lefts:
            if top:
                made[top, left] = _faded(made[top - step, left], made[top, left], fade, 1)
            if left:
                made[top, left] = _faded(made[top, left - step], made[top, left], fade, 2)
        kept = [made[top, left][:, : step * factor, : step * factor] for left in lefts]
        rows.append(jnp.concatenate(kept, 2))
    return jnp.concatenate(rows, 1)


def _faded(before: jax.Array, after: jax.Array, fade: int, axis: int) -> jax.Array:
    """A tile whose beginning along an axis comes, position by position, from the end of the tile before."""
    fade = min(before.shape[axis], after.shape[axis], fade)
    steps = (np.arange(fade) / fade).reshape((-1, 1, 1) if axis == 1 else (1, -1, 1))[None]
    share = jnp.asarray(steps, after.dtype)
    end = jax.lax.slice_in_dim(before, before.shape[axis] - fade, None, axis=axis)
    begin = jax.lax.slice_in_dim(after, 0, fade, axis=axis)
    rest = jax.lax.slice_in_dim(after, fade, None, axis=axis)
    return jnp.concatenate([end * (1 - share) + begin * share, rest], axis)
