"""Random predictions and settings for semantic guidance, and the NumPy oracle's results for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from reference import oracle

from sega_jax import Edit, Edits, Predictions, sega

CALLS = 7
SPACE = (5, 4, 3)
SEMANTICS = ("diffusers", "per_concept")


@partial(jax.jit, static_argnames=("semantics", "support"))
def run(preds, settings, semantics="diffusers", support="channel"):
    """Returns the semantic guidance that is added at every call. Predictions and results are [calls, batch, ...]."""
    guidance = sega(settings, semantics=semantics, support=support)

    def call(state, preds):
        added, state = guidance.update(jnp.zeros_like(preds.uncond), state, preds)
        return state, added

    return jax.lax.scan(call, guidance.init(jax.tree.map(lambda p: p[0], preds)), preds)[1]


def predictions(rng, batch, n, shape=SPACE, calls=CALLS):
    draw = rng.standard_normal
    return Predictions(draw((calls, batch, *shape)), draw((calls, batch, *shape)), draw((calls, batch, n, *shape)))


def row(rng, n, momentum):
    """Draws settings for one picture in the oracle's format, including edge cases."""
    pick = partial(rng.choice, size=n)
    warmup = pick([0, 0, 1, 3, 5, CALLS + 1])
    return {
        "scale": pick([0.0, 0.5, 4.0, 7.0]),
        "reverse": pick([False, True]),
        "threshold": pick([0.0, 0.3, 0.9, 0.97, 1.0]),
        "warmup": warmup,
        "cooldown": [rng.choice([None, w + 1, w + 3]) for w in warmup],
        "weight": pick([0.0, 0.3, 1.0, 2.0]),
        "momentum_scale": np.full(n, 0.3 * momentum),
        "momentum_beta": np.full(n, 0.6 * momentum),
    }


def edit(settings, k):
    """Returns the k-th concept of a row as an `Edit`."""
    values = {name: values[k] for name, values in settings.items() if name != "reverse"}
    return Edit("concept", **values | {"scale": values["scale"] * (-1) ** settings["reverse"][k]})


def edits(rows, **options):
    return Edits.stack([[edit(r, k) for k in range(len(r["scale"]))] for r in rows], **options)


def expected(preds, rows, semantics="diffusers"):
    return np.stack(
        [oracle.guidance(preds.uncond[:, b], preds.edits[:, b], **r, semantics=semantics) for b, r in enumerate(rows)],
        1,
    )


def close(actual, desired, tolerance=1e-12):
    np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)
