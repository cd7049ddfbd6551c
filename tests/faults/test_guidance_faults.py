"""Faults in semantic guidance: thresholds, warm-ups and cool-downs, padding, momentum, and active concepts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import oracle

from faults.damage import argument, override, replaced, result
from faults.views import Fault, View, Views, compiled
from sega_jax.method import guidance
from sega_jax.method.guidance import Edit, Edits, Predictions, quantile
from sega_jax.pipelines.execution import active_concepts

pytestmark = pytest.mark.fault

CALLS, SPACE = 7, (5, 4, 3)
DRAW = np.random.default_rng(0).standard_normal
PREDICTIONS = Predictions(DRAW((CALLS, 2, *SPACE)), DRAW((CALLS, 2, *SPACE)), DRAW((CALLS, 2, 3, *SPACE)))
# Two rows of concepts whose momentum continues after they cool down. In the second row, there are calls at which every
# concept that has warmed up has cooled down or has weight 0, while another concept has not warmed up yet.
FIRST = {
    "scale": [4, 5, 6],
    "reverse": [False, True, False],
    "threshold": [0.9, 0.5, 1.0],
    "warmup": [0, 3, 1],
    "cooldown": [2, 5, None],
    "weight": [2.0, 0.5, 1.0],
    "momentum_scale": [0.4] * 3,
    "momentum_beta": [0.7] * 3,
}
SECOND = FIRST | {
    "threshold": [0.7, 0.0, 0.8],
    "warmup": [1, 4, 0],
    "cooldown": [2, None, 1],
    "weight": [1.0, 3.0, 0.0],
}
SHORT = {name: values[:2] for name, values in FIRST.items()}
# The same rows in reverse order, so that the concepts that cool down first come last.
LATE = [{name: values[::-1] for name, values in row.items()} for row in (FIRST, SECOND)]
# Magnitudes with a wide range and many equal values.
EQUAL = np.random.default_rng(3).integers(0, 9, (2, 20, 3)) / 7 * 2.0 ** np.arange(-60, 60, 40)
EQUAL = EQUAL.astype(np.float32)


def stacked(rows):
    """Converts rows from the oracle's format to the library's `Edits`."""
    names = [name for name in FIRST if name != "reverse"]
    edits = [
        [
            Edit("", **{name: row[name][k] for name in names} | {"scale": row["scale"][k] * (-1) ** row["reverse"][k]})
            for k in range(len(row["scale"]))
        ]
        for row in rows
    ]
    return Edits.stack(edits)


def run(edits, predictions, **options):
    """Returns the semantic guidance that is added at every call, [calls, rows, ...]."""
    link = guidance.sega(edits, **options)

    def call(state, preds):
        added, state = link.update(jnp.zeros_like(preds.uncond), state, preds)
        return state, added

    return jax.lax.scan(call, link.init(jax.tree.map(lambda leaf: leaf[0], predictions)), predictions)[1]


def added(rows, **options):
    """Returns a function that computes the added guidance in float64."""

    def show():
        with jax.enable_x64(True):
            return compiled(lambda preds: run(stacked(rows), preds, **options), PREDICTIONS)

    return show


def added_without_the_inactive(rows):
    """Returns a function like the one from `added`, but with wrong predictions at calls where a concept is inactive."""

    def show():
        edits = stacked(rows)
        inactive = np.arange(3) >= active_concepts.needed(edits, CALLS)[:, None, None]
        wrong = np.where(inactive[..., None, None, None], 99 * PREDICTIONS.cond[:, :, None], PREDICTIONS.edits)
        with jax.enable_x64(True):
            return compiled(lambda preds: run(edits, preds), PREDICTIONS._replace(edits=wrong))

    return show


def by_the_oracle(rows, semantics="diffusers"):
    """Returns a function that computes the same guidance as the one from `added`, with plain NumPy."""

    def expected():
        u, e = PREDICTIONS.uncond, PREDICTIONS.edits
        added_per_row = [
            oracle.guidance(u[:, i], e[:, i, : len(row["scale"])], **row, semantics=semantics)
            for i, row in enumerate(rows)
        ]
        return np.stack(added_per_row, 1)

    return expected


VIEWS = Views(
    {
        "diffusers": View(added([FIRST, SECOND]), by_the_oracle([FIRST, SECOND]), 1e-12),
        "per concept": View(
            added([FIRST, SECOND], semantics="per_concept"), by_the_oracle([FIRST, SECOND], "per_concept"), 1e-12
        ),
        "padding": View(added([FIRST, SHORT]), by_the_oracle([FIRST, SHORT]), 1e-12),
        "inactive": View(added_without_the_inactive(LATE), by_the_oracle(LATE), 1e-12),
        "counting": View(
            lambda: quantile._by_counting(jnp.asarray(EQUAL), jnp.array([[4], [18]])),
            lambda: [np.stack([np.sort(EQUAL[i], 0)[at + more] for i, at in ((0, 4), (1, 18))]) for more in (0, 1)],
        ),
    }
)


def settings(**changes):
    """Changes the settings of semantic guidance."""
    return argument(0, lambda edits: replaced(edits, **changes))


def with_state(by):
    """Replaces the next state of semantic guidance with `by(edits, previous state, next state)`."""

    def change(sega):
        def damaged(edits, **options):
            sound = sega(edits, **options)

            def update(estimate, state, preds):
                estimate, after = sound.update(estimate, state, preds)
                return estimate, by(edits, state, after)

            return optax.GradientTransformation(sound.init, update)

        return damaged

    return change


def momentum_where(alive):
    """Clears a concept's momentum at all calls where `alive(edits, call)` is false."""

    def by(edits, before, after):
        lives = alive(edits, before.step[:, None])[..., None, None, None]
        return after._replace(momentum=jnp.where(lives, after.momentum, 0))

    return with_state(by)


