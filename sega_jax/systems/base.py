"""What the systems of continuous states share, latents or pixels: the numbers of a call, its start, and its way
through the schedule with one call of a UNet for all branches.

States and pictures are channels last. Axes: rows of the batch, branches (2 + n: unconditional, prompt, concepts),
tokens, channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.method.guidance import Edits, Predictions, SegaState, cfg, replay, rescale, sega
from sega_jax.method.numerics import at_least_float32
from sega_jax.method.sample import Carry, nothing, sample
from sega_jax.method.schedules import Row
from sega_jax.method.solvers import SOLVERS, Solver
from sega_jax.nn.unet import Projected, UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL

# Where the initial noise is drawn from a key, that of small pictures, and that of pictures that the sampling starts
# from; the noise of call i is drawn at i.
INITIAL, _SMALL, POSTERIOR = 2**32 - 1, 2**32 - 2, 2**32 - 3


class Usual(NamedTuple):
    """Of a call, what goes without saying."""

    steps: int
    guidance_scale: float
    noise_level: int | None = None


class Sizes(NamedTuple):
    """Of what a checkpoint makes."""

    channels: int  # of the state
    factor: int  # pixels of a picture along a side, for one position of the state
    multiple: int  # that height and width in pixels are of
    usual: tuple[int, int] | None  # height and width in pixels; None where the small picture says them
    enlarges: int = 0  # how many times larger than a small picture; 0 where there is none


class Method(NamedTuple):
    """What is compiled in; everything else is a number that a program takes."""

    solver: str = "ddim"
    semantics: str = "diffusers"
    support: str = "channel"
    record: bool = False
    rows_at_once: int | None = None  # whose predictions a device makes at once; None is all


class Small(NamedTuple):
    """The small picture of every row that an upscaler enlarges. It sees signal * picture + noise * z."""

    picture: Any  # [rows, height, width, 3] in [-1, 1], without noise
    level: Any  # int32 [rows], the timestep at which the training had as much noise; the network is told
    signal: Any  # [rows]
    noise: Any  # [rows]
    anew: Any  # bool [rows], whether z is drawn at every call, or once


class Settings(NamedTuple):
    """The numbers of every row."""

    key: jax.Array  # typed keys [rows]
    guidance_scale: Any  # [rows]
    eta: Any  # [rows]
    edits: Edits | None  # [rows, n] each; None for no concepts at all
    replay: Any = None  # [rows, calls, height, width, channels] to be added, or None
    small: Small | None = None  # of upscalers
    guidance_rescale: Any = None  # [rows] in [0, 1]; None for none at all
    sizes: Any = None  # of Stable Diffusion XL, [rows, 6]: original height and width, crop's top and left, target's


class Record(NamedTuple):
    """What every model call predicted, and what semantic guidance added; [rows, calls, ...] in float32."""

    sem_guidance: jax.Array  # [rows, calls, height, width, channels], without cfg and without replay
    uncond: jax.Array  # likewise
    cond: jax.Array  # likewise
    edits: jax.Array | None  # [rows, calls, n, height, width, channels]; None without concepts


def start(
    settings: Settings,
    latents: Any,
    scale: Any,
    clean: Any = None,
    signal: Any = None,
    *,
    shape: tuple[int, ...],
    method: Method,
    dtype: Any,
) -> Carry:
    """The carry before the first call, from standard normal latents, given [rows, *shape] or of each row's key,
    times the table's `initial_scale`.

    Where the sampling starts from the states of pictures, `clean` [rows, *shape], it is signal * clean + scale *
    latents, of the shares at the table's first row.
    """
    if latents is None:
        latents = _noise(settings.key, INITIAL, shape, dtype)
    x = jnp.asarray(latents, dtype) * jnp.asarray(scale).astype(dtype)
    if clean is not None:
        x += jnp.asarray(clean, dtype) * jnp.asarray(signal).astype(dtype)
    n = 0 if settings.edits is None else settings.edits.scale.shape[1]
    branch = jax.ShapeDtypeStruct(x.shape, x.dtype)
    preds = Predictions(branch, branch, jax.ShapeDtypeStruct((len(x), n, *shape), x.dtype))
    guidance, solver = _method(settings, method)
    return Carry(x, guidance.init(preds), solver.init(x))


def embed(vae: AutoencoderKL, key: jax.Array, pictures: jax.Array) -> jax.Array:
    """Pictures [rows, height, width, 3] in [-1, 1] -> the latents that the sampler takes [rows, ...], drawn by the
    rows' keys from the distribution that the encoder says, as diffusers draws them."""
    mean, logvar = jax.lax.map(lambda one: tuple(part[0] for part in vae.encode(one[None])), pictures)
    mean, logvar = (part.astype(at_least_float32(part.dtype)) for part in (mean, logvar))
    z = _noise(key, POSTERIOR, mean.shape[1:], mean.dtype)
    return (mean + jnp.exp(logvar / 2) * z) * vae.config.scaling_factor


