"""Sweeps of other families than Stable Diffusion: shared prefixes give the pictures of single calls."""

import shlex

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support import tiny
from support.sweeping import records

from sega_jax import load, sweep
from sega_jax.cli.main import main

MOMENTUM = {"momentum_scale": 1.0, "momentum_beta": 0.3}  # so much that it shows whose it is
HAT = {"hat": {"threshold": 0.5, "scale": 8, **MOMENTUM}}


def plan_of(folder, rows=2, **axes):
    """Plans pictures that share prefixes: with every other setting, an edit begins at call 2 or 4 of 6."""
    said = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat", "steps": 6},
        edits=HAT,
        grid={"hat.warmup": [2, 4]},
        zip={"seed": [0, 1], **axes},
    )
    plan = sweep.plan(said, sweep.Facts.of(said), rows=rows)
    assert all(batch.shares for batch in plan.batches)
    return plan


def alone(pipe, point):
    """Makes the picture of a point by a call of its own."""
    call = {name: value for name, value in point.call.items() if value is not None}
    return pipe(**call, edits=list(point.edits.values()), output="uint8").images[0]


def check(plan, folder, pipe):
    """Runs a plan and compares its pictures with those of single calls."""
    sweep.run(plan, folder, pipe)
    rows = records(folder)
    assert len({row["digest"] for row in rows}) == len(rows) == 4
    for row in rows:
        made = np.asarray(Image.open(folder / row["file"])).astype(int)
        assert (abs(made - alone(pipe, plan.point(row["point"]))) > 1).mean() < 1e-3
    return rows


def repeated(picture):
    """Returns the words of the command that `info` prints for a picture."""
    said = CliRunner().invoke(main, ["info", str(picture)])
    assert said.exit_code == 0, said.output
    return shlex.split(said.output.splitlines()[-1])


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    """A checkpoint whose UNet has two levels, one with attention."""
    unet = tiny.UNET_XL | {"block_out_channels": [8, 16], "attention_head_dim": [1, 2]}
    unet |= {"transformer_layers_per_block": 1, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    unet |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    return tiny.xl(tmp_path_factory.mktemp("checkpoints") / "xl", unet=unet, vae=tiny.VAE_1)


@pytest.fixture(scope="module")
def paella_folder(tmp_path_factory):
    return tiny.paella(tmp_path_factory.mktemp("checkpoints") / "paella")


def test_sdxl(xl_folder, one_device, tmp_path):
    """With sizes that condition each picture, and without a negative prompt, which is not an empty one."""
    pipe = load(xl_folder, devices=one_device)
    plan = plan_of(xl_folder, original_size=[[16, 16], [64, 32]])
    rows = check(plan, tmp_path / "sweep", pipe)
    assert {row["original_size"] for row in rows} == {"16,16", "64,32"}
    assert {row["negative_prompt"] for row in rows} == {None}
    (page,) = sweep.sheets(sweep.Results(tmp_path / "sweep"), "hat.warmup", "original_size", {"seed": 0})
    assert not page.fixed
    command = repeated(tmp_path / "sweep" / rows[-1]["file"])
    assert command[command.index("--original-size") + 1] == rows[-1]["original_size"]
    assert "--negative-prompt" not in command


def test_an_empty_negative_prompt_of_sdxl_is_another_picture(xl_folder):
    said = sweep.Sweep(model={"source": str(xl_folder)}, call={"prompt": "a cat"}, grid={"negative_prompt": [None, ""]})
    plan = sweep.plan(said, sweep.Facts.of(said), rows=2)
    assert sweep.Plan.from_json(plan.to_json()) == plan
    # And of another batch, since no call takes both.
    assert [len(batch.points) for batch in plan.batches] == [1, 1]


@pytest.mark.slow
def test_sdxl_on_two_devices(xl_folder, tmp_path):
    pipe = load(xl_folder, devices=jax.local_devices()[:2])
    check(plan_of(xl_folder, crops_top_left=[[0, 0], [8, 4]]), tmp_path, pipe)


def test_paella(paella_folder, one_device, tmp_path):
    pipe = load(paella_folder, devices=one_device)
    rows = check(plan_of(paella_folder, temperature=[[1.0, 0.5]] * 2), tmp_path, pipe)
    assert {row["scheduler"] for row in rows} == {None}
    assert {row["temperature"] for row in rows} == {"1.0,0.5"}
    command = repeated(tmp_path / rows[0]["file"])
    assert command[command.index("--temperature") + 1] == "1.0,0.5"
    assert "its own schedule" in sweep.report(sweep.Results(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xl_folder", "paella_folder"])
def test_memory(name, one_device, one_by_default, request):
    folder = request.getfixturevalue(name)
    found = sweep.needed(plan_of(folder))
    assert found.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(load(folder).models))
    assert found.row > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"scheduler": "DDIMScheduler"}, "Paella has a schedule of its own; leave it out"),
        ({"eta": 0.5}, "'eta' is not a setting of Paella, which has prompt, negative_prompt"),
        ({"steps": "smart50"}, "steps='smart50' should be a whole number"),
        ({"steps": 3, "renoise_steps": 4}, r"renoise_steps=4 should be from 0 to 3; say settings .* in \[zip\]"),
        ({"influence": [1.2, -1]}, "call: influence=-1 should be at least 0"),
    ],
)
def test_settings_that_paella_does_not_have(paella_folder, call, message):
    def planned():
        said = sweep.Sweep(model={"source": str(paella_folder)}, call={"prompt": "a cat"} | call)
        return sweep.plan(said, sweep.Facts.of(said))

    with pytest.raises((TypeError, ValueError), match=message):
        planned()


@pytest.mark.parametrize("stage", ["stage2", "upscaler"])
def test_families_that_enlarge_pictures_need_one(stages, stage):
    said = sweep.Sweep(model={"source": str(stages[stage])}, call={"prompt": "a cat"})
    with pytest.raises(ValueError, match="enlarges pictures; say image in"):
        sweep.plan(said, sweep.Facts.of(said))


@pytest.mark.slow
@pytest.mark.parametrize("call", [{"choice": "nearest"}, {"influence": [1.2, 0.4]}, {"centred": True}])
def test_paella_with_its_own_settings(paella_folder, one_device, tmp_path, call):
    pipe = load(paella_folder, devices=one_device)
    (name, value), *_ = call.items()
    check(plan_of(paella_folder, **{name: [value] * 2}), tmp_path, pipe)


def test_an_axis_of_rescaled_guidance(least_folder, least, tmp_path):
    rows = check(plan_of(least_folder, guidance_rescale=[0.0, 0.7]), tmp_path, least)
    assert {row["guidance_rescale"] for row in rows} == {0.0, 0.7}
