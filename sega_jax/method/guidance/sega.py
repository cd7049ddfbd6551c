"""Semantic guidance (SEGA: Brack et al., NeurIPS 2023, arXiv 2301.12247)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.method.guidance.chain import Predictions, lift, wide
from sega_jax.method.guidance.edits import Edits
from sega_jax.method.guidance.quantile import SUPPORTS, threshold_mask
from sega_jax.method.numerics import at_least_float32

SEMANTICS = ("diffusers", "per_concept")


class SegaState(NamedTuple):
    """What semantic guidance remembers between model calls."""

    step: jax.Array  # int32 [batch], model calls so far; warm-ups and cool-downs count these
    momentum: jax.Array  # float32 [batch, n, *space, channels], nu of each concept


def sega(edits: Edits, *, semantics: str = "diffusers", support: str = "channel") -> optax.GradientTransformation:
    """Semantic guidance, to be added to an estimate.

    For concept k (section 3 of the paper), with u and e_k the predictions without text and for the concept:

        psi_k   = s_k (e_k - u)                                    s_k < 0 removes the concept
        gamma_k = psi_k where |psi_k| >= quantile(|psi_k|, lambda_k), else 0
        edit_k  = w_k gamma_k + s_m nu_k
        nu_k   <- beta nu_k + (1 - beta) edit_k                    from the first call on

    Deviations from the paper, in both semantics: the weight is applied before the momentum, so that the
    n momenta sum to the single one that diffusers keeps; the paper's threshold is over a picture's
    dimensions, ours by default over the positions of each channel, as in diffusers.

    "diffusers": what diffusers computes. While only some concepts are warm, the estimate gains
    sum_k gamma_k w_k / sum(w) over these, without momentum; once all are, sum_k edit_k. A cooled concept
    counts as warm, with weight 0; the tail of its momentum goes on. Where diffusers divides 0 by 0 (all
    warm concepts cooled or of weight 0, another not yet warm) nothing is added.

    "per_concept": every concept acts by its own clock: sum of edit_k over warmup_k <= step < cooldown_k,
    nothing after, and weights are never renormalised.

    Args:
        edits: settings, [batch, n] each; traced numbers, never compiled in.
        semantics: "diffusers" or "per_concept".
        support: what shares a quantile: the positions of one "channel"; all of a "latent"; "pixel", the
            positions by their magnitude summed over channels, one mask for all (LEDITS++); or the channels of one
            "position", which is for the logits of tokens.

    Raises:
        ValueError: an unknown semantics or support.
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics={semantics!r} should be one of {', '.join(SEMANTICS)}")
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} should be one of {', '.join(SUPPORTS)}")

    def init(preds: Predictions) -> SegaState:
        shape, dtype = preds.edits.shape, at_least_float32(preds.edits.dtype)
        return SegaState(jnp.zeros(shape[:1], jnp.int32), jnp.zeros(shape, dtype))

    def update(estimate, state, preds):
        uncond, targets, nu = wide(preds.uncond), wide(preds.edits), state.momentum
        for name, values in edits._asdict().items():
            if np.ndim(values) == 2 and np.shape(values)[1] not in (1, targets.shape[1]):
                raise ValueError(f"{name} is of {np.shape(values)[1]} concepts, the predictions of {targets.shape[1]}")
        e = Edits(*(jnp.broadcast_to(jnp.asarray(a), targets.shape[:2]) for a in edits))
        step = state.step[:, None]
        warm, cooled = step >= e.warmup, step >= e.cooldown

        direction = lift(e.scale, targets) * (targets - uncond[:, None])
        mask = threshold_mask(jnp.abs(direction), e.threshold.astype(direction.dtype), support)
        gamma = jnp.where(mask, direction, 0)
        weight = jnp.where(cooled, 0, e.weight.astype(direction.dtype))
        edit = lift(weight, gamma) * gamma + lift(e.momentum_scale, nu) * nu
        beta = lift(e.momentum_beta, nu)
        state = SegaState(state.step + 1, beta * nu + (1 - beta) * edit)

        if semantics == "per_concept":
            added = jnp.where(lift(warm & ~cooled, edit), edit, 0).sum(1)
        else:
            share = jnp.where(warm, weight, 0)
            total = share.sum(1, keepdims=True)
            share = share / jnp.where(total > 0, total, 1)
            partly = (lift(share, gamma) * gamma).sum(1)
            added = jnp.where(lift(warm.all(1), partly), edit.sum(1), partly)
        return wide(estimate) + added, state

    return optax.GradientTransformation(init, update)
