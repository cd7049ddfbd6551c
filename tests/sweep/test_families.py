"""Tests sweeps of families other than Stable Diffusion: pictures made with shared prefixes equal pictures from single
calls."""

import shlex

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support.sweeping import make_pictures, records, run_and_crash, saved

from sega_jax import load, sweep
from sega_jax.cli.main import main

MOMENTUM = {"momentum_scale": 1.0, "momentum_beta": 0.3}  # large, so that mixing up pictures' momenta would be noticed
HAT = {"hat": {"threshold": 0.5, "scale": 8, **MOMENTUM}}


def plan_of(folder, rows=2, seeds=2, **axes):
    """Plans pictures that share prefixes: for each combination of the other settings, the edit begins at call 2 in one
    picture and at call 4 in another (of 6 calls)."""
    ablation = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat", "steps": 6},
        edits=HAT,
        grid={"hat.warmup": [2, 4]},
        zip={"seed": range(seeds), **axes},
    )
    plan = sweep.plan(ablation, sweep.Facts.of(ablation), rows=rows)
    assert all(batch.shares for batch in plan.batches)
    return plan


def made_separately(pipe, point):
    """Makes the picture for a point in a separate call."""
    call = {name: value for name, value in point.call.items() if value is not None}
    return pipe(**call, edits=list(point.edits.values()), output="uint8").images[0]


def check(plan, folder, pipe):
    """Runs a plan and compares its pictures with pictures from single calls."""
    sweep.run(plan, folder, pipe)
    rows = records(folder)
    assert len({row["digest"] for row in rows}) == len(rows) == plan.counts.pictures
    for row in rows:
        made = np.asarray(Image.open(folder / row["file"])).astype(int)
        assert (abs(made - made_separately(pipe, plan.point(row["point"]))) > 1).mean() < 1e-3
    return rows


def repeated(picture):
    """Returns the command that `info` prints for a picture, split into words."""
    result = CliRunner().invoke(main, ["info", str(picture)])
    assert result.exit_code == 0, result.output
    return shlex.split(result.output.splitlines()[-1])


@pytest.mark.slow
def test_sdxl(least_xl_folder, least_xl, tmp_path):
    """Each picture has its own size conditioning. The negative prompt is missing, which is not the same as an empty
    negative prompt."""
    plan = plan_of(least_xl_folder, original_size=[[16, 16], [64, 32]])
    rows = check(plan, tmp_path / "sweep", least_xl)
    assert {row["original_size"] for row in rows} == {"16,16", "64,32"}
    assert {row["negative_prompt"] for row in rows} == {None}
    (page,) = sweep.sheets(sweep.Results(tmp_path / "sweep"), "hat.warmup", "original_size", {"seed": 0})
    assert not page.fixed
    command = repeated(tmp_path / "sweep" / rows[-1]["file"])
    assert command[command.index("--original-size") + 1] == rows[-1]["original_size"]
    assert "--negative-prompt" not in command


def test_sdxl_distinguishes_no_and_an_empty_negative_prompt(least_xl_folder):
    ablation = sweep.Sweep(
        model={"source": str(least_xl_folder)}, call={"prompt": "a cat"}, grid={"negative_prompt": [None, ""]}
    )
    plan = sweep.plan(ablation, sweep.Facts.of(ablation), rows=2)
    assert sweep.Plan.from_json(plan.to_json()) == plan
    # The pictures are in different batches, since one call cannot combine an empty and a missing negative prompt.
    assert [len(batch.points) for batch in plan.batches] == [1, 1]


@pytest.mark.slow
def test_sdxl_on_two_devices(least_xl_folder, tmp_path):
    pipe = load(least_xl_folder, devices=jax.local_devices()[:2])
    check(plan_of(least_xl_folder, crops_top_left=[[0, 0], [8, 4]]), tmp_path, pipe)


