"""The settings that a checkpoint recommends."""

import json
import shlex
import shutil

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support import tiny

from convert import convert
from sega_jax import CheckpointError, Edit, Pipeline, Recommended, SemanticStableDiffusionPipeline, load
from sega_jax.cli.main import main
from sega_jax.demo.settings import RECOMMENDED
from sega_jax.pipelines import pipeline, png
from sega_jax.pipelines.batch import prepare
from sega_jax.pipelines.loading import DEMO
from sega_jax.pipelines.recommended import FILE, read, recommendable
from sega_jax.sweep import Facts, Plan, Sweep, plan
from sega_jax.sweep.running.metadata import picture_metadata
from sega_jax.systems import registry

SETTINGS = {
    "call": {"steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.5, "momentum_scale": 0.3},
    "add": {"threshold": 0.6, "warmup_share": 0.5},
    "remove": {"warmup_share": 0.25},
}


@pytest.fixture(scope="module")
def recommending(small_folder, tmp_path_factory):
    """Returns a checkpoint's folder with recommended settings."""
    folder = tmp_path_factory.mktemp("checkpoints") / "recommending"
    shutil.copytree(small_folder, folder)
    tiny.write_json(folder / FILE, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def advised(small, recommending):
    """Returns a pipeline with recommended settings that shares the networks of `small`."""
    return Pipeline(**small.components | {"recommended": read(recommending, small.system)})


def test_a_call_uses_the_recommended_settings(advised, small):
    plain = advised.prepare("a cat", [Edit("hat"), Edit("scarf", scale=-5)])
    given = small.prepare(
        "a cat",
        [Edit("hat", threshold=0.6, warmup=2), Edit("scarf", scale=-5, threshold=0.9, warmup=1)],
        steps=4,
        guidance_scale=3.0,
        guidance_rescale=0.5,
        momentum_scale=0.3,
    )
    assert plain.edits == given.edits
    assert plain.calls == 4
    jax.tree.map(np.testing.assert_array_equal, plain.table, given.table)
    for one, other in zip(jax.tree.leaves(plain.settings.edits), jax.tree.leaves(given.settings.edits), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(plain.settings.guidance_scale, given.settings.guidance_scale)


def test_given_settings_replace_the_recommended_ones(advised):
    batch = advised.prepare(
        "a cat", Edit("hat", threshold=0.8, warmup=3, momentum_scale=0.0), steps=8, guidance_rescale=0.0
    )
    [[edit]] = {tuple(row) for row in batch.edits}
    assert (edit.threshold, edit.warmup, edit.momentum_scale) == (0.8, 3, 0.0)
    assert batch.calls == 8
    # The recommended warm-up is a share of the calls that this call makes.
    [[edit]] = {tuple(row) for row in advised.prepare("a cat", "hat", steps=8).edits}
    assert (edit.threshold, edit.warmup) == (0.6, 4)


def test_without_recommendations_the_defaults_of_the_library_apply(small):
    assert not small.recommended
    batch = small.prepare("a cat", [Edit("hat")])
    [[edit]] = {tuple(row) for row in batch.edits}
    assert (edit.threshold, edit.warmup) == (0.9, 10)
    assert batch.calls == 50
    assert batch.settings.guidance_scale.tolist() == [7.5]


def test_the_diffusers_pipelines_keep_their_own_defaults(advised, small, monkeypatch):
    batches = []
    for pipe in (advised, small):
        face = SemanticStableDiffusionPipeline.from_pipe(pipe)

        def keep(native, **options):
            batches.append(native.prepare(**options))
            raise InterruptedError

        monkeypatch.setattr(type(face.pipeline), "__call__", keep)
        with pytest.raises(InterruptedError):
            face("a cat", editing_prompt="hat")
    one, other = batches
    assert one.edits == other.edits
    assert one.calls == other.calls
    jax.tree.map(np.testing.assert_array_equal, one.settings._replace(key=None), other.settings._replace(key=None))


def test_components_copies_and_saved_checkpoints_keep_them(advised, tmp_path):
    assert Pipeline(**advised.components).recommended == advised.recommended
    folder = advised.save(tmp_path / "saved", progress=False)
    assert json.loads((folder / FILE).read_text()) == SETTINGS
    assert load(folder, devices=advised.devices).recommended == advised.recommended
    other = Pipeline(**advised.components)
    other.recommended = Recommended()
    assert not (other.save(tmp_path / "plain", progress=False) / FILE).exists()


def test_the_demo_model_recommends_settings():
    assert read(DEMO, registry.named("stable_diffusion")) == RECOMMENDED
    assert RECOMMENDED.edit(Edit("hat"), 20) == Edit("hat", threshold=0.7, warmup=8)
    assert RECOMMENDED.edit(Edit("hat"), 50).warmup == 20
    assert RECOMMENDED.edit(Edit("hat", scale=-1), 20) == Edit("hat", scale=-1, threshold=0.9, warmup=2)
    assert RECOMMENDED.edit(Edit("hat", warmup=3), 20).warmup == 3


@pytest.mark.parametrize("system", registry.systems().values(), ids=lambda system: system.name)
def test_every_family_can_recommend_steps_and_scales(system):
    assert {"steps", "guidance_scale", "momentum_scale"} <= recommendable(system).keys()


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / FILE).symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a file; restore it"):
        read(tmp_path, registry.named("stable_diffusion"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"calls": {}}', "has 'calls', but it may contain only call, add, remove"),
        ('{"call": 3}', "call=3 should be an object"),
        ('{"add": []}', "add=[] should be an object"),
        ('{"call": {"step": 3}}', "call: 'step' cannot be recommended; give only steps"),
        ('{"call": {"prompt": "a cat"}}', "call: 'prompt' cannot be recommended"),
        ('{"call": {"strength": 0.5}}', "call: 'strength' cannot be recommended"),
        ('{"call": {"steps": 0}}', "steps=0"),
        ('{"call": {"steps": 2.5}}', "steps=2.5"),
        ('{"call": {"guidance_scale": 0.5}}', "weakens the prompt"),
        ('{"call": {"guidance_scale": [4.0, 5.0]}}', "guidance_scale"),
        ('{"add": {"warmup_share": 8}}', "warmup_share=8"),
        ('{"add": {"warmup": 8}}', "add: 'warmup' cannot be recommended; give only threshold, warmup_share"),
        ('{"add": {"threshold": NaN}}', "threshold=nan"),
        ('{"remove": {"scale": 3}}', "remove: 'scale' cannot be recommended"),
        ("[]", "list"),
        ('{"call":', "not readable JSON"),
    ],
)
def test_a_wrong_file_is_refused(contents, message, tmp_path):
    (tmp_path / FILE).write_text(contents)
    with pytest.raises(CheckpointError, match=FILE) as raised:
        read(tmp_path, registry.named("stable_diffusion"))
    assert message in str(raised.value)


def test_sweeps_use_the_recommended_settings(recommending):
    described = Sweep(
        model={"source": str(recommending)}, call={"prompt": "a cat"}, edits={"hat": {}}, grid={"hat.scale": [5, -5]}
    )
    facts = Facts.of(described)
    again = Plan.from_json(plan(described, facts, rows=2).to_json())
    points = [again.point(i) for i in range(2)]
    calls = {tuple(point.call[name] for name in ("steps", "guidance_scale", "guidance_rescale")) for point in points}
    assert calls == {(4, 3.0, 0.5)}
    assert [(e.threshold, e.warmup, e.momentum_scale) for point in points for e in point.edits.values()] == [
        (0.6, 2, 0.3),
        (0.9, 1, 0.3),
    ]


def test_the_shell_uses_them_and_says_so(recommending, tmp_path):
    words = ["edit", "--model", recommending, "--prompt", "a cat", "--edit", "hat", "--edit", "-scarf:warmup=0"]
    result = CliRunner().invoke(main, [*map(str, words), "--guidance-rescale", "0", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "+ hat: scale 5, threshold 0.6, from call 2" in result.output
    assert "- scarf: scale 5, threshold 0.9, from call 0" in result.output
    assert "as the checkpoint recommends: steps 4, guidance_scale 3, momentum_scale 0.3\n" in result.output
    output = CliRunner().invoke(main, ["info", str(tmp_path / "0001-edited.png")]).output
    command = shlex.split(output.splitlines()[-1])
    # The command does not depend on the recommendation.
    (recommending / FILE).rename(tmp_path / FILE)
    try:
        again = CliRunner().invoke(main, [*command[1:], "--out", str(tmp_path / "again")])
    finally:
        (tmp_path / FILE).rename(recommending / FILE)
    assert again.exit_code == 0, again.output
    one, other = (np.asarray(Image.open(folder / "0001-edited.png")) for folder in (tmp_path, tmp_path / "again"))
    np.testing.assert_array_equal(one, other)


def test_conversions_keep_them(recommending, tmp_path):
    assert json.loads((convert(recommending, tmp_path / "orbax", progress=False) / FILE).read_text()) == SETTINGS


def test_settings_made_in_python_are_checked(advised):
    for wrong in ({"add": {"warmup_share": 8}}, {"remove": {"warmup": 0.5}}, {"add": 3}):
        with pytest.raises((TypeError, ValueError), match=r"warmup|add"):
            Recommended(**wrong)
    pipe = Pipeline(**advised.components)
    with pytest.raises(ValueError, match="call: 'stesp' cannot be recommended"):
        pipe.recommended = Recommended(call={"stesp": 3})
    with pytest.raises(TypeError, match=r"should be a sega_jax\.Recommended"):
        pipe.recommended = {"call": {}}


def test_the_command_for_a_sweeps_picture_does_not_depend_on_recommendations(recommending, tmp_path):
    """The sweep sets the library's defaults, which differ from the recommended values."""
    described = Sweep(model={"source": str(recommending)}, call={"prompt": "a cat", "steps": 50, "guidance_scale": 7.5})
    made = plan(described, Facts.of(described))
    stored = picture_metadata(made, 0, load(recommending))
    png.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", stored)
    command = CliRunner().invoke(main, ["info", str(tmp_path / "a.png")]).output.splitlines()[-1]
    assert "--steps 50 --guidance-scale 7.5" in command


@pytest.mark.parametrize(
    ("option", "thresholds", "warmups"),
    [("--animate=steps=4,12", {0.6}, {2, 6}), ("--animate=hat.scale=-5,5", {0.6, 0.9}, {1, 2})],
)
def test_each_frame_of_an_animation_has_its_own_recommendations(
    recommending, tmp_path, monkeypatch, option, thresholds, warmups
):
    edits = []

    def keep(call, pipe):
        batch = prepare(call, pipe)
        edits.extend(edit for row in batch.edits for edit in row)
        return batch

    monkeypatch.setattr(pipeline, "prepare", keep)
    words = ["edit", "--model", str(recommending), "--prompt", "a cat", "--edit", "hat", option]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert ({edit.threshold for edit in edits}, {edit.warmup for edit in edits}) == (thresholds, warmups)
    assert ("recommends: steps" in result.output) == ("hat" in option)
    command = CliRunner().invoke(main, ["info", str(tmp_path / "0001-animation.webp")]).output.splitlines()[-1]
    assert "--edit hat " in command


def test_recommended_words_are_printed(recommending, tmp_path):
    folder = tmp_path / "words"
    shutil.copytree(recommending, folder)
    tiny.write_json(folder / FILE, {"call": {"semantics": "per_concept", "steps": 1}})
    words = ["edit", "--model", str(folder), "--prompt", "a cat", "--edit", "hat:warmup=0", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "as the checkpoint recommends: semantics per_concept, steps 1" in result.output