def advance(
    unet: UNet2DConditionModel,
    text: jax.Array,
    carry: Carry,
    table: Row,
    settings: Settings,
    *,
    method: Method,
    concepts: int | None = None,
) -> tuple[Carry, Record | None]:
    """Takes the rows through a chunk of the schedule; the text's keys and values are computed once for all its calls.

    Args:
        text: hidden states [rows, 2 + n, tokens, channels], or all that the UNet is told of each branch.
        carry: of `start`, or of the chunk before.
        table: rows of the schedule, some of which may be filling.
        concepts: how many of the n are predicted, the first; the others are none that these calls need, by
            `sega_jax.pipelines.execution.active_concepts`. None is all.

    Returns:
        The carry, and with `method.record` the record of the chunk's calls.
    """
    guidance, solver = _method(settings, method)
    branches = slice(None if concepts is None else 2 + concepts)
    texts = unet.project(jax.tree.map(lambda leaf: leaf[:, branches].reshape(-1, *leaf.shape[2:]), text))
    small = settings.small
    if small is not None:
        small = small._replace(picture=enlarge(jnp.asarray(small.picture, carry.x.dtype), carry.x.shape[1:3]))

    def denoise(x, row):
        seen = None if small is None else (noised(settings.key, small, row), small.level)

        def some(x, texts, seen):
            return predict(unet, texts, x, row, seen)

        return complete(in_parts(some, method.rows_at_once, x, texts, seen), settings)

    def draw(row, shape):
        return _noise(settings.key, row.call, shape[1:], carry.x.dtype)

    carry, kept = sample(denoise, guidance, solver, carry, table, draw, recorder(settings, method))
    return carry, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept)


def depart(settings: Settings, x: jax.Array, solver: Any, calls: Any, past: Predictions, *, method: Method) -> Carry:
    """The carry of rows that were on a shared way until now, with the momentum that each would have by itself.

    Args:
        x: the states [rows, height, width, channels].
        solver: the solver's state, the rows first in every array.
        calls: how many there were.
        past: what was predicted in them, [rows, calls or more, ...] in float32.
    """
    guidance, of = _method(settings, method)
    past = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), past)

    def step(state, call):
        i, preds = call

        def more(state):
            return guidance.update(preds.uncond, state, preds)[1]

        return jax.lax.cond(i < calls, more, lambda state: state, state), None

    first = jax.tree.map(lambda leaf: leaf[0], past)
    state, _ = jax.lax.scan(step, guidance.init(first), (jnp.arange(len(past.uncond)), past))
    solver = jax.tree.map(lambda leaf, axis: jnp.moveaxis(leaf, 0, axis), solver, row_axes(of, x.shape[1:]))
    return Carry(x, state, solver)


def row_axes(solver: Solver, shape: tuple[int, ...]) -> Any:
    """Which axis of each array in a solver's state is that of the rows."""
    one, two = (jax.eval_shape(solver.init, jax.ShapeDtypeStruct((rows, *shape), jnp.float32)) for rows in (1, 2))
    return jax.tree.map(lambda a, b: [i == j for i, j in zip(a.shape, b.shape, strict=True)].index(False), one, two)


def predict(
    unet: UNet2DConditionModel, texts: Projected, x: jax.Array, row: Row, small: tuple[jax.Array, Any] | None = None
) -> Predictions:
    """All 2 + n branches of every row in one call of the network, which is told what it made of the text of each.

    Of an upscaler `small` is the noisy small picture [rows, height, width, 3], as large as x, and its noise level
    [rows]; diffusers multiplies DeepFloyd-IF's by the solver's `input_scale`, too, which is 1 for its scheduler.

    Where the network predicts the variance beside the estimate, that of the prompt is the solver's and the others
    are left out, as in diffusers: guidance is of the estimate alone.
    """
    seen, level = x * row.input_scale.astype(x.dtype), ()
    if small is not None:
        seen, level = jnp.concatenate([seen, small[0].astype(x.dtype)], -1), (small[1],)
    timestep = jnp.broadcast_to(row.timestep.astype(x.dtype), x.shape[:1])
    out = unet(seen, timestep, texts, *level)
    out = out.reshape(len(x), -1, *out.shape[1:])
    estimate, variance = out[..., : x.shape[-1]], out[:, 1, ..., x.shape[-1] :]
    return Predictions(estimate[:, 0], estimate[:, 1], estimate[:, 2:], variance if variance.size else None)


