"""Tests planning: points are turned into pictures, pictures are grouped into batches, and common prefixes are
shared."""

import dataclasses
import json
import warnings

import pytest
from PIL import Image
from support import tiny

from sega_jax import Edit
from sega_jax.sweep import Facts, Plan, Sweep, plan
from sega_jax.sweep.description import fields
from sega_jax.sweep.description.points import name, point
from sega_jax.sweep.planning import sharing
from sega_jax.systems import stable_diffusion
from sega_jax.systems.base import Sizes

DDIM = {"_class_name": "DDIMScheduler", **tiny.SD_BETAS}
FACTS = Facts({"source": "x"}, "stable_diffusion", DDIM, Sizes(4, 2, 2, (16, 16)))
GLASSES = {"glasses": {}, "beard": {"scale": -8.0, "momentum_scale": 0.5}}


def points(sweep):
    return [point(settings, sweep, FACTS) for settings in sweep]


def sweep_of(**axes):
    return Sweep(edits=GLASSES, grid={"prompt": ["a cat"]} | axes)


def named(edits=GLASSES, call=None, facts=FACTS):
    sweep = Sweep(edits=edits, call={"prompt": "a cat"} | (call or {}))
    return name(point(sweep[0], sweep, facts), facts)


def test_a_point_has_all_settings():
    (complete,) = points(Sweep(call={"prompt": "a cat", "momentum_scale": 0.2, "height": 32}, edits=GLASSES))
    assert complete.edits == {
        "glasses": Edit("glasses", threshold=0.9, warmup=10, momentum_scale=0.2, momentum_beta=0.4),
        "beard": Edit("beard", scale=-8, threshold=0.9, warmup=10, momentum_scale=0.5, momentum_beta=0.4),
    }
    assert complete.scheduler is None
    assert complete.call == {
        "prompt": "a cat",
        "negative_prompt": "",
        "seed": 0,
        "steps": 50,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "height": 32,
        "width": 16,
        "semantics": "diffusers",
        "support": "channel",
        "tiled": False,
        "image": None,
        "strength": None,
        "long_prompts": False,
        "weighted": False,
        "clip_skip": 0,
    }
    assert complete.adapters == ()


def test_names_do_not_depend_on_how_settings_are_written():
    defaults = {"steps": 50, "seed": 0, "negative_prompt": "", "height": 16, "guidance_scale": 7.5, "eta": 0}
    other_names = {"spectacles": {"concept": "glasses", "scale": 5}, "b": GLASSES["beard"] | {"concept": "beard"}}
    unchecked = dataclasses.replace(FACTS, model={"source": "x", "safety_checker": False})
    assert named() == named(call=defaults) == named(edits=other_names) == named(facts=unchecked)
    assert named() == named(call={"scheduler": "DDIMScheduler"})


CALLS = {
    "prompt": "a dog",
    "negative_prompt": "x",
    "seed": 1,
    "steps": 49,
    "eta": 0.1,
    "guidance_scale": 7,
    "guidance_rescale": 0.5,
    "height": 32,
    "width": 32,
    "momentum_scale": 0.2,
    "momentum_beta": 0.2,
    "semantics": "per_concept",
    "support": "pixel",
    "scheduler": "PNDMScheduler",
    "edits": ["glasses"],
    "tiled": True,
    "long_prompts": True,
    "weighted": True,
    "clip_skip": 1,
}
SETTINGS = {
    "concept": "hat",
    "scale": 4,
    "threshold": 0.8,
    "warmup": 9,
    "cooldown": 20,
    "weight": 2,
    "momentum_scale": 0.3,
    "momentum_beta": 0.3,
}


def files_of(folder):
    """Writes a picture and two adapters, and returns the settings that contain their paths."""
    paths = [folder / file for file in ("picture.png", "style.safetensors", "cat.bin")]
    Image.new("RGB", (16, 16)).save(paths[0])
    for path in paths[1:]:
        path.write_bytes(b"x")
    picture, style, cat = map(str, paths)
    return {"image": picture, "lora": {style: 0.5}, "textual_inversion": {"<cat>": cat}}


def test_every_setting_changes_the_name(tmp_path):
    files = files_of(tmp_path)
    assert {*CALLS, *files, "strength", "edited"} == {
        *fields.call_settings(stable_diffusion.SYSTEM.call),
        *fields.OTHERS,
    }
    assert SETTINGS.keys() == fields.edit_settings().keys()
    names = [named(call={key: value}) for key, value in (CALLS | files).items()]
    names += [named(call={"image": files["image"], "strength": 0.5})]
    names += [named(edits=GLASSES | {"glasses": {key: value}}) for key, value in SETTINGS.items()]
    names += [named(call={"edits": []}), named(call={"edits": ["beard"]})]
    names += [named(facts=dataclasses.replace(FACTS, model={"source": "y"}))]
    names += [named(facts=dataclasses.replace(FACTS, scheduler=DDIM | {"beta_end": 0.013}))]
    assert len({named(), *names}) == 1 + len(names)


