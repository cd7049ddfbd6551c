"""Semantic guidance (SEGA: Brack et al., NeurIPS 2023, arXiv 2301.12247) on arrays.

Guidance is a link in an optax chain. Its `params` are the `Predictions` of one model call, its
`updates` the estimate so far, and the chain starts from the unconditional one:

    guidance = optax.chain(cfg(7.5), sega(Edits.stack([[Edit("glasses")]])))
    state = guidance.init(predictions)                                          # shapes suffice
    estimate, state = guidance.update(predictions.uncond, state, predictions)

It works with any denoiser that is guided without a classifier, in any loop, under jit, vmap, scan and
grad. Arrays are [batch, (n,) *space, channels]; n is the number of concepts. All arithmetic is in
float32 at least, whatever the network's dtype.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.arrays import at_least_float32, floating

SEMANTICS = ("diffusers", "per_concept")
SUPPORTS = ("channel", "latent", "pixel", "position")
# Up to so many values, entries by channels, are sorted for their quantiles, in one pass; more, such as the logits of a
# whole picture, would take longer and several times their memory. TPUs always count, since a sort takes long to compile
# for them.
_SORTED = 2**20
# The step count at which "never" happens.
NEVER = np.iinfo(np.int32).max


class Predictions(NamedTuple):
    """What the network says of one noisy state x_t; every branch saw the same x_t."""

    uncond: jax.Array  # [batch, *space, channels], for the empty or negative prompt
    cond: jax.Array  # [batch, *space, channels], for the prompt
    edits: jax.Array  # [batch, n, *space, channels], for each concept
    aux: Any = None  # what the solver needs besides and guidance never touches


@dataclasses.dataclass(frozen=True)
class Edit:
    """One concept and how it guides.

    Attributes:
        concept: the words, or their embedding as a [tokens, channels] array.
        scale: s_k, the strength; negative removes the concept. People use 4 to 10.
        threshold: lambda_k in [0, 1], the share of each channel that stays untouched.
        warmup: delta_k >= 0, the model call at which the concept begins to act.
        cooldown: kappa_k >= 0, the call from which on it no longer does; None is never.
        weight: w_k >= 0, against the other concepts.
        momentum_scale: s_m in [0, 1]; None takes the call's.
        momentum_beta: beta in [0, 1]; None takes the call's.

    Raises:
        TypeError, ValueError: a setting of another type or out of its range.
    """

    concept: Any
    scale: float = 5.0
    threshold: float = 0.9
    warmup: int = 10
    cooldown: int | None = None
    weight: float = 1.0
    momentum_scale: float | None = None
    momentum_beta: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.concept, str):
            embedding = floating("Edit: concept", self.concept, "(tokens, channels), or words")
            if embedding.ndim != 2:
                raise ValueError(f"Edit: concept has shape {embedding.shape}, expected (tokens, channels)")
            object.__setattr__(self, "concept", embedding)
        self._number("scale", -math.inf, math.inf, "a finite number; negative removes the concept")
        self._number("threshold", 0, 1, "in [0, 1], the share of the picture that stays untouched")
        self._count("warmup", 0)
        if self.cooldown is not None:
            self._count("cooldown", 0)
        self._number("weight", 0, math.inf, "at least 0; to remove a concept give a negative scale")
        if self.momentum_scale is not None:
            self._number("momentum_scale", 0, 1, "in [0, 1], or None for the call's")
        if self.momentum_beta is not None:
            self._number("momentum_beta", 0, 1, "in [0, 1], or None for the call's")

    def _number(self, name: str, low: float, high: float, expected: str) -> None:
        value = getattr(self, name)
        where = f"Edit {_brief(self.concept)}: {name}={value!r}"
        if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number):
            raise TypeError(f"{where} should be a number {expected}")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{where} should be {expected}")
        object.__setattr__(self, name, float(value))

    def _count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        where = f"Edit {_brief(self.concept)}: {name}={value!r}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{where} should be a whole number of model calls")
        if not low <= value <= NEVER:
            raise ValueError(f"{where} should be at least {low}")
        object.__setattr__(self, name, int(value))


def _brief(concept: Any) -> str:
    return repr(concept) if isinstance(concept, str) else f"<{type(concept).__name__}>"


class Edits(NamedTuple):
    """The settings of `Edit` as arrays, every one [batch, n] (or what broadcasts to it)."""

    scale: Any  # float
    threshold: Any  # float in [0, 1]
    warmup: Any  # int32
    cooldown: Any  # int32, NEVER for none
    weight: Any  # float
    momentum_scale: Any  # float
    momentum_beta: Any  # float

    @classmethod
    def stack(
        cls,
        rows: Sequence[Sequence[Edit]],
        *,
        n: int | None = None,
        momentum_scale: float = 0.1,
        momentum_beta: float = 0.4,
    ) -> "Edits":
        """Host arrays [rows, n] from each row's edits; TypeError or ValueError for what is none.

        A row with fewer is padded by concepts of weight 0 *and warm-up 0*: with another warm-up the
        gate that waits for all concepts would wait for one that does not exist.
        """
        if isinstance(rows, Edit) or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
            raise TypeError("Edits.stack takes a list of edits for each row, as in [[Edit('glasses')], []]")
        if not all(isinstance(edit, Edit) for row in rows for edit in row):
            raise TypeError("Edits.stack takes Edits, with words inside: Edit('glasses')")
        n = max((len(row) for row in rows), default=0) if n is None else n
        if any(len(row) > n for row in rows):
            raise ValueError(f"a row has more edits than n={n}")
        shape = (len(rows), n)
        arrays = cls(
            scale=np.zeros(shape),
            threshold=np.zeros(shape),
            warmup=np.zeros(shape, np.int32),
            cooldown=np.full(shape, NEVER, np.int32),
            weight=np.zeros(shape),
            momentum_scale=np.full(shape, float(momentum_scale)),
            momentum_beta=np.full(shape, float(momentum_beta)),
        )
        for r, row in enumerate(rows):
            for k, edit in enumerate(row):
                for name, array in arrays._asdict().items():
                    if (value := getattr(edit, name)) is not None:
                        array[r, k] = value
        return arrays


class SegaState(NamedTuple):
    """What semantic guidance remembers between model calls."""

    step: jax.Array  # int32 [batch], model calls so far; warm-ups and cool-downs count these
    momentum: jax.Array  # float32 [batch, n, *space, channels], nu of each concept


class ReplayState(NamedTuple):
    step: jax.Array  # int32 [batch], model calls so far


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def _lift(values: Any, like: jax.Array) -> jax.Array:
    """Values that have the leading axes of `like`, in its rank; numbers also in its dtype."""
    values = jnp.asarray(values)
    values = values if values.dtype == bool else values.astype(like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


def cfg(scale: Any) -> optax.GradientTransformation:
    """Classifier-free guidance (Ho & Salimans 2021): adds s (p - u), for any s.

    From u this gives u + s (p - u): s = 0 is the unconditional estimate, 1 the conditional one. `scale`
    is a number or [batch].
    """

    def init(preds: Predictions) -> optax.EmptyState:
        del preds
        return optax.EmptyState()

    def update(estimate, state, preds):
        uncond = _wide(preds.uncond)
        return _wide(estimate) + _lift(scale, uncond) * (_wide(preds.cond) - uncond), state

    return optax.GradientTransformation(init, update)


def rescale(share: Any) -> optax.GradientTransformation:
    """Rescaled guidance (Lin et al. 2024, eqs. 15 and 16): brings the estimate's standard deviation, over a row's
    positions and channels, to that of the prompt's prediction, and takes `share` of that and the rest as it was; a
    number or [batch] in [0, 1].

    It stands after classifier-free guidance and before semantic guidance, which is not rescaled: the factor is one for
    the whole row, and with what edits add inside it, these would change every position, also those below their
    threshold. So an edit leaves the rest of the estimate as it would be without it. (LEDITS++ in diffusers has them
    inside.)
    """

    def init(preds: Predictions) -> optax.EmptyState:
        del preds
        return optax.EmptyState()

    def update(estimate, state, preds):
        estimate, cond = _wide(estimate), _wide(preds.cond)
        axes = tuple(range(1, cond.ndim))
        target, own = (jnp.std(x, axes, keepdims=True) for x in (cond, estimate))
        ratio = jnp.where(own > 0, target / jnp.where(own > 0, own, 1), 1)
        phi = _lift(share, estimate)
        return estimate * (phi * ratio + (1 - phi)), state

    return optax.GradientTransformation(init, update)


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
        uncond, targets, nu = _wide(preds.uncond), _wide(preds.edits), state.momentum
        for name, values in edits._asdict().items():
            if np.ndim(values) == 2 and np.shape(values)[1] not in (1, targets.shape[1]):
                raise ValueError(f"{name} is of {np.shape(values)[1]} concepts, the predictions of {targets.shape[1]}")
        e = Edits(*(jnp.broadcast_to(jnp.asarray(a), targets.shape[:2]) for a in edits))
        step = state.step[:, None]
        warm, cooled = step >= e.warmup, step >= e.cooldown

        direction = _lift(e.scale, targets) * (targets - uncond[:, None])
        mask = _mask(jnp.abs(direction), e.threshold.astype(direction.dtype), support)
        gamma = jnp.where(mask, direction, 0)
        weight = jnp.where(cooled, 0, e.weight.astype(direction.dtype))
        edit = _lift(weight, gamma) * gamma + _lift(e.momentum_scale, nu) * nu
        beta = _lift(e.momentum_beta, nu)
        state = SegaState(state.step + 1, beta * nu + (1 - beta) * edit)

        if semantics == "per_concept":
            added = jnp.where(_lift(warm & ~cooled, edit), edit, 0).sum(1)
        else:
            share = jnp.where(warm, weight, 0)
            total = share.sum(1, keepdims=True)
            share = share / jnp.where(total > 0, total, 1)
            partly = (_lift(share, gamma) * gamma).sum(1)
            added = jnp.where(_lift(warm.all(1), partly), edit.sum(1), partly)
        return _wide(estimate) + added, state

    return optax.GradientTransformation(init, update)


def _mask(magnitude: jax.Array, threshold: jax.Array, support: str) -> jax.Array:
    """Where |psi| [batch, n, *space, channels] reaches its quantile; thresholds are [batch, n].

    What is not a number reaches it, too, lest a broken prediction looks like one without an edit.
    """
    if support == "pixel":
        magnitude = magnitude.sum(-1, keepdims=True)
    batch, n, *space, channels = magnitude.shape
    if support == "latent":
        flat = magnitude.reshape(batch, n, math.prod(space) * channels, 1)
    elif support == "position":
        flat = magnitude.reshape(batch, n * math.prod(space), channels, 1)
        threshold = jnp.repeat(threshold, math.prod(space), 1)
    else:
        flat = magnitude.reshape(batch, n, math.prod(space), channels)
    limit = _quantile(flat, threshold)
    return ~(flat < limit[:, :, None]).reshape(magnitude.shape)


def _quantile(values: jax.Array, share: jax.Array) -> jax.Array:
    """The quantiles [..., channels] of what is not negative, [..., entries, channels], by linear interpolation as
    torch rounds it; shares are [...].

    Between equal values it is that value, which `jnp.quantile` may miss by the last digit: of equal magnitudes all
    reach it, or none.
    """
    rank = (share * jnp.asarray(values.shape[-2] - 1, values.dtype))[..., None]
    below = jnp.floor(rank)
    neighbours = _by_sorting if math.prod(values.shape[-2:]) <= _SORTED else _by_counting
    low, high = jax.lax.platform_dependent(values, below.astype(jnp.int32), tpu=_by_counting, default=neighbours)
    high, w = jnp.where(rank == below, low, high), rank - below
    return jnp.where(w < 0.5, low + w * (high - low), high - (high - low) * (1 - w))


def _by_sorting(values: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The entries [..., channels] at a place [..., 1] of their order, and at the next."""
    ordered = jnp.sort(values, -2)

    def at(index):
        index = jnp.broadcast_to(jnp.minimum(index, values.shape[-2] - 1), (*values.shape[:-2], values.shape[-1]))
        return jnp.take_along_axis(ordered, index[..., None, :], -2)[..., 0, :]

    return at(place), at(place + 1)


