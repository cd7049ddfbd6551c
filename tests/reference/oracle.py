"""Semantic guidance in plain NumPy, written after diffusers' loop (and the paper for "per_concept")."""

import numpy as np


def guidance(
    uncond, edits, *, scale, reverse, threshold, warmup, cooldown, weight, momentum_scale, momentum_beta, semantics
):
    """What the concepts add to the estimate of one picture at every model call, [calls, *space, channels].

    `uncond` is [calls, *space, channels], `edits` [calls, n, *space, channels]; the settings are lists with an
    entry for each concept. diffusers has one momentum for all concepts, with the settings of the first.
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
    """psi where its magnitude reaches the quantile over the axes, else 0."""
    magnitude = np.abs(psi) if magnitude is None else magnitude
    return np.where(magnitude >= np.quantile(magnitude, threshold, axis=axes, keepdims=True), psi, 0)
