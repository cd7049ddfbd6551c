"""Tests the sampling loop with a formula as the denoiser: chunks, rows that are not live, records, noise and
gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from sega_jax import Edit, Edits, Predictions, cfg, sega
from sega_jax.method.sample import Carry, sample
from sega_jax.method.schedules import from_config
from sega_jax.method.solvers import SOLVERS

BATCH, N, SPACE = 2, 2, (4, 3, 2)
STEPS = 6
SETTINGS = Edits.stack([[Edit("a", warmup=1, cooldown=4), Edit("b", warmup=2, threshold=0.5)], [Edit("c", warmup=0)]])
GUIDANCE = optax.chain(cfg(np.array([3.0, 7.5])), sega(SETTINGS))
SCHEDULERS = {"ddim": tiny.DDIM, "multistep": tiny.PNDM}


def denoise(x, row):
    """Moves each branch towards its own wave."""
    wave = jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) + row.timestep.astype(x.dtype)
    edits = jnp.stack([0.1 * x - jnp.sin((k + 2) * wave) for k in range(N)], 1)
    return Predictions(0.2 * x + jnp.sin(wave), 0.1 * x + jnp.cos(wave), edits)


def draw(row, shape):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), row.call), shape)


def keep(x, preds, guided, state):
    return {"x": x, "preds": preds, "guided": guided, "momentum": state[1].momentum, "step": state[1].step}


def table(solver, steps=STEPS):
    return from_config(SCHEDULERS[solver]).table(steps)


def start(solver):
    x = jax.random.normal(jax.random.key(1), (BATCH, *SPACE))
    preds = Predictions(x, x, jnp.zeros((BATCH, N, *SPACE)))
    return Carry(x, GUIDANCE.init(preds), SOLVERS[solver](0.5).init(x))


@partial(jax.jit, static_argnames="solver")
def run(carry, rows, solver):
    return sample(denoise, GUIDANCE, SOLVERS[solver](0.5), carry, rows, draw, keep)


def chunk(rows, first, live, length=4):
    """Returns `live` rows, starting with row `first`, padded with rows that are not live and contain NaN where
    possible."""
    padding = jax.tree.map(lambda c: np.full((length - live, *c.shape[1:]), _poison(c.dtype), c.dtype), rows)
    part = jax.tree.map(lambda c, f: np.concatenate([c[first : first + live], f]), rows, padding)
    return part._replace(live=np.arange(length) < live)


def _poison(dtype):
    return np.nan if dtype.kind == "f" else np.ones((), dtype)


def same(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("splits", [[4, 2], [1, 1, 1, 1, 1, 1], [3, 3], [2, 4], [0, 3, 0, 3]])
def test_chunks_of_any_length_give_the_same_bits(splits, solver):
    rows = table(solver)
    expected, carry = start(solver), start(solver)
    for first, live in ((0, 4), (4, len(rows.call) - 4)):
        expected, _ = run(expected, chunk(rows, first, live), solver)
    splits = [*splits, len(rows.call) - sum(splits)]
    for i, live in enumerate(splits):
        carry, kept = run(carry, chunk(rows, sum(splits[:i]), live), solver)
        assert not any(leaf[live:].any() for leaf in jax.tree.leaves(kept))
    assert same(expected, carry)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_equals_a_python_loop(solver):
    method, rows = SOLVERS[solver](0.5), table(solver)

    @jax.jit
    def call(x, guidance, state, row):
        preds = denoise(x, row)
        guided, guidance = GUIDANCE.update(preds.uncond, guidance, preds)
        x, state = method.update(x, state, guided, None, row, partial(draw, row))
        return x, guidance, state

    carry = start(solver)
    for i in range(len(rows.call)):
        carry = call(*carry, jax.tree.map(lambda c, i=i: c[i], rows))
    np.testing.assert_allclose(run(start(solver), rows, solver)[0].x, carry[0], rtol=1e-4, atol=1e-4)


def test_records_nothing_by_default_and_accepts_any_guidance():
    carry, rows = start("ddim"), table("ddim")
    plain, kept = sample(denoise, cfg(7.5), SOLVERS["ddim"](), carry._replace(guidance=optax.EmptyState()), rows, draw)
    assert kept is None
    assert not np.allclose(plain.x, run(carry, rows, "ddim")[0].x, atol=1e-2)


def test_keep_receives_the_state_before_the_call():
    rows = table("ddim")
    end, kept = run(start("ddim"), rows, "ddim")
    assert kept["x"].shape == (STEPS, BATCH, *SPACE)
    assert np.array_equal(kept["x"][0], start("ddim").x)
    assert kept["step"].tolist() == [[i] * BATCH for i in range(STEPS)]
    assert not kept["momentum"][0].any()
    assert end.guidance[1].step.tolist() == [STEPS] * BATCH
    for i in range(STEPS):
        row = jax.tree.map(lambda c, i=i: jnp.asarray(c[i]), rows)
        for recorded, expected in zip(kept["preds"][:3], denoise(kept["x"][i], row)[:3], strict=True):
            np.testing.assert_allclose(recorded[i], expected, rtol=1e-5, atol=1e-5)


def test_draw_receives_the_row():
    calls = []

    def log(row, shape):
        jax.debug.callback(
            lambda call, timestep: calls.append((int(call), float(timestep), shape)), row.call, row.timestep
        )
        return jnp.zeros(shape)

    rows = table("ddim", 3)
    carry = start("ddim")
    jax.block_until_ready(sample(denoise, GUIDANCE, SOLVERS["ddim"](0.5), carry, rows, log))
    jax.effects_barrier()
    assert sorted(calls) == [(i, t, (BATCH, *SPACE)) for i, t in enumerate(rows.timestep)]


def test_aux_reaches_only_the_solver():
    rows, carry = table("ddim", 2), start("ddim")
    solver, seen = SOLVERS["ddim"](0.0), []

    def update(x, state, estimate, aux, row, draw):
        seen.append(aux)
        return solver.update(x, state, estimate, aux, row, draw)

    def denoise_with_aux(x, row):
        return denoise(x, row)._replace(aux={"variance": x})

    end, _ = sample(denoise_with_aux, GUIDANCE, solver._replace(update=update), carry, rows, draw)
    assert seen[0]["variance"].shape == carry.x.shape
    assert np.array_equal(end.x, sample(denoise, GUIDANCE, solver, carry, rows, draw)[0].x)


def test_gradients_pass_through_the_loop():
    rows, carry = table("ddim", 3), start("ddim")

    @jax.jit
    def loss(scale):
        guidance = optax.chain(cfg(3.0), sega(SETTINGS._replace(scale=scale)))
        return jnp.square(sample(denoise, guidance, SOLVERS["ddim"](0.0), carry, rows, draw)[0].x).mean()

    scale = jnp.asarray(SETTINGS.scale, jnp.float32)
    slope, step = jax.grad(loss)(scale), jnp.zeros_like(scale).at[0, 1].set(0.05)
    np.testing.assert_allclose(slope[0, 1], (loss(scale + step) - loss(scale - step)) / 0.1, rtol=1e-2)
    assert slope[1, 1] == 0
