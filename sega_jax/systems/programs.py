"""The compiled programs, which all families share: `start`, `advance`, `fork` and `decode`.

Each is a pure function of one device's share of the rows. A family's `Sampler` says what its denoiser is; `generate`
is the composition of all programs, for research and export.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sega_jax.method.guidance import Predictions, SegaState, cfg, replay, rescale, sega
from sega_jax.method.numerics import at_least_float32
from sega_jax.method.sample import Carry, nothing, sample
from sega_jax.method.solvers import Solver
from sega_jax.systems.base import Record, Sampler, Settings, Static, System

# The numbers that are folded into a row's key for its initial noise, for a low-resolution picture's noise, for the
# latents of a picture to start from, and for a prior; the noise of call i folds in i. The last two share a number,
# which the noise of existing seeds depends on: no family may have both.
INITIAL, LOW_RES, POSTERIOR, PRIOR = 2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 3


def start(
    settings: Settings,
    x: Any,
    scale: Any,
    clean: Any = None,
    signal: Any = None,
    *,
    sampler: Sampler,
    static: Static,
    shape: tuple[int, ...],
    dtype: Any,
) -> Carry:
    """Returns the carry before the first call.

    Args:
        x: the state to start from, or None to draw it.
        scale: the table's `initial_scale`, or its share of noise where the sampling starts from pictures.
        clean: states of the pictures to start from, [rows, *shape], or None.
        signal: their share at the first call.
        shape: of a row's predictions.
    """
    x = sampler.initial(settings, x, scale, clean, signal, shape=shape, dtype=dtype)
    # The guidance rules need only shapes here.
    branch: Any = jax.ShapeDtypeStruct((len(x), *shape), dtype)
    concepts: Any = jax.ShapeDtypeStruct((len(x), settings.n, *shape), dtype)
    preds = Predictions(branch, branch, concepts)
    return Carry(x, guidance(settings, static).init(preds), sampler.solver(None, settings, static.own).init(x))


def advance(
    networks: Any,
    text: Any,
    carry: Carry,
    table: Any,
    settings: Settings,
    *,
    sampler: Sampler,
    static: Static,
    concepts: int | None = None,
) -> tuple[Carry, Record | None]:
    """Takes the rows through a chunk of the schedule. What depends on the text alone is computed once for all calls.

    Args:
        text: the family's conditioning, [rows, 2 + n, ...].
        carry: of `start`, or of the chunk before.
        table: lines of the schedule, some of which may be padding.
        concepts: how many of the n concepts are predicted, the first ones; the others have no effect on these calls
            (`sega_jax.pipelines.execution.active_concepts`). None is all.

    Returns:
        The carry, and with `static.record` the record of the chunk's calls.
    """
    branches = slice(None if concepts is None else 2 + concepts)
    text = jax.tree.map(lambda leaf: leaf[:, branches], text)
    predict = sampler.denoiser(networks, text, settings, static.own, carry.x)

    def denoise(x, call):
        return complete(predict(x, call), settings)

    draw = sampler.draw(networks, settings, carry.x) if settings.noise is None else given_noise(settings.noise)
    carry, kept = sample(
        denoise,
        guidance(settings, static),
        sampler.solver(networks, settings, static.own),
        carry,
        table,
        draw,
        recorder(settings, static),
    )
    if kept is not None and static.record_noise:
        shape = kept.uncond.shape[1:]
        kept = kept._replace(noise=jax.lax.map(lambda call: draw(call, shape), table))
    return carry, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept)


def given_noise(noise: Any) -> Callable:
    """Returns the function that takes a call's noise out of arrays [rows, calls, ...]."""

    def draw(call, shape):
        del shape
        return recorded_call(noise, call.call)

    return draw


def fork(
    settings: Settings,
    x: jax.Array,
    solver: Any,
    calls: Any,
    past: Predictions,
    *,
    sampler: Sampler,
    static: Static,
) -> Carry:
    """Returns the carry of rows that leave a shared prefix, with the momentum that each would have by itself.

    Args:
        x: the states [rows, ...].
        solver: the solver's state, the rows first in every array.
        calls: how many model calls the prefix had.
        past: what was predicted in them, [rows, calls or more, ...] in float32.
    """
    rule = guidance(settings, static)
    past = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), past)

    def step(state, call):
        i, preds = call

        def more(state):
            return rule.update(preds.uncond, state, preds)[1]

        return jax.lax.cond(i < calls, more, lambda state: state, state), None

    first = jax.tree.map(lambda leaf: leaf[0], past)
    state, _ = jax.lax.scan(step, rule.init(first), (jnp.arange(len(past.uncond)), past))
    axes = row_axes(sampler.solver(None, settings, static.own), x)
    return Carry(x, state, jax.tree.map(lambda leaf, axis: jnp.moveaxis(leaf, 0, axis), solver, axes))


def row_axes(solver: Solver, x: Any) -> Any:
    """Returns which axis of each array in a solver's state is that of the rows; `x` is a state [rows, ...]."""
    one, two = (jax.eval_shape(solver.init, jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)) for rows in (1, 2))
    return jax.tree.map(lambda a, b: [i == j for i, j in zip(a.shape, b.shape, strict=True)].index(False), one, two)