def test_contents_of_files_change_the_name(tmp_path):
    files = files_of(tmp_path)
    before = [named(call={key: value}) for key, value in files.items()]
    Image.new("RGB", (16, 16), "red").save(files["image"])
    for key in ("style.safetensors", "cat.bin"):
        (tmp_path / key).write_bytes(b"y")
    after = [named(call={key: value}) for key, value in files.items()]
    assert not set(before) & set(after)


def test_names_do_not_change_between_versions():
    """Pictures that earlier versions wrote have these names."""
    assert named() == "805f0ab4a4b99d60ec31"


def test_settings_of_edits_do_not_change_unedited_pictures():
    both = {"semantics": ["diffusers", "per_concept"], "edits": [[], ["glasses"]]}
    sweep = Sweep(edits={"glasses": {}}, call={"prompt": "a cat"}, grid=both | {"glasses.scale": [2, 4]})
    planned = plan(sweep, FACTS)
    assert planned.counts[:2] == (8, 1 + 4)


def steps_of(batch):
    return dict(batch.settings)["steps"]


def test_points_are_grouped_into_batches():
    """Batches of a program are consecutive. A batch has one program, scheduler and number of steps. The last batch is
    padded, unless batches with fewer rows need less padding."""
    sweep = sweep_of(seed=range(5), steps=[11, 20], edits=[["glasses"], ["beard"], ["glasses", "beard"]])
    planned = plan(sweep, FACTS, rows=4, share=False)
    assert [(b.program.concepts, steps_of(b), b.program.rows, len(b.points)) for b in planned.batches] == [
        *[(1, 11, 4, 4), (1, 11, 4, 4), (1, 11, 4, 2), (1, 20, 4, 4), (1, 20, 4, 4), (1, 20, 4, 2)],
        # Five pictures form two batches of three rows, since two batches of four rows would need more padding.
        *[(2, 11, 3, 3), (2, 11, 3, 2), (2, 20, 3, 3), (2, 20, 3, 2)],
    ]
    assert sorted(i for batch in planned.batches for i in batch.points) == list(range(30))
    for batch in planned.batches:
        members = [planned.point(i) for i in batch.points]
        assert {(p.call["steps"], len(p.edits)) for p in members} == {(steps_of(batch), batch.program.concepts)}
        assert batch.names == tuple(name(p, FACTS) for p in members)
    counts = planned.counts
    assert counts[:4] == (30, 30, 10, 2)
    assert counts.evaluations == 4 * 3 * 3 * (11 + 20) + 3 * 4 * 2 * (11 + 20)
    assert counts.alone == 10 * 3 * (11 + 20) + 5 * 4 * (11 + 20)


@pytest.mark.parametrize(("pictures", "expected"), [(8, 8), (9, 5), (16, 8), (17, 6), (23, 8)])
def test_rows_minimise_padding(pictures, expected):
    planned = plan(sweep_of(seed=range(pictures)), FACTS, rows=8)
    assert {batch.program.rows for batch in planned.batches} == {expected}


def test_a_program_has_no_more_rows_than_pictures():
    (batch,) = plan(sweep_of(seed=range(3)), FACTS, rows=8).batches
    assert batch.program.rows == len(batch.points) == 3


def test_calls_are_counted_in_the_schedule_table():
    steps = {"PNDMScheduler": 19, "HeunDiscreteScheduler": 19, "DDIMScheduler": 10}
    planned = plan(sweep_of(scheduler=list(steps), steps=[10], edits=[[]]), FACTS)
    assert {batch.scheduler: batch.calls for batch in planned.batches} == steps


def test_plan_json_round_trip():
    sweep = Sweep(
        edits=GLASSES,
        call={"prompt": "é"},
        grid={"seed": range(9), "height": [16, 32]},
        sample={"count": 3, "glasses.scale": {"low": 1.0, "high": 2.0}},
    )
    planned = plan(sweep, FACTS, rows=4)
    again = Plan.from_json(planned.to_json())
    assert again == planned
    assert again.to_json() == planned.to_json()
    assert again.point(53) == planned.point(53)
    changed = planned.to_json().replace("é", "e")
    for text in ("", "[]", "{}", "[" * 100_000, changed):
        with pytest.raises(ValueError, match="this is not a readable plan"):
            Plan.from_json(text)
    with pytest.raises(ValueError, match="a different version of sega_jax: its format is 0"):
        Plan.from_json(json.dumps(json.loads(planned.to_json()) | {"version": 0}))


BAD = {
    "a cool-down before its warm-up": (
        {"glasses.warmup": [5, 10], "glasses.cooldown": [8, 20]},
        "glasses.cooldown=8 should be greater than glasses.warmup=10; put both axes in .zip.",
    ),
    "a size that does not fit": ({"height": [16, 17]}, "height=17 is not a multiple of 2"),
    "eta for a solver without noise": (
        {"eta": [0.0, 0.5], "scheduler": ["DDIMScheduler", "PNDMScheduler"]},
        "eta=0.5 .* PNDMScheduler.*; put settings that depend on each other in .zip.",
    ),
    "too many steps": ({"steps": [50, 1001]}, "steps=1001 should be from 1 to 1000"),
}