def plus_one(values):
    return values + 1


def minus_one(values):
    return values - 1


def padded_with_a_warmup(stack):
    """Gives padding concepts a warm-up of ten calls."""

    def damaged(cls, rows, **options):
        edits = stack(cls, rows, **options)
        for row, warmup in zip(rows, edits.warmup, strict=True):
            warmup[len(row) :] = 10
        return edits

    return damaged


def unweighted_momentum(sega):
    """Accumulates the momentum as if all concepts had weight 1."""

    def damaged(edits, **options):
        sound, other = sega(edits, **options), sega(replaced(edits, weight=np.ones_like), **options)

        def update(estimate, state, preds):
            return sound.update(estimate, state, preds)[0], other.update(estimate, state, preds)[1]

        return optax.GradientTransformation(sound.init, update)

    return damaged


FAULTS = {
    # Thresholds
    "the threshold mask is inverted": Fault("diffusers", quantile, "threshold_mask", result(jnp.logical_not)),
    "all channels share one threshold": Fault(
        "diffusers", quantile, "threshold_mask", argument(2, lambda support: "latent")
    ),
    "entries equal to the quantile are masked out": Fault(
        "diffusers", quantile, "quantile", result(lambda limit: jnp.nextafter(limit, jnp.inf))
    ),
    "the counted quantile is one rank too high": Fault("counting", quantile, "_by_counting", argument(1, plus_one)),
    # Warm-ups and cool-downs
    "the warm-up ends one call late": Fault("diffusers", guidance, "sega", settings(warmup=plus_one)),
    "the cool-down begins one call late": Fault("diffusers", guidance, "sega", settings(cooldown=plus_one)),
    "padding concepts have a warm-up of ten calls": Fault("padding", Edits, "stack", padded_with_a_warmup),
    "the option semantics has no effect": Fault("per concept", guidance, "sega", override(semantics="diffusers")),
    # Momentum
    "beta and its complement are exchanged": Fault(
        "diffusers", guidance, "sega", settings(momentum_beta=lambda beta: 1 - beta)
    ),
    "the momentum ignores the weights": Fault("diffusers", guidance, "sega", unweighted_momentum),
    "the momentum starts after the warm-up": Fault(
        "diffusers", guidance, "sega", momentum_where(lambda edits, step: step >= edits.warmup)
    ),
    "the momentum stops at the cool-down": Fault(
        "diffusers", guidance, "sega", momentum_where(lambda edits, step: step < edits.cooldown)
    ),
    # Active concepts
    "a concept is dropped one call before its cool-down": Fault(
        "inactive", active_concepts, "needed", argument(0, lambda edits: replaced(edits, cooldown=minus_one))
    ),
    "a concept with momentum is dropped before its warm-up": Fault(
        "inactive", active_concepts, "needed", argument(0, lambda edits: replaced(edits, momentum_scale=np.zeros_like))
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, monkeypatch):
    assert VIEWS.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults():
    assert VIEWS.wrong() == set()
