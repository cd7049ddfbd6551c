"""Planning: points to pictures, pictures to batches, and how much of it is shared."""

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
    return [point(said, sweep, FACTS) for said in sweep]


def sweep_of(**axes):
    return Sweep(edits=GLASSES, grid={"prompt": ["a cat"]} | axes)


def named(edits=GLASSES, call=None, facts=FACTS):
    sweep = Sweep(edits=edits, call={"prompt": "a cat"} | (call or {}))
    return name(point(sweep[0], sweep, facts), facts)


def test_a_point_is_complete():
    (made,) = points(Sweep(call={"prompt": "a cat", "momentum_scale": 0.2, "height": 32}, edits=GLASSES))
    assert made.edits == {
        "glasses": Edit("glasses", momentum_scale=0.2, momentum_beta=0.4),
        "beard": Edit("beard", scale=-8, momentum_scale=0.5, momentum_beta=0.4),
    }
    assert made.scheduler is None
    assert made.call == {
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
    assert made.adapters == ()


def test_names_do_not_depend_on_how_a_picture_is_said():
    said = {"steps": 50, "seed": 0, "negative_prompt": "", "height": 16, "guidance_scale": 7.5, "eta": 0}
    other_names = {"spectacles": {"concept": "glasses", "scale": 5}, "b": GLASSES["beard"] | {"concept": "beard"}}
    unchecked = dataclasses.replace(FACTS, model={"source": "x", "safety_checker": False})
    assert named() == named(call=said) == named(edits=other_names) == named(facts=unchecked)
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
    """Settings that are files."""
    paths = [folder / file for file in ("picture.png", "style.safetensors", "cat.bin")]
    Image.new("RGB", (16, 16)).save(paths[0])
    for path in paths[1:]:
        path.write_bytes(b"x")
    picture, style, cat = map(str, paths)
    return {"image": picture, "lora": {style: 0.5}, "textual_inversion": {"<cat>": cat}}


def test_names_are_of_what_decides_a_picture(tmp_path):
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


def test_names_are_of_the_contents_of_files(tmp_path):
    files = files_of(tmp_path)
    before = [named(call={key: value}) for key, value in files.items()]
    Image.new("RGB", (16, 16), "red").save(files["image"])
    for key in ("style.safetensors", "cat.bin"):
        (tmp_path / key).write_bytes(b"y")
    after = [named(call={key: value}) for key, value in files.items()]
    assert not set(before) & set(after)


def test_names_stay_the_same():
    """Those of pictures that are on disk, of plans of this version."""
    assert named() == "805f0ab4a4b99d60ec31"


def test_without_edits_their_settings_make_no_other_picture():
    both = {"semantics": ["diffusers", "per_concept"], "edits": [[], ["glasses"]]}
    sweep = Sweep(edits={"glasses": {}}, call={"prompt": "a cat"}, grid=both | {"glasses.scale": [2, 4]})
    made = plan(sweep, FACTS)
    assert made.counts[:2] == (8, 1 + 4)


def steps_of(batch):
    return dict(batch.settings)["steps"]


def test_batches():
    """Programs follow each other; batches are of one program, scheduler and number of steps; the last is filled up,
    with fewer rows where that is less."""
    sweep = sweep_of(seed=range(5), steps=[11, 20], edits=[["glasses"], ["beard"], ["glasses", "beard"]])
    made = plan(sweep, FACTS, rows=4, share=False)
    assert [(b.program.concepts, steps_of(b), b.program.rows, len(b.points)) for b in made.batches] == [
        *[(1, 11, 4, 4), (1, 11, 4, 4), (1, 11, 4, 2), (1, 20, 4, 4), (1, 20, 4, 4), (1, 20, 4, 2)],
        # Twice three rows for five pictures, as twice four would be more.
        *[(2, 11, 3, 3), (2, 11, 3, 2), (2, 20, 3, 3), (2, 20, 3, 2)],
    ]
    assert sorted(i for batch in made.batches for i in batch.points) == list(range(30))
    for batch in made.batches:
        members = [made.point(i) for i in batch.points]
        assert {(p.call["steps"], len(p.edits)) for p in members} == {(steps_of(batch), batch.program.concepts)}
        assert batch.names == tuple(name(p, FACTS) for p in members)
    counts = made.counts
    assert counts[:4] == (30, 30, 10, 2)
    assert counts.evaluations == 4 * 3 * 3 * (11 + 20) + 3 * 4 * 2 * (11 + 20)
    assert counts.alone == 10 * 3 * (11 + 20) + 5 * 4 * (11 + 20)


@pytest.mark.parametrize(("pictures", "expected"), [(8, 8), (9, 5), (16, 8), (17, 6), (23, 8)])
def test_rows_leave_few_to_fill_up(pictures, expected):
    made = plan(sweep_of(seed=range(pictures)), FACTS, rows=8)
    assert {batch.program.rows for batch in made.batches} == {expected}


def test_a_program_has_no_more_rows_than_pictures():
    (batch,) = plan(sweep_of(seed=range(3)), FACTS, rows=8).batches
    assert batch.program.rows == len(batch.points) == 3


def test_calls_are_the_tables():
    steps = {"PNDMScheduler": 19, "HeunDiscreteScheduler": 19, "DDIMScheduler": 10}
    made = plan(sweep_of(scheduler=list(steps), steps=[10], edits=[[]]), FACTS)
    assert {batch.scheduler: batch.calls for batch in made.batches} == steps


def test_a_plan_is_read_back():
    sweep = Sweep(
        edits=GLASSES,
        call={"prompt": "é"},
        grid={"seed": range(9), "height": [16, 32]},
        sample={"count": 3, "glasses.scale": {"low": 1.0, "high": 2.0}},
    )
    made = plan(sweep, FACTS, rows=4)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()
    assert again.point(53) == made.point(53)
    for text in ("", "[]", "{}", json.dumps(json.loads(made.to_json()) | {"version": 0})):
        with pytest.raises(ValueError, match="this is no plan of a sweep"):
            Plan.from_json(text)


BAD = {
    "a cool-down before its warm-up": (
        {"glasses.warmup": [5, 10], "glasses.cooldown": [8, 20]},
        "glasses.cooldown=8 is before glasses.warmup=10 in one of the points; say such axes side by side",
    ),
    "a size that does not fit": ({"height": [16, 17]}, "height=17 is not a multiple of 2"),
    "fresh noise of a solver without": (
        {"eta": [0.0, 0.5], "scheduler": ["DDIMScheduler", "PNDMScheduler"]},
        "eta=0.5 applies to DDIM and TCD only, not to PNDMScheduler; leave it out; say settings that go together"
        " side by side, in .zip.",
    ),
    "too many steps": ({"steps": [50, 1001]}, "steps=1001 should be from 1 to 1000"),
}


@pytest.mark.parametrize("what", BAD)
def test_points_that_make_no_sense(what):
    axes, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        plan(sweep_of(**axes), FACTS)


def test_rows_are_some():
    with pytest.raises(ValueError, match="rows=0 should be at least 1"):
        plan(sweep_of(), FACTS, rows=0)


def test_edits_that_begin_too_late_are_warned_of_once():
    with pytest.warns(UserWarning, match="in 3 of 6 pictures an edit begins after the last model call"):
        plan(sweep_of(seed=range(3), steps=[10, 11]), FACTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(sweep_of(seed=range(3), steps=[11]), FACTS)


def shared(described, /, **axes):
    made = plan(Sweep(call={"prompt": "a cat", "steps": 50}, edits=described, grid=axes), FACTS).counts
    return made.alone, made.shared


def test_evaluations_with_sharing():
    eight = {"a.scale": [2, 4, 6, 8], "a.threshold": [0.8, 0.9]}
    # Eight settings of one concept, warm from call 10 on: the first 10 calls once.
    assert shared({"a": {"warmup": 10}}, **eight) == (8 * 150, 10 * 3 + 8 * 40 * 3)
    # For every seed.
    assert shared({"a": {"warmup": 10}}, seed=range(5), **eight) == (5 * 1200, 5 * 990)
    # Two concepts, cooled at 25.
    two = {"a": {"warmup": 10, "cooldown": 25}, "b": {"warmup": 10, "cooldown": 25}}
    assert shared(two, **eight) == (8 * 200, 10 * 4 + 8 * (15 * 4 + 25 * 2))
    # Departures at several calls: the trunk goes on to the last of them.
    assert shared({"a": {}}, **{"a.warmup": [5, 10, 20]}) == (450, 20 * 3 + (45 + 40 + 30) * 3)
    # Other words: the states are shared, not the concept's branch.
    assert shared({"a": {}}, **{"a.concept": ["x", "y"]}) == (300, 10 * 4 + 2 * 40 * 3)
    # Without momentum a concept is asked about from its warm-up on.
    assert shared({"a": {"momentum_scale": 0}}, **eight) == (1200, 10 * 2 + 8 * 40 * 3)
    # A strength of zero, as none at all, is the picture without edits: a trunk to its end.
    assert shared({"a": {}}, **{"a.scale": [0, 4]}) == (300, 50 * 2 + 10 + 40 * 3)
    assert shared({"a": {}}, edits=[[], ["a"]]) == (250, 50 * 2 + 10 + 40 * 3)
    # Nothing is shared by pictures of other seeds, prompts or numbers of the call.
    for key, values in {"seed": [1, 2], "negative_prompt": ["", "x"], "guidance_scale": [1, 2], "eta": [0, 1]}.items():
        assert shared({"a": {}}, **{key: values}) == (300, 300)


def test_batches_that_share_take_about_as_few():
    """Eight settings for each of 16 seeds, 50 calls: what a plan runs, with what fills its batches up."""
    grid = {"seed": range(16), "a.scale": [2, 4, 6, 8], "a.threshold": [0.8, 0.9]}

    def counts(edits, share=True):
        return plan(Sweep(call={"prompt": "a cat"}, edits=edits, grid=grid), FACTS, share=share).counts

    warm = counts({"a": {"warmup": 10}})
    assert warm.evaluations == warm.shared == round(0.825 * warm.alone)
    cooled = counts({"a": {"warmup": 10, "cooldown": 25}, "b": {"warmup": 10, "cooldown": 25}})
    assert cooled.evaluations == cooled.shared == round(0.575 * cooled.alone)
    apart = counts({"a": {"warmup": 10}}, share=False)
    assert apart.evaluations == apart.alone == warm.alone


def test_nothing_is_shared_where_that_takes_more():
    made = plan(sweep_of(seed=range(9)), FACTS, rows=8)
    assert not any(batch.shares for batch in made.batches)


def test_batches_that_share_are_not_too_large():
    """No more trunks than rows, and no more pictures than 16 for a row; every picture once."""
    for seeds, scales in ((10, 3), (2, 200)):
        made = plan(sweep_of(seed=range(seeds), **{"glasses.scale": range(1, scales + 1)}), FACTS, rows=4)
        points = [[made.point(i) for i in batch.points] for batch in made.batches]
        assert all(batch.shares for batch in made.batches)
        assert all(len({sharing.trunk(p) for p in part}) <= 4 for part in points)
        assert all(len(part) <= 64 for part in points)
        assert sorted(i for batch in made.batches for i in batch.points) == list(range(seeds * scales))
        assert all(sharing.parts(part, 4) == [list(range(len(part)))] for part in points)
        for part in points:
            branches = sharing.schedule(part, 50, 4).branches
            assert sorted(i for branch in branches for i in branch.members) == list(range(len(part)))
