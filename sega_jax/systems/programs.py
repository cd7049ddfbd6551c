"""The compiled programs that all families share: `start`, `advance` and `fork`, and the end-to-end `generate`.

Each is a pure function that runs on one device's share of the rows and calls the functions of a family's `Sampler`.
`generate` is meant for research, gradients and export.
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

# These numbers are folded into a row's key to draw the initial noise, the noise for a low-resolution picture, the
# latents of a picture to start from, and the prior's noise. To draw the noise for call i, i is folded in. The last two
# numbers are equal and must stay equal, because the noise drawn from existing seeds depends on them. Therefore no
# family may use both.
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
    """Returns the carry of the sampling loop before the first call.

    Args:
        x: The initial state or noise; drawn if None.
        scale: The factor for x: the table's `initial_scale`, or the share of noise at the first call if sampling starts
            from pictures.
        clean: The encoded pictures to start from, [rows, *shape], or None.
        signal: The share of `clean` at the first call.
        shape: The shape of a row's predictions.
    """
    x = sampler.initial(settings, x, scale, clean, signal, shape=shape, dtype=dtype)
    # At this point, only the shapes of the predictions matter to the guidance rules.
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
    """Runs the model calls of a chunk of the schedule. Work that depends only on the text is done once per chunk.

    Args:
        text: The family's text conditioning, [rows, 2 + n, ...].
        carry: The carry from `start` or from the previous chunk.
        table: The chunk's lines in the schedule's table; some may be padding.
        concepts: The number of leading concepts to predict; the others must have no effect on these calls
            (`sega_jax.pipelines.execution.active_concepts`). None predicts all n.

    Returns:
        The carry after the chunk, and the record of its calls [rows, calls, ...] (None without `static.record`).
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
    """Returns a function (call, shape) -> the noise for a call, taken from arrays [rows, calls, ...]."""

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
    """Returns the carry for rows that shared their first calls; the momentum is computed for each row's edits.

    Args:
        x: The states [rows, ...].
        solver: The solver's state, with the rows as the first axis of every array.
        calls: The number of shared model calls.
        past: The predictions of the shared calls, float32 [rows, at least `calls`, ...].
    """
    rule = guidance(settings, static)
    past = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), past)

    def step(state, call):
        i, preds = call

        def update(state):
            return rule.update(preds.uncond, state, preds)[1]

        return jax.lax.cond(i < calls, update, lambda state: state, state), None

    first = jax.tree.map(lambda leaf: leaf[0], past)
    state, _ = jax.lax.scan(step, rule.init(first), (jnp.arange(len(past.uncond)), past))
    axes = row_axes(sampler.solver(None, settings, static.own), x)
    return Carry(x, state, jax.tree.map(lambda leaf, axis: jnp.moveaxis(leaf, 0, axis), solver, axes))


def row_axes(solver: Solver, x: Any) -> Any:
    """Returns the axis of the rows in each array of a solver's state; `x` is a state [rows, ...]."""
    one, two = (jax.eval_shape(solver.init, jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)) for rows in (1, 2))
    return jax.tree.map(lambda a, b: [i == j for i, j in zip(a.shape, b.shape, strict=True)].index(False), one, two)


def complete(preds: Predictions, settings: Settings) -> Predictions:
    """Sets missing concept predictions to the unconditional prediction, so that their edit directions are zero."""
    if preds.edits is None:
        return preds
    missing = settings.n - preds.edits.shape[1]
    return preds._replace(edits=jnp.concatenate([preds.edits, jnp.repeat(preds.uncond[:, None], missing, 1)], 1))


def guidance(settings: Settings, static: Static) -> optax.GradientTransformation:
    """Returns the chain of guidance rules that the settings enable.

    The rules are applied in this order: classifier-free guidance, rescaling, semantic guidance, replayed guidance.
    """
    links = [cfg(settings.guidance_scale)]
    if settings.guidance_rescale is not None:
        links.append(rescale(settings.guidance_rescale))
    if settings.edits is not None:
        links.append(_sega(settings, static))
    if settings.replay is not None:
        links.append(replay(settings.replay))
    return optax.chain(*links)