@pytest.mark.slow
def test_paella(paella_folder, paella, tmp_path):
    rows = check(plan_of(paella_folder, temperature=[[1.0, 0.5]] * 2), tmp_path, paella)
    assert {row["scheduler"] for row in rows} == {None}
    assert {row["temperature"] for row in rows} == {"1.0,0.5"}
    command = repeated(tmp_path / rows[0]["file"])
    assert command[command.index("--temperature") + 1] == "1.0,0.5"
    assert "its own schedule" in sweep.report(sweep.Results(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["least_xl_folder", "paella_folder"])
def test_memory(name, one_device, one_by_default, request):
    folder = request.getfixturevalue(name)
    estimate = sweep.needed(plan_of(folder))
    assert estimate.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(load(folder).models))
    assert estimate.row > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"scheduler": "DDIMScheduler"}, "Paella has its own schedule; leave scheduler out"),
        ({"eta": 0.5}, "'eta' is not a setting of Paella; its settings are prompt, negative_prompt"),
        ({"steps": "smart50"}, "steps='smart50' should be a whole number"),
        ({"steps": 3, "renoise_steps": 4}, r"renoise_steps=4 should be from 0 to 3, .*; put settings .* in \[zip\]"),
        ({"influence": [1.2, -1]}, "call: influence=-1 should be at least 0"),
    ],
)
def test_paella_refuses_other_families_settings(paella_folder, call, message):
    def planned():
        ablation = sweep.Sweep(model={"source": str(paella_folder)}, call={"prompt": "a cat"} | call)
        return sweep.plan(ablation, sweep.Facts.of(ablation))

    with pytest.raises((TypeError, ValueError), match=message):
        planned()


@pytest.mark.parametrize("stage", ["stage2", "upscaler"])
def test_families_that_enlarge_pictures_require_one(stages, stage):
    ablation = sweep.Sweep(model={"source": str(stages[stage])}, call={"prompt": "a cat"})
    with pytest.raises(ValueError, match="enlarges pictures and needs a picture; give image in"):
        sweep.plan(ablation, sweep.Facts.of(ablation))


@pytest.mark.slow
@pytest.mark.parametrize("call", [{"choice": "nearest"}, {"influence": [1.2, 0.4]}, {"centred": True}])
def test_paella_with_its_own_settings(paella_folder, paella, tmp_path, call):
    (name, value), *_ = call.items()
    check(plan_of(paella_folder, **{name: [value] * 2}), tmp_path, paella)


@pytest.mark.slow
def test_an_axis_of_rescaled_guidance(least_folder, least, tmp_path):
    rows = check(plan_of(least_folder, guidance_rescale=[0.0, 0.7]), tmp_path, least)
    assert {row["guidance_rescale"] for row in rows} == {0.0, 0.7}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Returns the paths of four pictures of 8x8 pixels."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return [str(path) for path in paths]


def family(name, request):
    """Returns a checkpoint's folder, its pipeline, and an axis of the sweep with four values."""
    pipe = request.getfixturevalue(name)
    if name in ("first", "second"):
        folder = request.getfixturevalue("stages")["stage1" if name == "first" else "stage2"]
    else:
        folder = request.getfixturevalue(f"{name}_folder")
    axes = {
        "least_xl": lambda: {"original_size": [[8, 8], [16, 16], [32, 16], [64, 32]]},
        "first": lambda: {"guidance_scale": [3, 4, 5, 6]},
        "second": lambda: {"image": request.getfixturevalue("pictures")},
        "paella": lambda: {"guidance_scale": [3, 4, 5, 6]},
    }
    return folder, pipe, axes[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["least_xl", "first", "second", "paella"])
def test_every_family_follows_its_plan(name, request, tmp_path):
    """The sweep runs exactly the planned evaluations, and its pictures equal pictures from single calls.

    If the sweep crashes in the second of two batches and is resumed, its pictures are still bit-identical.
    """
    folder, pipe, axes = family(name, request)
    plan = plan_of(folder, seeds=4, **axes)
    assert len(plan.batches) == 2
    images, evaluations = make_pictures(plan, pipe)
    assert plan.counts.shared <= evaluations == plan.counts.evaluations < 0.9 * plan.counts.alone
    check(plan, tmp_path / "whole", pipe)
    run_and_crash(plan, tmp_path / "stopped", pipe, 7)
    assert sweep.status(tmp_path / "stopped").batches_done == 1
    sweep.run(plan, tmp_path / "stopped", pipe)
    assert len(images) == 8
    for part in ("whole", "stopped"):
        pictures = saved(plan, tmp_path / part)
        assert pictures.keys() == images.keys()
        assert all(np.array_equal(pictures[name], image) for name, image in images.items())