def complete(preds: Predictions, settings: Settings) -> Predictions:
    """Adds the concepts that were not predicted: the unconditional prediction, which has no direction."""
    missing = settings.n - preds.edits.shape[1]
    return preds._replace(edits=jnp.concatenate([preds.edits, jnp.repeat(preds.uncond[:, None], missing, 1)], 1))


def guidance(settings: Settings, static: Static) -> optax.GradientTransformation:
    """Returns the chain of guidance rules: classifier-free guidance, rescaled where asked for, semantic guidance where
    there are concepts, and replayed guidance where there is any."""
    links = [cfg(settings.guidance_scale)]
    if settings.guidance_rescale is not None:
        links.append(rescale(settings.guidance_rescale))
    if settings.edits is not None:
        links.append(_sega(settings, static))
    if settings.replay is not None:
        links.append(replay(settings.replay))
    return optax.chain(*links)


def recorder(settings: Settings, static: Static) -> Callable[..., Record | None]:
    """Returns what `sample` keeps of each call: a record, where these choices ask for one."""

    def keep(x, preds, guided, state):
        uncond, cond, edits = (p.astype(at_least_float32(p.dtype)) for p in preds[:3])
        added = jnp.zeros_like(uncond)
        if settings.edits is None:
            return Record(added, uncond, cond, None)
        # Guidance once more, from zero: the compiler sees that it is the same sum and takes it once.
        mine = next(link for link in state if isinstance(link, SegaState))
        added, _ = _sega(settings, static).update(added, mine, preds)
        return Record(added, uncond, cond, edits)

    return keep if static.record else nothing


def _sega(settings: Settings, static: Static) -> optax.GradientTransformation:
    assert settings.edits is not None
    return sega(settings.edits, semantics=static.semantics, support=static.support)


def recorded_call(record: Any, call: Any) -> Any:
    """Returns one call of a record [rows, calls, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, call, 1, keepdims=False), record)


def as_bytes(pictures: jax.Array, finite: jax.Array) -> jax.Array:
    """Returns pictures [rows, height, width, 3] in [0, 1] as uint8, black in rows that are not finite."""
    return jnp.round(jnp.where(finite[:, None, None, None], pictures, 0) * 255).astype(jnp.uint8)


def normal(key: jax.Array, tag: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws standard normal noise [rows, *shape] from typed keys [rows], into which `tag` is folded."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, tag), shape, dtype))(key)


def generate(
    system: System,
    models: Any,
    ids: Any,
    table: Any,
    settings: Settings,
    x: jax.Array | None = None,
    picture: jax.Array | None = None,
    picture_noise: jax.Array | None = None,
    text: Any = None,
    *,
    shape: tuple[int, ...],
    static: Static,
    decode: Mapping[str, Hashable] = MappingProxyType({}),
) -> jax.Array:
    """Makes pictures from tokens as one pure function of any family, for research, gradients and export.

    `Pipeline.as_function` returns it with the arguments of a call. The low-resolution picture of an upscaler is one of
    the family's own settings.

    Args:
        ids: the family's tokens, a pytree of arrays [rows, 2 + n, ...]: of the negative prompt, the prompt and the
            concepts.
        table: of the family's schedule.
        x: the state or noise to start from; None draws it.
        picture: pictures to start from, [rows, height, width, 3] in [-1, 1], for families that can; None for none.
        picture_noise: the standard normal noise with which their states are drawn, [rows, *shape]; None draws it.
        text: the family's text conditioning of the first branches, [rows, branches, ...]; `ids` are then of the other
            branches, or None where there are none.
        shape: height, width and channels of a row's predictions.
        decode: static arguments of the family's `decode`.

    Returns:
        Float32 pictures [rows, height, width, 3] in [0, 1], which no safety checker has seen.
    """
    sampler = system.sampler
    text = _branches(system, models, ids, text, settings.key)
    networks = sampler.networks(models)
    wide = at_least_float32(jax.tree.leaves(networks)[0].dtype)
    begin = partial(start, settings, x, sampler=sampler, static=static, shape=shape, dtype=wide)
    if picture is None:
        carry = begin(table.initial_scale[0])
    else:
        assert sampler.encode_image is not None
        clean = sampler.encode_image(sampler.encoder(models), settings.key, picture, picture_noise)
        carry = begin(table.noise[0], clean, table.signal[0])
    carry, _ = advance(networks, text, carry, table, settings, sampler=sampler, static=static)
    return sampler.decode(sampler.decoder(models), carry.x, **decode)[0]


def _branches(system: System, models: Any, ids: Any, text: Any, key: jax.Array) -> Any:
    """Returns the text conditioning of all branches, of which `text` has the first and `ids` are the others' tokens."""
    reader = system.text
    if ids is not None:
        rows = len(jax.tree.leaves(ids)[0])
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ids)
        read = reader.encode(reader.networks(models), flat)
        read = jax.tree.map(lambda leaf: leaf.reshape(rows, -1, *leaf.shape[1:]), read)
        text = read if text is None else jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), text, read)
    if reader.sample_prior is not None and (prior := reader.prior(models)) is not None:
        text = reader.sample_prior(prior, text, key)
    return text
