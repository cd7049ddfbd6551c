"""What pictures have in common, by the guidance itself: made of a shared trunk and of the predictions that are asked
for alone, they are the same to the bit as made one by one."""

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
    """Pictures of one trunk: settings that act early, late, for a while, without momentum, or not at all."""
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
    return [point(said, sweep, FACTS) for said in sweep]


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
    """A picture on its way."""

    def __init__(self, made):
        self.made, self.edits = made, list(made.edits.values())
        stacked = Edits.stack([self.edits])
        self.settings = Edits(*(v.astype(np.int32 if v.dtype == np.int32 else np.float32) for v in stacked))
        self.state = SegaState(np.zeros(1, np.int32), np.zeros((1, len(self.edits), *SHAPE[1:]), np.float32))

    def guide(self, uncond, cond, targets):
        """What is added, with the momentum going on."""
        stacked = np.stack(targets, 1)
        added, self.state = semantic(self.state, uncond, cond, stacked, self.settings, self.made.call["semantics"])
        return np.asarray(added)


def step(x, uncond, cond, added):
    scale, preds = np.float32(SCALE), Predictions(uncond, cond, None)
    plain, _ = cfg(scale).update(uncond, optax.EmptyState(), preds)
    return np.asarray(x - np.float32(0.3) * (np.asarray(plain) + added))


START = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def one_by_one(made):
    """The states of a picture, from its first to its last."""
    picture, x, states = Picture(made), START, [START]
    for call in range(CALLS):
        uncond, cond = predict("", x, call), predict(made.call["prompt"], x, call)
        added = picture.guide(uncond, cond, [predict(edit.concept, x, call) for edit in picture.edits])
        states.append(x := step(x, uncond, cond, added))
    return states


def together(group, asked=sharing.asked, departure=sharing.departure):
    """The last states, and how many predictions it took. What is not asked for is noise instead."""
    rng, count = np.random.default_rng(1), 0
    pictures, lasts, x = [Picture(made) for made in group], [None] * len(group), START
    trunk_length = max(departure(made, CALLS) for made in group)

    def targets(picture, call, known):
        spans = [asked(edit, CALLS) for edit in picture.edits]
        return [
            known(edit.concept) if first <= call < last else rng.normal(size=SHAPE).astype(np.float32)
            for edit, (first, last) in zip(picture.edits, spans, strict=True)
        ]

    def alone(picture, x):
        nonlocal count
        for call in range(departure(picture.made, CALLS), CALLS):
            known = cache(partial(predict, x=x, call=call))
            uncond, cond, edits = known(""), known(picture.made.call["prompt"]), targets(picture, call, known)
            x = step(x, uncond, cond, picture.guide(uncond, cond, edits))
            count += known.cache_info().misses
        return x

    for call in range(trunk_length + 1):
        for i, picture in enumerate(pictures):
            if departure(picture.made, CALLS) == call:
                lasts[i] = alone(picture, x)
        if call < trunk_length:
            known = cache(partial(predict, x=x, call=call))
            uncond, cond = known(""), known("a cat")
            for picture in pictures:
                if departure(picture.made, CALLS) > call:
                    picture.guide(uncond, cond, targets(picture, call, known))
            x = step(x, uncond, cond, np.zeros_like(x))
            count += known.cache_info().misses
    return lasts, count


@pytest.fixture(scope="module", params=["diffusers", "per_concept"])
def group(request):
    return points(request.param)


@pytest.fixture(scope="module")
def apart(group):
    return [one_by_one(made) for made in group]


def test_shared_work_makes_the_same_pictures(group, apart):
    lasts, count = together(group)
    for last, states in zip(lasts, apart, strict=True):
        np.testing.assert_array_equal(last, states[-1])
    assert count == sharing.evaluations([(made, CALLS) for made in group])
    assert count < 0.7 * len(group) * 4 * CALLS
    assert len({sharing.trunk(made) for made in group}) == 1


def test_pictures_leave_the_trunk_no_earlier_than_they_must(group, apart):
    """States are the unedited picture's up to the departure, and the next one is not."""
    plain = one_by_one(group[0]._replace(edits={"a": Edit("a", scale=0)}))
    left = [sharing.departure(made, CALLS) for made in group]
    for states, call in zip(apart, left, strict=True):
        np.testing.assert_array_equal(states[: call + 1], plain[: call + 1])
        if call < CALLS:
            assert not np.array_equal(states[call + 1], plain[call + 1])
    assert CALLS in left
    assert len(set(left)) > 4


def differ(group, apart, **faults):
    lasts, _ = together(group, **faults)
    return sum(not np.array_equal(last, states[-1]) for last, states in zip(lasts, apart, strict=True))


def later(made, calls):
    return min(sharing.departure(made, calls) + 1, calls)


def moved(first, last):
    """Spans with other ends."""

    def asked(edit, calls):
        span = sharing.asked(edit, calls)
        return span[0] + first, span[1] + last

    return asked


FAULTS = {
    "a departure too late": {"departure": later},
    "no momentum before the warm-up": {"asked": lambda edit, calls: (edit.warmup, sharing.asked(edit, calls)[1])},
    "asked a call too late": {"asked": moved(1, 0)},
    "asked a call too short": {"asked": moved(0, -1)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(group, apart, fault):
    assert differ(group, apart, **FAULTS[fault]) > 2