def _by_counting(values: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same to the last bit, of entries that are not negative: these are in the order of their bits, which are
    found one by one, from the highest. It takes a pass for each bit, and no memory to speak of."""
    bits = 8 * values.dtype.itemsize - 1
    integer = jnp.dtype(f"int{bits + 1}")
    place = place.astype(integer)

    def ordered():
        return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values), integer)

    def halve(i, found):
        more = found | jnp.left_shift(jnp.ones((), integer), jnp.asarray(bits - 1 - i, integer))
        fewer = (ordered() < more[..., None, :]).sum(-2, dtype=integer)
        return jnp.where(fewer <= place, more, found)

    low = jax.lax.fori_loop(0, bits, halve, jnp.zeros((*values.shape[:-2], values.shape[-1]), integer))
    upto = ordered() <= low[..., None, :]
    high = jnp.where(upto, jnp.iinfo(integer).max, ordered()).min(-2)
    high = jnp.where(upto.sum(-2, dtype=integer) > place + 1, low, high)
    return jax.lax.bitcast_convert_type(low, values.dtype), jax.lax.bitcast_convert_type(high, values.dtype)


def replay(recorded: jax.Array) -> optax.GradientTransformation:
    """Adds guidance recorded before: [batch, calls, *space, channels], one entry a model call.

    Calls beyond the record gain nothing.
    """

    def init(preds: Predictions) -> ReplayState:
        return ReplayState(jnp.zeros(preds.uncond.shape[:1], jnp.int32))

    def update(estimate, state, preds):
        del preds
        estimate = _wide(estimate)

        def entry(rows, i):
            return jnp.where(i < rows.shape[0], rows[jnp.minimum(i, rows.shape[0] - 1)], 0)

        return estimate + jax.vmap(entry)(jnp.asarray(recorded, estimate.dtype), state.step), ReplayState(
            state.step + 1
        )

    return optax.GradientTransformation(init, update)
