"""Skipping the predictions of concepts that have no effect, and compiling ahead of time."""

import warnings
from functools import partial

import jax
import numpy as np
import pytest
from support.guidance_cases import CALLS, close, edits, expected, predictions, row, run

from sega_jax import Edit, Edits, Pipeline
from sega_jax.pipelines.execution.active_concepts import needed, ordered

PROMPTS = ["cat", "dog"]
# In the second row, the first concept cools down and the second one is padding.
COOLED = [[Edit("a", warmup=1, cooldown=2), Edit("b", warmup=0, cooldown=4)], [Edit("c", warmup=0, cooldown=3)]]
STEPS = 6


def count(edits, calls, **options):
    return needed(Edits.stack(ordered(edits, options.get("momentum_scale", 0.1)), **options), calls).tolist()


def test_concepts_are_predicted_until_their_cooldown():
    assert count([[Edit("a", cooldown=12), Edit("b"), Edit("c", cooldown=11)]], 14) == [3] * 11 + [2] + [1] * 2
    assert count(COOLED, STEPS) == [2, 2, 1, 1, 0, 0]
    assert count([[], []], 3) == [0] * 3
    assert count([[Edit("a", scale=0), Edit("b", weight=0), Edit("c")]], 2) == [1] * 2


def test_concepts_without_momentum_are_predicted_from_their_warmup():
    edits = [[Edit("a", warmup=4), Edit("b", warmup=1, cooldown=3)], [Edit("c", warmup=2)]]
    assert count(edits, 5, momentum_scale=0) == [0, 2, 2, 1, 1]
    assert count(edits, 5) == [2, 2, 2, 1, 1]
    assert count([[Edit("a", warmup=2, momentum_scale=0.0), Edit("b", warmup=4, momentum_scale=0.2)]], 3) == [1, 1, 2]


def test_equal_concepts_keep_their_order():
    edits = [Edit(word, warmup=3) for word in "cab"]
    assert ordered([edits, edits[:1]], 0.1) == [tuple(edits), tuple(edits[:1])]


@pytest.mark.parametrize("semantics", ["diffusers", "per_concept"])
def test_skipped_predictions_have_no_effect(semantics):
    """Wrong predictions at skipped calls have no effect: the oracle gives the same guidance to within 1e-12 in
    float64."""
    rng, fewer = np.random.default_rng(0), 0
    with jax.enable_x64(True):
        for case in range(20):
            preds = predictions(rng, 2, 3)
            rows = [row(rng, 3, momentum=case % 2) for _ in range(2)]
            order = [
                sorted(range(3), key=lambda k, r=r: np.inf if r["cooldown"][k] is None else r["cooldown"][k])[::-1]
                for r in rows
            ]
            rows = [{name: [v[k] for k in o] for name, v in r.items()} for r, o in zip(rows, order, strict=True)]
            settings = edits(rows)
            unneeded = np.arange(3) >= needed(settings, CALLS)[:, None]
            fewer += unneeded.sum()
            wrong = np.where(unneeded[:, None, :, None, None, None], 1e3 * rng.standard_normal(), preds.edits)
            close(run(preds._replace(edits=wrong), settings, semantics), expected(preds, rows, semantics))
    assert fewer > CALLS


@pytest.fixture(scope="module")
def prepared(small):
    """Returns the compile report, a call that uses the compiled programs, and a call that predicts all concepts."""
    pipe, other = Pipeline(**small.components), Pipeline(**small.components)
    report = pipe.compile([""] * 2, [[Edit("", warmup=0, cooldown=2), Edit("", warmup=0, cooldown=4)]] * 2, steps=STEPS)
    return (
        report,
        partial(pipe, PROMPTS, steps=STEPS, output="latent"),
        partial(other, PROMPTS, steps=STEPS, output="latent"),
    )


def used(call):
    """Returns the pictures of a call, and the numbers of concepts that its programs predict, in order."""
    with call.func.devices.watch() as programs:
        out = call()
    return out.images, list(dict.fromkeys(p.concepts for p in programs if p.name == "advance"))


@pytest.mark.parametrize(
    ("options", "concepts"),
    [
        ({"edits": COOLED}, [2, 1, 0]),
        ({"edits": [Edit("a", warmup=3), Edit("b", warmup=1)], "momentum_scale": 0.0}, [0, 1, 2]),
    ],
    ids=["cool-downs", "warm-ups without momentum"],
)
def test_pictures_are_the_same_with_fewer_predictions(prepared, options, concepts):
    """The relative L2 distance to the pictures for which all concepts are predicted is below 1e-5; the measured
    distances were between 1e-7 and 9e-7."""
    _, call, other = prepared
    images, skipped = used(partial(call, **options))
    expected_images, unskipped = used(partial(other, **options))
    assert skipped == concepts
    assert unskipped == [2]
    assert np.linalg.norm(images - expected_images) < 1e-5 * np.linalg.norm(expected_images)


@pytest.mark.slow
def test_recording_predicts_all_concepts(prepared):
    _, call, _ = prepared
    with call.func.devices.watch() as programs:
        out = call(COOLED, record=True, output="latent")
    assert {p.concepts for p in programs} == {None, 2}
    assert out.record.edits[0].any((2, 3, 4)).all()


def test_compile_reports_every_program(prepared):
    report, *_ = prepared
    names = [(program.name, program.concepts) for program in report.programs]
    assert names[-5:] == [("advance", 2), ("advance", 1), ("advance", 0), ("decode_latents", None), ("as_bytes", None)]
    memory = [program.memory for program in report.programs if program.name == "advance"]
    assert memory[0] > memory[1] > memory[2] > 0
    assert report.memory >= memory[0]
    assert report.seconds == sum(program.seconds for program in report.programs)
    assert "advance, 1 concept " in str(report)
    assert str(report).count("\n") == len(names)


def test_calls_after_compile_compile_nothing(prepared, small, compilations):
    """Adding a callback or changing cool-downs compiles nothing. If no program for fewer concepts has been compiled, a
    call predicts more concepts than it needs."""
    _, call, _ = prepared
    call(COOLED, output="pil", seed=[5, 9])
    call([Edit("x", cooldown=3, warmup=0), Edit("y", warmup=1)], callback=lambda *_: None, guidance_scale=3)
    half = Pipeline(**small.components)
    half.compile(PROMPTS, [[Edit("", cooldown=20), Edit("")]] * 2)
    compilations.clear()
    _, few = used(partial(half, PROMPTS, COOLED, steps=STEPS, output="latent"))
    assert few == [2, 1]
    assert not compilations


def test_compile_checks_its_arguments(small):
    with pytest.raises(ValueError, match="steps"):
        small.compile("cat", steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small.compile("cat", steps=2, output="latent").programs
