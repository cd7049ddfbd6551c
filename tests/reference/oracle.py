"""Semantic guidance in plain NumPy. It follows diffusers' loop or, with "per_concept", the paper (Brack et al.
2023)."""

import numpy as np


def guidance(
    uncond, edits, *, scale, reverse, threshold, warmup, cooldown, weight, momentum_scale, momentum_beta, semantics
):
    """Returns the guidance that the concepts add to one picture's estimate at every call, [calls, *space, channels].

    In diffusers, all concepts share one momentum, which has the settings of the first concept.

    Args:
        uncond: the unconditional predictions, [calls, *space, channels].
        edits: the concepts' predictions, [calls, n, *space, channels].
        semantics: "diffusers" or "per_concept".
        scale, reverse, threshold, warmup, cooldown, weight, momentum_scale, momentum_beta: lists with one entry for
            each concept.
    """
    momentum, added = np.zeros_like(edits[0]), np.zeros_like(uncond)
    for i, (u, targets) in enumerate(zip(uncond, edits, strict=True)):
        gammas, weights, warm = np.zeros_like(targets), np.zeros(len(targets)), []
        for k, target in enumerate(targets):
            if i >= warmup[k]:
                warm.append(k)
            if cooldown[k] is not None and i >= cooldown[k]:
                continue
            psi = scale[k] * (u - target if reverse[k] else target - u)
            gammas[k] = above(psi, threshold[k], axes=tuple(range(psi.ndim - 1)))
            weights[k] = weight[k]
        if semantics == "per_concept":
            for k in range(len(targets)):
                edit = weights[k] * gammas[k] + momentum_scale[k] * momentum[k]
                momentum[k] = momentum_beta[k] * momentum[k] + (1 - momentum_beta[k]) * edit
                if k in warm and (cooldown[k] is None or i < cooldown[k]):
                    added[i] += edit
            continue
        edit = np.tensordot(weights, gammas, 1) + momentum_scale[0] * momentum[0]
        momentum[0] = momentum_beta[0] * momentum[0] + (1 - momentum_beta[0]) * edit
        if len(warm) == len(targets):
            added[i] = edit
        elif weights[warm].sum() > 0:
            added[i] = np.tensordot(weights[warm] / weights[warm].sum(), gammas[warm], 1)
    return added


def above(psi, threshold, axes, magnitude=None):
    """Returns psi with all values set to 0 where the magnitude is below the quantile over the given axes."""
    magnitude = np.abs(psi) if magnitude is None else magnitude
    return np.where(magnitude >= np.quantile(magnitude, threshold, axis=axes, keepdims=True), psi, 0)
