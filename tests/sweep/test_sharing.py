"""Tests shared prefixes with the guidance function alone. Pictures that start from a shared trunk and use only the
needed predictions are bit-identical to pictures that are made separately."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from sega_jax import Edit, Edits, Predictions, cfg, sega
from sega_jax.method.guidance import SegaState
from sega_jax.sweep import Facts, Sweep
from sega_jax.sweep.description.points import point
from sega_jax.sweep.planning import sharing
from sega_jax.systems.base import Sizes

CALLS, SHAPE, SCALE = 12, (1, 3, 4, 2), 3.0
FACTS = Facts({}, "stable_diffusion", {"_class_name": "DDIMScheduler", **tiny.SD_BETAS}, Sizes(2, 1, 1, (3, 4)))


def points(semantics):
    """Returns points that share a trunk and whose edits act early, late, for a while, without momentum, or not at
    all."""
    sweep = Sweep(
        call={"prompt": "a cat", "semantics": semantics, "steps": CALLS, "guidance_scale": SCALE},
        edits={"a": {}, "b": {"cooldown": 9}},
        sample={
            "count": 24,
            "a.concept": ["glasses", "hat"],
            "a.scale": [0, 3, -4],
            "a.weight": [0, 1, 2],
            "a.threshold": {"low": 0.3, "high": 0.9},
            "a.warmup": {"low": 0, "high": 5},
            "a.cooldown": [6, 8, 10, "never"],
            "a.momentum_scale": [0, 0.4],
            "b.scale": [0, 2],
            "b.warmup": {"low": 1, "high": 7},
            "b.momentum_scale": [0, 0.5],
            "b.momentum_beta": [0.2, 0.6],
        },
    )
    return [point(settings, sweep, FACTS) for settings in sweep]


@cache
def network(words):
    rng = np.random.default_rng([ord(letter) for letter in words])
    return rng.normal(size=(2, 2)).astype(np.float32), rng.normal(size=SHAPE[1:]).astype(np.float32)


def predict(words, x, call):
    weights, bias = network(words)
    return np.tanh(x @ weights + bias * np.float32(1 + call / 7))


@partial(jax.jit, static_argnames="semantics")
def semantic(state, uncond, cond, targets, edits, semantics):
    preds = Predictions(uncond, cond, targets)
    return sega(edits, semantics=semantics).update(jnp.zeros_like(uncond), state, preds)


class Picture:
    """The state of a picture while it is being made."""

    def __init__(self, point):
        self.point, self.edits = point, list(point.edits.values())
        stacked = Edits.stack([self.edits])
        self.settings = Edits(*(v.astype(np.int32 if v.dtype == np.int32 else np.float32) for v in stacked))
        self.state = SegaState(np.zeros(1, np.int32), np.zeros((1, len(self.edits), *SHAPE[1:]), np.float32))

    def guide(self, uncond, cond, targets):
        """Returns the semantic guidance of a call, and updates the momentum."""
        stacked = np.stack(targets, 1)
        added, self.state = semantic(self.state, uncond, cond, stacked, self.settings, self.point.call["semantics"])
        return np.asarray(added)


def step(x, uncond, cond, added):
    scale, preds = np.float32(SCALE), Predictions(uncond, cond, None)
    plain, _ = cfg(scale).update(uncond, optax.EmptyState(), preds)
    return np.asarray(x - np.float32(0.3) * (np.asarray(plain) + added))


START = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def separately(point):
    """Makes a picture without sharing, and returns its states from the first to the last."""
    picture, x, states = Picture(point), START, [START]
    for call in range(CALLS):
        uncond, cond = predict("", x, call), predict(point.call["prompt"], x, call)
        added = picture.guide(uncond, cond, [predict(edit.concept, x, call) for edit in picture.edits])
        states.append(x := step(x, uncond, cond, added))
    return states


def together(group, predicted=sharing.predicted, departure=sharing.departure):
    """Makes pictures with sharing, and returns their last states and the number of predictions.

    Predictions that should not be needed are replaced by noise.
    """
    rng, count = np.random.default_rng(1), 0
    pictures, lasts, x = [Picture(point) for point in group], [None] * len(group), START
    trunk_length = max(departure(point, CALLS) for point in group)

    def targets(picture, call, known):
        spans = [predicted(edit, CALLS) for edit in picture.edits]
        return [
            known(edit.concept) if first <= call < last else rng.normal(size=SHAPE).astype(np.float32)
            for edit, (first, last) in zip(picture.edits, spans, strict=True)
        ]

    def alone(picture, x):
        nonlocal count
        for call in range(departure(picture.point, CALLS), CALLS):
            known = cache(partial(predict, x=x, call=call))
            uncond, cond, edits = known(""), known(picture.point.call["prompt"]), targets(picture, call, known)
            x = step(x, uncond, cond, picture.guide(uncond, cond, edits))
            count += known.cache_info().misses
        return x

    for call in range(trunk_length + 1):
        for i, picture in enumerate(pictures):
            if departure(picture.point, CALLS) == call:
                lasts[i] = alone(picture, x)
        if call < trunk_length:
            known = cache(partial(predict, x=x, call=call))
            uncond, cond = known(""), known("a cat")
            for picture in pictures:
                if departure(picture.point, CALLS) > call:
                    picture.guide(uncond, cond, targets(picture, call, known))
            x = step(x, uncond, cond, np.zeros_like(x))
            count += known.cache_info().misses
    return lasts, count


@pytest.fixture(scope="module", params=["diffusers", "per_concept"])
def group(request):
    return points(request.param)


@pytest.fixture(scope="module")
def separate(group):
    return [separately(point) for point in group]


def test_sharing_makes_the_same_pictures(group, separate):
    lasts, count = together(group)
    for last, states in zip(lasts, separate, strict=True):
        np.testing.assert_array_equal(last, states[-1])
    assert count == sharing.evaluations([(point, CALLS) for point in group])
    assert count < 0.7 * len(group) * 4 * CALLS
    assert len({sharing.trunk(point) for point in group}) == 1


def test_pictures_depart_as_late_as_possible(group, separate):
    """Up to the departure, a picture's states equal the unedited picture's states; the next state differs."""
    plain = separately(group[0]._replace(edits={"a": Edit("a", scale=0)}))
    left = [sharing.departure(point, CALLS) for point in group]
    for states, call in zip(separate, left, strict=True):
        np.testing.assert_array_equal(states[: call + 1], plain[: call + 1])
        if call < CALLS:
            assert not np.array_equal(states[call + 1], plain[call + 1])
    assert CALLS in left
    assert len(set(left)) > 4


def differ(group, separate, **faults):
    lasts, _ = together(group, **faults)
    return sum(not np.array_equal(last, states[-1]) for last, states in zip(lasts, separate, strict=True))


def later(point, calls):
    return min(sharing.departure(point, calls) + 1, calls)


def moved(first, last):
    """Returns a version of `sharing.predicted` that shifts the first and last calls."""

    def predicted(edit, calls):
        span = sharing.predicted(edit, calls)
        return span[0] + first, span[1] + last

    return predicted


FAULTS = {
    "a departure too late": {"departure": later},
    "no momentum before the warm-up": {
        "predicted": lambda edit, calls: (edit.warmup, sharing.predicted(edit, calls)[1])
    },
    "predicted one call too late": {"predicted": moved(1, 0)},
    "predicted one call too few": {"predicted": moved(0, -1)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_change_pictures(group, separate, fault):
    assert differ(group, separate, **FAULTS[fault]) > 2
