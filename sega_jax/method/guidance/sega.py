"""Semantic guidance (SEGA: Brack et al., NeurIPS 2023, arXiv 2301.12247)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.method.guidance.chain import Predictions, checked, lift, wide
from sega_jax.method.guidance.edits import Edits
from sega_jax.method.guidance.quantile import SUPPORTS, threshold_mask
from sega_jax.method.numerics import at_least_float32

SEMANTICS = ("diffusers", "per_concept")


class SegaState(NamedTuple):
    """The state of semantic guidance between model calls."""

    step: jax.Array  # int32 [batch], the number of model calls so far, to compare with warm-ups and cool-downs
    momentum: jax.Array  # float32 or wider [batch, n, *space, channels], the nu of each concept


def sega(edits: Edits, *, semantics: str = "diffusers", support: str = "channel") -> optax.GradientTransformation:
    """Returns a semantic guidance rule, which adds the edits of all concepts to the estimate.

    For concept k (section 3 of the paper), with the unconditional prediction u and the prediction e_k for the concept:

        psi_k   = s_k (e_k - u)                                    s_k < 0 removes the concept
        gamma_k = psi_k where |psi_k| >= quantile(|psi_k|, lambda_k), else 0
        edit_k  = w_k gamma_k + s_m nu_k
        nu_k   <- beta nu_k + (1 - beta) edit_k                    from the first call on

    With either semantics, the defaults deviate from the paper in two ways. First, the weight is applied before the
    momentum, so that the n momenta sum to the single momentum that diffusers keeps. Second, each channel has its own
    quantile over the positions, as in diffusers, whereas the paper takes one quantile over all entries of a picture.

    "diffusers" gives the same results as diffusers. While only some concepts are warm, it adds the sum of
    gamma_k w_k / sum(w) over the warm concepts, without momentum. Once all are warm, it adds sum_k edit_k. A cooled
    concept is treated as a warm concept of weight 0, and its remaining momentum continues to act. diffusers itself
    divides 0 by 0 if all warm concepts have cooled down or have weight 0 while another concept is not yet warm. In this
    case, `sega` adds nothing.

    "per_concept" treats the concepts independently of each other: it adds the sum of edit_k over the concepts with
    warmup_k <= step < cooldown_k. A concept adds nothing after its cool-down, and weights are never renormalised.

    `jax.grad` treats the threshold mask as constant. Derivatives with respect to lambda_k are therefore zero, and other
    derivatives ignore the jump where an entry crosses its quantile. At s_k = 0, all magnitudes are equal, so every
    entry passes the mask.

    Args:
        edits: The settings, as arrays that broadcast to [batch, n]. If the settings are an argument of the jitted
            function, new values do not cause recompilation. If the function only closes over the settings, they are
            compiled into its program as constants.
        semantics: "diffusers" or "per_concept".
        support: Which values share a quantile. "channel": the positions of one channel. "latent": all positions and
            channels. "pixel": the positions, with magnitudes summed over the channels and one mask for all channels
            (LEDITS++). "position": the channels of one position, for token logits.

    Raises:
        ValueError: `semantics` or `support` is unknown. `init` and `update` also raise this error if the predictions
            for the concepts are missing. `update` raises it too if the number of concepts in the settings is neither 1
            nor the number of concepts in the predictions.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from sega_jax import Edit, Edits, Predictions, cfg, sega
        >>> guidance = optax.chain(cfg(7.5), sega(Edits.stack([[Edit("glasses"), Edit("smile", scale=-4)]])))
        >>> x = jnp.zeros((1, 8, 8, 4))
        >>> predictions = Predictions(x, x, edits=jnp.zeros((1, 2, 8, 8, 4)))
        >>> estimate, (_, state) = guidance.update(x, guidance.init(predictions), predictions)
        >>> estimate.shape, state.momentum.shape
        ((1, 8, 8, 4), (1, 2, 8, 8, 4))
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics={semantics!r} should be one of {', '.join(SEMANTICS)}")
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} should be one of {', '.join(SUPPORTS)}")

    def init(params: Predictions) -> SegaState:
        targets = _targets(params)
        shape, dtype = targets.shape, at_least_float32(targets.dtype)
        return SegaState(jnp.zeros(shape[:1], jnp.int32), jnp.zeros(shape, dtype))

    def update(updates, state, params=None):
        preds = checked(params)
        uncond, targets, nu = wide(preds.uncond), wide(_targets(preds)), state.momentum
        for name, values in edits._asdict().items():
            if np.ndim(values) == 2 and np.shape(values)[1] not in (1, targets.shape[1]):
                raise ValueError(
                    f"{name} has {np.shape(values)[1]} concepts, but the predictions have {targets.shape[1]}"
                )
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
        return wide(updates) + added, state

    return optax.GradientTransformation(init, update)


def _targets(preds: Predictions) -> jax.Array:
    """Returns the predictions for the concepts.

    Raises:
        ValueError: They are None.
    """
    if preds.edits is None:
        raise ValueError(
            "sega needs the predictions for its concepts, but Predictions.edits is None; set it to an array"
            " [batch, n, *space, channels], or leave sega out"
        )
    return preds.edits