def recorder(settings: Settings, static: Static) -> Callable[..., Record | None]:
    """Returns `sample`'s argument `keep`, a function that records each call if `static.record` is set."""

    def keep(x, preds, guided, state):
        uncond, cond, edits = (p.astype(at_least_float32(p.dtype)) for p in preds[:3])
        added = jnp.zeros_like(uncond)
        if settings.edits is None:
            return Record(added, uncond, cond, None)
        # Semantic guidance is applied to zero to isolate its contribution. The compiler merges this with the guidance
        # in the sampling loop.
        sega_state = next(link for link in state if isinstance(link, SegaState))
        added, _ = _sega(settings, static).update(added, sega_state, preds)
        return Record(added, uncond, cond, edits)

    return keep if static.record else nothing


def _sega(settings: Settings, static: Static) -> optax.GradientTransformation:
    assert settings.edits is not None
    return sega(settings.edits, semantics=static.semantics, support=static.support)


def recorded_call(record: Any, call: Any) -> Any:
    """Returns one call's entries in a record [rows, calls, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, call, 1, keepdims=False), record)


def as_bytes(pictures: jax.Array, finite: jax.Array) -> jax.Array:
    """Converts pictures [rows, height, width, 3] in [0, 1] to uint8; rows that are not finite become black."""
    return jnp.round(jnp.where(finite[:, None, None, None], pictures, 0) * 255).astype(jnp.uint8)


def normal(key: jax.Array, tag: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws standard normal noise [rows, *shape] from typed keys [rows] after folding `tag` into them."""
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
    """Generates pictures from tokens, as one pure function for all families.

    It is meant for research, gradients and export. `Pipeline.as_function` returns this function and its arguments for a
    call. An upscaler's low-resolution picture is part of `settings.own`.

    Args:
        ids: The family's tokens, a pytree of arrays [rows, 2 + n, ...]; the branches are the negative prompt, the
            prompt and the concepts.
        table: The table of the family's schedule.
        x: The initial state or noise; drawn if None.
        picture: Pictures to start from, [rows, height, width, 3] in [-1, 1], if the family supports this; or None.
        picture_noise: Standard normal noise [rows, *shape] for sampling the pictures' latents; drawn if None.
        text: The family's text conditioning for the first branches, [rows, branches, ...]. If it is given, `ids`
            contains only the remaining branches, or is None if there are none.
        shape: The height, width and channels of a row's predictions.
        decode: Compile-time arguments for the family's `decode`.

    Returns:
        Pictures [rows, height, width, 3] in [0, 1], float32 or wider. They are not checked by a safety checker.
    """
    sampler = system.sampler
    text = _branches(system, models, ids, text, settings.key)
    networks = sampler.networks(models)
    dtype = at_least_float32(jax.tree.leaves(networks)[0].dtype)
    begin = partial(start, settings, x, sampler=sampler, static=static, shape=shape, dtype=dtype)
    if picture is None:
        carry = begin(table.initial_scale[0])
    else:
        assert sampler.encode_image is not None
        clean = sampler.encode_image(sampler.encoder(models), settings.key, picture, picture_noise)
        carry = begin(table.noise[0], clean, table.signal[0])
    carry, _ = advance(networks, text, carry, table, settings, sampler=sampler, static=static)
    return sampler.decode(sampler.decoder(models), carry.x, **decode)[0]


def _branches(system: System, models: Any, ids: Any, text: Any, key: jax.Array) -> Any:
    """Returns the text conditioning of all branches: `text` for the first branches, then the encoded `ids`."""
    reader = system.text
    if ids is not None:
        rows = len(jax.tree.leaves(ids)[0])
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ids)
        encoded = reader.encode(reader.networks(models), flat)
        encoded = jax.tree.map(lambda leaf: leaf.reshape(rows, -1, *leaf.shape[1:]), encoded)
        text = encoded if text is None else jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), text, encoded)
    if reader.sample_prior is not None and (prior := reader.prior(models)) is not None:
        text = reader.sample_prior(prior, text, key)
    return text
