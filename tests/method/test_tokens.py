"""Tests token sampling with semantic guidance applied to the logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import oracle

from sega_jax import Edit, Edits, Predictions, cfg, sega
from sega_jax.method.guidance import SUPPORTS
from sega_jax.method.sample import Carry, sample
from sega_jax.method.schedules.tokens import renoising
from sega_jax.method.solvers import Chances, renoise

SPACE, LABELS, STEPS, SCALE = (5, 4), 12, 7, 3.0
EDITS = [Edit("a", scale=4, threshold=0.6, warmup=1), Edit("b", scale=-3, threshold=0.3, warmup=3, cooldown=6)]
rng = np.random.default_rng(0)
WEIGHTS = rng.standard_normal((2 + len(EDITS), LABELS, LABELS))
CODES = rng.standard_normal((LABELS, 3))
START = rng.integers(0, LABELS, (1, *SPACE)).astype(np.int32)
CHANCES = Chances(rng.gumbel(size=(STEPS, 1, *SPACE, LABELS)), rng.random((STEPS, 1, *SPACE)))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def denoise(n, x, row):
    out = jnp.asarray(WEIGHTS)[:, x] * (0.5 + row.timestep) + jnp.asarray(WEIGHTS)[:, x[:, ::-1]]
    return Predictions(out[0], out[1], jnp.moveaxis(out[2 : 2 + n], 0, 1))


def draw(row, shape):
    assert shape == (1, *SPACE, LABELS)
    return jax.tree.map(lambda column: jnp.asarray(column)[row.call], CHANCES)


def run(table, support="channel", edits=EDITS, **options):
    """Returns the last grid, and the grid, predictions and guided logits of every call."""
    guidance, solver = optax.chain(cfg(SCALE), sega(Edits.stack([edits]), support=support)), renoise(**options)
    logits = jax.ShapeDtypeStruct((1, *SPACE, LABELS), np.float64)
    concepts = jax.ShapeDtypeStruct((1, len(edits), *SPACE, LABELS), np.float64)
    first = Carry(jnp.asarray(START), guidance.init(Predictions(logits, logits, concepts)), solver.init(START))
    predict = partial(denoise, len(edits))
    carry, kept = sample(predict, guidance, solver, first, table, draw, lambda x, preds, guided, _: (x, preds, guided))
    return np.asarray(carry.x), jax.tree.map(np.asarray, kept)


def added(preds, edits=EDITS):
    """Returns the oracle's guidance for every call."""
    settings = {name: [getattr(edit, name) for edit in edits] for name in vars(edits[0]) if name != "concept"}
    settings |= {"momentum_scale": [0.1] * len(edits), "momentum_beta": [0.4] * len(edits)}
    reverse = [False] * len(edits)
    return oracle.guidance(preds.uncond[:, 0], preds.edits[:, 0], **settings, reverse=reverse, semantics="diffusers")


@pytest.mark.parametrize("choice", ["sample", "argmax", "nearest"])
def test_guided_tokens_equal_a_numpy_loop(choice):
    last, (grids, preds, guided) = run(renoising(STEPS, renoise_steps=4), choice=choice, codebook=jnp.asarray(CODES))
    logits = preds.uncond + SCALE * (preds.cond - preds.uncond) + added(preds)[:, None]
    np.testing.assert_allclose(guided, logits, rtol=1e-12, atol=1e-12)
    for i, following in enumerate([*grids[1:], last]):
        scaled = logits[i] / np.linspace(1.2, 0.2, STEPS)[i]
        if choice == "sample":
            scaled = scaled + CHANCES.gumbel[i]
        if choice == "nearest":
            share = np.exp(scaled - scaled.max(-1, keepdims=True))
            expected = share / share.sum(-1, keepdims=True) @ CODES
            drawn = ((expected[..., None, :] - CODES) ** 2).sum(-1).argmin(-1)
        else:
            drawn = scaled.argmax(-1)
        back = (CHANCES.uniform[i] <= 1 - (i + 1) / STEPS) & (i < 4)
        np.testing.assert_array_equal(following, np.where(back, START, drawn))
    assert (grids[1:5] == START).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choice": "likeliest"}, "choice='likeliest' should be one of sample"),
        ({"choice": "nearest"}, "needs the code"),
    ],
)
def test_invalid_choices(options, message):
    with pytest.raises(ValueError, match=message):
        renoise(**options)


def test_guidance_of_the_authors_paella_code():
    """From the warm-up on, the authors' code for Paella adds psi unchanged, without threshold or momentum."""
    edit = Edit("a", scale=4, threshold=0, warmup=2, momentum_scale=0)
    _, (_, preds, guided) = run(renoising(STEPS), edits=[edit])
    logits = preds.uncond + SCALE * (preds.cond - preds.uncond)
    logits[2:] += 4 * (preds.edits[2:, :, 0] - preds.uncond[2:])
    np.testing.assert_allclose(guided, logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("support", "axes"), [("channel", (0, 1)), ("latent", (0, 1, 2)), ("position", 2), ("pixel", (0, 1))]
)
def test_supports_share_the_right_quantiles(support, axes):
    edit = Edit("a", scale=1, threshold=0.6, warmup=0, momentum_scale=0)
    _, (_, preds, guided) = run(renoising(STEPS), support, [edit])
    psi = preds.edits[0, 0, 0] - preds.uncond[0, 0]
    magnitude = np.abs(psi).sum(-1, keepdims=True) if support == "pixel" else None
    expected = preds.uncond[0, 0] + SCALE * (preds.cond - preds.uncond)[0, 0]
    expected += oracle.above(psi, 0.6, axes, magnitude)
    np.testing.assert_allclose(guided[0, 0], expected, rtol=1e-12, atol=1e-12)
    assert {"channel", "latent", "position", "pixel"} == set(SUPPORTS)


def test_drawn_tokens_have_the_distribution_of_the_logits():
    logits, n = np.log([0.1, 0.2, 0.3, 0.4]), 40000
    table = renoising(1, temperature=(0.5, 0.5))
    row = jax.tree.map(lambda column: column[0], table)
    chances = Chances(jax.random.gumbel(jax.random.key(0), (1, n, 4)), jnp.zeros((1, n)))
    x, _ = renoise().update(
        jnp.zeros((1, n), int),
        jnp.zeros((1, n), int),
        jnp.broadcast_to(logits, (1, n, 4)),
        None,
        row,
        lambda _: chances,
    )
    expected = np.exp(2 * logits) / np.exp(2 * logits).sum()
    # The tolerance is five standard deviations.
    assert (abs(np.bincount(x[0], minlength=4) / n - expected) < 5 * np.sqrt(expected / n)).all()


def test_schedule():
    table = renoising(4, temperature=(1.0, 0.4))
    np.testing.assert_allclose(table.timestep, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(table.solver.noise, [0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(table.solver.temperature, [1, 0.8, 0.6, 0.4])
    assert table.solver.renoises.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "steps=0 should be at least 1"),
        (4, {"renoise_steps": 5}, "renoise_steps=5 should be from 0 to steps=4"),
        (4, {"temperature": (1.0, 0.0)}, "two positive numbers"),
        (4, {"temperature": (1.0, np.nan)}, "two positive numbers"),
        (4, {"temperature": (1.0,)}, "two positive numbers"),
    ],
)
def test_invalid_schedules(steps, options, message):
    with pytest.raises(ValueError, match=message):
        renoising(steps, **options)