@pytest.mark.parametrize("what", BAD)
def test_invalid_points_are_refused(what):
    axes, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        plan(sweep_of(**axes), FACTS)


def test_zero_rows_are_refused():
    with pytest.raises(ValueError, match="rows=0 should be at least 1"):
        plan(sweep_of(), FACTS, rows=0)


def test_one_warning_for_edits_that_begin_too_late():
    with pytest.warns(UserWarning, match="in 3 of 6 pictures, the warm-up of an edit lasts until the last model call"):
        plan(sweep_of(seed=range(3), steps=[10, 11]), FACTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(sweep_of(seed=range(3), steps=[11]), FACTS)


def shared(described, /, **axes):
    planned = plan(Sweep(call={"prompt": "a cat", "steps": 50}, edits=described, grid=axes), FACTS).counts
    return planned.alone, planned.shared


def test_fewest_evaluations_with_sharing():
    eight = {"a.scale": [2, 4, 6, 8], "a.threshold": [0.8, 0.9]}
    # Eight settings of one concept whose warm-up ends at call 10: the first 10 calls run only once for all settings.
    assert shared({"a": {"warmup": 10}}, **eight) == (8 * 150, 10 * 3 + 8 * 40 * 3)
    # The same holds for each seed.
    assert shared({"a": {"warmup": 10}}, seed=range(5), **eight) == (5 * 1200, 5 * 990)
    # Two concepts cool down at call 25.
    two = {"a": {"warmup": 10, "cooldown": 25}, "b": {"warmup": 10, "cooldown": 25}}
    assert shared(two, **eight) == (8 * 200, 10 * 4 + 8 * (15 * 4 + 25 * 2))
    # The pictures depart at different calls: the trunk extends to the last departure.
    assert shared({"a": {}}, **{"a.warmup": [5, 10, 20]}) == (450, 20 * 3 + (45 + 40 + 30) * 3)
    # With different concepts, the states are shared, but the concepts' predictions are not.
    assert shared({"a": {}}, **{"a.concept": ["x", "y"]}) == (300, 10 * 4 + 2 * 40 * 3)
    # Without momentum, a concept's prediction is needed only from its warm-up on.
    assert shared({"a": {"momentum_scale": 0}}, **eight) == (1200, 10 * 2 + 8 * 40 * 3)
    # A scale of zero is equivalent to no edit: the trunk extends to the last call.
    assert shared({"a": {}}, **{"a.scale": [0, 4]}) == (300, 50 * 2 + 10 + 40 * 3)
    assert shared({"a": {}}, edits=[[], ["a"]]) == (250, 50 * 2 + 10 + 40 * 3)
    # Pictures with different seeds, prompts or numeric arguments share nothing.
    for key, values in {"seed": [1, 2], "negative_prompt": ["", "x"], "guidance_scale": [1, 2], "eta": [0, 1]}.items():
        assert shared({"a": {}}, **{key: values}) == (300, 300)


def test_shared_batches_reach_the_fewest_evaluations():
    """A plan with eight settings for each of 16 seeds, and with 50 calls, needs no padding."""
    grid = {"seed": range(16), "a.scale": [2, 4, 6, 8], "a.threshold": [0.8, 0.9]}

    def counts(edits, share=True):
        return plan(Sweep(call={"prompt": "a cat"}, edits=edits, grid=grid), FACTS, share=share).counts

    warm = counts({"a": {"warmup": 10}})
    assert warm.evaluations == warm.shared == round(0.825 * warm.alone)
    cooled = counts({"a": {"warmup": 10, "cooldown": 25}, "b": {"warmup": 10, "cooldown": 25}})
    assert cooled.evaluations == cooled.shared == round(0.575 * cooled.alone)
    apart = counts({"a": {"warmup": 10}}, share=False)
    assert apart.evaluations == apart.alone == warm.alone


def test_nothing_is_shared_if_that_costs_more():
    planned = plan(sweep_of(seed=range(9)), FACTS, rows=8)
    assert not any(batch.shares for batch in planned.batches)


def test_shared_batches_are_limited_in_size():
    """A shared batch has at most as many trunks as rows, and at most 16 pictures per row. Every picture occurs once."""
    for seeds, scales in ((10, 3), (2, 200)):
        planned = plan(sweep_of(seed=range(seeds), **{"glasses.scale": range(1, scales + 1)}), FACTS, rows=4)
        points = [[planned.point(i) for i in batch.points] for batch in planned.batches]
        assert all(batch.shares for batch in planned.batches)
        assert all(len({sharing.trunk(p) for p in part}) <= 4 for part in points)
        assert all(len(part) <= 64 for part in points)
        assert sorted(i for batch in planned.batches for i in batch.points) == list(range(seeds * scales))
        assert all(sharing.parts(part, 4) == [list(range(len(part)))] for part in points)
        for part in points:
            forks = sharing.schedule(part, 50, 4).forks
            assert sorted(i for fork in forks for i in fork.members) == list(range(len(part)))