def in_parts(function: Callable[..., Any], most: int | None, x: jax.Array, *trees: Any) -> Any:
    """A function of rows, x [rows, ...] and arrays whose first axis is that of rows or of the branches of each, taken
    for `most` rows after another, in as few parts of one size as that makes; None is all at once."""
    rows = len(x)
    if most is None or most >= rows:
        return function(x, *trees)
    parts = -(-rows // most)
    size = -(-rows // parts)
    # The last part is filled up by copies of the last row.
    index = np.minimum(np.arange(parts * size), rows - 1)

    def cut(leaf):
        leaf = leaf.reshape(rows, -1, *leaf.shape[1:])
        leaf = leaf if len(index) == rows else leaf[index]
        return leaf.reshape(parts, size * leaf.shape[1], *leaf.shape[2:])

    made = jax.lax.map(lambda part: function(*part), jax.tree.map(cut, (x, *trees)))
    return jax.tree.map(lambda leaf: leaf.reshape(parts * size, *leaf.shape[2:])[:rows], made)


def complete(preds: Predictions, settings: Any) -> Predictions:
    """With the concepts of `settings` that were not predicted, in the place of which the unconditional prediction is,
    from which there is no direction."""
    missing = 0 if settings.edits is None else settings.edits.scale.shape[1] - preds.edits.shape[1]
    return preds._replace(edits=jnp.concatenate([preds.edits, jnp.repeat(preds.uncond[:, None], missing, 1)], 1))


def noised(key: jax.Array, small: Small, row: Row) -> jax.Array:
    """The small pictures as an upscaler sees them at this call, [rows, height, width, 3].

    All branches see the same noise, lest their differences be of it. DeepFloyd-IF's own code draws it anew for the
    prompt and for its absence, at every call.
    """
    dtype = small.picture.dtype
    keys = jax.vmap(lambda k, anew: jax.random.fold_in(jax.random.fold_in(k, _SMALL), jnp.where(anew, row.call, 0)))(
        key, small.anew
    )
    z = jax.vmap(lambda k: jax.random.normal(k, small.picture.shape[1:], dtype))(keys)
    signal, noise = (share.astype(dtype)[:, None, None, None] for share in (small.signal, small.noise))
    return signal * small.picture + noise * z


def enlarge(picture: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pictures [rows, ..., channels] in another size [rows, *size, channels], by bilinear interpolation between
    their outermost positions, which stay where they are (torch's `align_corners`)."""
    for axis, count in enumerate(size, 1):
        before = picture.shape[axis]
        if before != count:
            at = np.linspace(0, before - 1, count)
            weights = np.maximum(1 - abs(at[:, None] - np.arange(before)), 0).astype(picture.dtype)
            product = jnp.tensordot(weights, picture, (1, axis), precision="highest")
            picture = jnp.moveaxis(product, 0, axis)
    return picture


def recorded(record: Any, call: Any) -> Any:
    """Of a record [rows, calls, ...] one call's."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, call, 1, keepdims=False), record)


def as_bytes(pictures: jax.Array, finite: jax.Array) -> jax.Array:
    """Pictures [rows, height, width, 3] in [0, 1] as uint8, black in the rows that are not finite."""
    return jnp.round(jnp.where(finite[:, None, None, None], pictures, 0) * 255).astype(jnp.uint8)


def guiding(
    settings: Any, method: Any, *more: optax.GradientTransformation, rescaled: Any = None
) -> optax.GradientTransformation:
    """Classifier-free guidance, rescaled by shares [rows] or None, then semantic guidance where there are edits, then
    more."""
    plain = [cfg(settings.guidance_scale)] + ([] if rescaled is None else [rescale(rescaled)])
    edited = [] if settings.edits is None else [_sega(settings, method)]
    return optax.chain(*plain, *edited, *more)


def recorder(settings: Any, method: Any) -> Callable[..., Record | None]:
    """What `sample` keeps of a call that `guiding` guides: its record, where the method has one."""

    def keep(x, preds, guided, state):
        uncond, cond, edits = (p.astype(at_least_float32(p.dtype)) for p in preds[:3])
        added = jnp.zeros_like(uncond)
        if settings.edits is None:
            return Record(added, uncond, cond, None)
        # Guidance once more, from zero: the compiler sees that it is the same sum and takes it once.
        mine = next(link for link in state if isinstance(link, SegaState))
        added, _ = _sega(settings, method).update(added, mine, preds)
        return Record(added, uncond, cond, edits)

    return keep if method.record else nothing


def _sega(settings: Any, method: Any) -> optax.GradientTransformation:
    return sega(settings.edits, semantics=method.semantics, support=method.support)


def _method(settings: Settings, method: Method) -> tuple[optax.GradientTransformation, Solver]:
    replayed = [] if settings.replay is None else [replay(settings.replay)]
    return guiding(settings, method, *replayed, rescaled=settings.guidance_rescale), SOLVERS[method.solver](
        settings.eta
    )


def _noise(key: jax.Array, tag: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, tag), shape, dtype))(key)
