"""Faults made on purpose in Paella's sampler, prior and condition: each gives another grid, or another embedding, than
the public code's."""

import numpy as np
import pytest
from reference import paella as cases
from test_mutations import damage
from test_paella_edits import grids, imagined
from test_paella_edits import injected as injected

from sega_jax.method import solvers
from sega_jax.method.schedules import tokens
from sega_jax.systems import base, paella, paella_prior

pytestmark = pytest.mark.fault

# The run that must show it, the function, a piece of its source and what takes its place.
FAULTS = {
    "a picture for every branch": ("edited", paella.condition, "text.has_clip & prompt", "text.has_clip"),
    "influence on every branch": ("edited", paella.condition, "prompt[..., None]", "True | prompt[..., None]"),
    "padding seen": ("edited", paella.condition, "mask=flat(text.mask)", "mask=None"),
    "branches of other rows": ("edited", paella.predict, "jnp.repeat(x, branches, 0)", "jnp.tile(x, (branches, 1, 1))"),
    "one noise level": ("published", paella.predict, "row.timestep.astype(jnp.float32)", "jnp.ones((), jnp.float32)"),
    "prompt for its absence": ("published", paella.predict, "logits[:, 0], logits[:, 1]", "logits[:, 1], logits[:, 0]"),
    "no guidance by edits": ("edited", base.guiding, "settings.edits is None", "True"),
    "no temperature": ("published", solvers.renoise, "estimate / jnp.asarray(row", "estimate / jnp.ones_like(row"),
    "noise divided by the temperature": (
        "published",
        solvers.renoise,
        "logits + chances.gumbel.astype(logits.dtype)",
        "logits + chances.gumbel.astype(logits.dtype) / row.solver.temperature",
    ),
    "renoised by what is there": ("published", solvers.renoise, "jnp.where(back, start,", "jnp.where(back, x,"),
    "renoised elsewhere": ("published", solvers.renoise, "chances.uniform <= noise", "chances.uniform > noise"),
    "renoised to the end": ("edited", solvers.renoise, "row.solver.renoises & (", "("),
    "expected by logits": ("quantised", solvers.renoise, "jax.nn.softmax(logits, -1)", "logits"),
    "expected without a temperature": (
        "quantised",
        solvers.renoise,
        "jax.nn.softmax(logits, -1)",
        "jax.nn.softmax(estimate, -1)",
    ),
    "the share before the step": ("published", tokens.renoising, "steps), times[1:]", "steps), times[:-1]"),
    "the level after the step": ("published", tokens.renoising, "table(times[:-1]", "table(times[1:]"),
    # The prior
    "no text of zeros": ("imagined", paella_prior.imagine, "[text, 0 * text]", "[text, text]"),
    "another scale": ("imagined", paella_prior.imagine, "jnp.asarray(SCALE, dtype)", "jnp.asarray(SCALE + 1, dtype)"),
    "variance of the forward process": (
        "imagined",
        paella_prior.imagine,
        "* before / (1 - signal)",
        "* jnp.sign(before)",
    ),
    "one level too many": ("imagined", paella_prior._table, "calls + 2)[1:]", "calls + 1)"),
    "no shift of the cosine": ("imagined", paella_prior._table, "shift = 0.008", "shift = 0.0"),
    "shares unbounded": (
        "imagined",
        paella_prior._table,
        "np.clip(bars, 1e-4, 0.9999)",
        "np.clip(bars, 1e-9, 1 - 1e-9)",
    ),
    "noise after the last call": ("imagined", paella_prior._table, "np.append(1 - bars[1:-1], 0)", "1 - bars[1:]"),
}


def differs(view):
    """Whether a run gives something else than was recorded."""
    if view == "imagined":
        wanted = cases.recorded("float64")[view]
        return not np.linalg.norm(imagined() - wanted) < 1e-9 * np.linalg.norm(wanted)
    return (grids(view) != cases.recorded("float64")[f"grids {view}"]).any()


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, injected, monkeypatch):
    view, *fault = FAULTS[name]
    damage(monkeypatch, *fault)
    assert differs(view)
