"""Tests sweeps of cascades: each stage has its own plan and is loaded once, and the pictures equal those from direct
calls of the cascade."""

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from support import tiny
from support.sweeping import records

from sega_jax import CheckpointError, Edit, load_cascade, sweep
from sega_jax.cli.main import main
from sega_jax.pipelines import loading
from sega_jax.pipelines.sources import Source
from sega_jax.sweep.running.folder import Folder
from sega_jax.sweep.running.writer import BatchWriter

pytestmark = pytest.mark.usefixtures("one_by_default")

HAT = {"threshold": 0.5, "scale": 8, "warmup": 1}
LATER = ["stage2", "upscaler"]


def ablation_of(stages, names=("stage1", "stage2"), call=None, **grid):
    source, *later = (str(stages[name]) for name in names)
    return sweep.Sweep(
        model={"source": source} | dict(zip(names[1:], later, strict=True)),
        call={"prompt": "a cat", "steps": 3, "stage2": {"steps": 2}} | (call or {}),
        edits={"hat": {key: value for key, value in HAT.items() if f"hat.{key}" not in grid}},
        grid={"seed": [0, 1]} | grid,
    )


def planned(ablation, rows=2):
    plan = sweep.plan(ablation, sweep.Facts.of(ablation), rows)
    assert sweep.Plan.from_json(plan.to_json()) == plan
    return plan


def check(plan, folder, cascade):
    """Compares the pictures of a sweep with pictures from calls of a cascade."""
    rows = records(folder)
    assert len(rows) == plan.counts.pictures
    for row in rows:
        calls = {stage.facts.stage: dict(stage.point(row["point"]).call) for stage in plan.chain}
        first = calls.pop("stage1")
        common = {name: first.pop(name) for name in ("prompt", "negative_prompt", "seed")}
        own = ("steps", "guidance_scale", "noise_level", "noise_anew", "eta", "guidance_rescale", "tiled")
        later = {name: {key: call[key] for key in own if key in call} for name, call in calls.items()}
        points = {stage.facts.stage: stage.point(row["point"]) for stage in plan.chain}
        edits = next((list(point.edits.values()) for point in points.values() if point.edits), [])
        edited = [name for name, point in points.items() if point.edits] or ["stage1"]
        out = cascade(**common, edits=edits, edited=edited, output="uint8", stage1=first, **later)
        made = np.asarray(Image.open(folder / row["file"])).astype(int)
        assert (abs(made - out.images[0]) > 1).mean() < 2e-3
    assert len({row["digest"] for row in rows}) == len(rows)
    return rows


@pytest.fixture
def loaded(monkeypatch):
    """Returns a list that records the folders of loaded checkpoints."""
    names, load = [], loading.load

    def one(source, **options):
        names.append(str(source))
        return load(source, **options)

    monkeypatch.setattr(loading, "load", one)
    return names


@pytest.fixture(scope="module")
def cascade(stages, one_device):
    return load_cascade(stages["stage1"], stages["stage2"], devices=one_device)


@pytest.mark.slow
def test_stages_have_their_own_settings(stages, cascade, loaded, tmp_path):
    """Varying the second stage's settings does not add pictures to the first stage."""
    ablation = ablation_of(stages, **{"stage2.noise_level": [50, 250], "stage2.steps": [2, 3]}, call={"stage2": {}})
    plan = planned(ablation)
    assert [stage.counts.pictures for stage in plan.chain] == [2, 8]
    done = sweep.run(plan, tmp_path, progress=False)
    assert done == sweep.status(tmp_path)
    assert {name: one.done for name, one in sweep.stages(tmp_path).items()} == {"stage1": 2, "stage2": 8}
    assert loaded == [str(stages["stage1"]), str(stages["stage2"])]
    rows = check(plan, tmp_path, cascade)
    assert {(row["steps"], row["stage2.steps"], row["stage2.noise_level"]) for row in rows} == {
        (3, steps, level) for steps in (2, 3) for level in (50, 250)
    }
    assert {(row["height"], row["stage2.height"]) for row in rows} == {(8, 32)}
    results = sweep.Results(tmp_path)
    assert results.axes["stage2.steps"] == [2, 3]
    assert len(sweep.sheets(results, "stage2.steps", "stage2.noise_level", {"seed": 0})) == 1
    assert "32 × 32" in sweep.report(results)
    files = {path.name for path in (tmp_path / "stages" / "stage1" / "pictures").iterdir()}
    assert files == {"0000-seed=0.npy", "0004-seed=1.npy"}
    assert "pictures/0006-seed=1-stage2.noise_level=250-stage2.steps=2.png" in {row["file"] for row in rows}


@pytest.mark.slow
def test_edits_guide_the_listed_stages(stages, cascade, tmp_path):
    """Edits guide only the stages that `edited` lists. Common prefixes are shared within each stage."""
    edited = [["stage1"], ["stage2"], ["stage1", "stage2"]]
    plan = planned(ablation_of(stages, seed=[0], edited=edited, **{"hat.scale": [4, 8]}))
    # All points without edits in the first stage share one picture from that stage.
    assert [stage.counts.pictures for stage in plan.chain] == [3, 6]
    assert any(batch.shares for batch in plan.earlier.batches)
    sweep.run(plan, tmp_path, progress=False)
    rows = check(plan, tmp_path, cascade)
    row = next(row for row in rows if len(plan.point(row["point"]).edits) and row["hat.scale"] == 4)
    info = CliRunner().invoke(main, ["info", str(tmp_path / row["file"])])
    words = shlex.split(info.output.splitlines()[-1])
    assert words[words.index("--stage2") + 1] == str(stages["stage2"])
    assert words[words.index("--stage2-steps") + 1] == "2"
    assert "stage2" in [words[i + 1] for i, word in enumerate(words) if word == "--edited"]
    measured = sweep.measure(tmp_path, {"distance": sweep.distance(sweep.Results(tmp_path))})
    assert measured.metrics == ["distance"]


@pytest.mark.slow
def test_resuming_at_the_second_stage(stages, loaded, tmp_path):
    """The pictures are bit-identical, and the first stage is not loaded again."""
    plan = planned(ablation_of(stages, **{"stage2.noise_level": [50, 250]}))
    sweep.run(plan, tmp_path, progress=False)
    before = {row["name"]: row["digest"] for row in records(tmp_path)}
    parts = sorted((tmp_path / "records").iterdir())
    parts[-1].unlink()
    del loaded[:]
    kept = Folder(tmp_path).plan()
    assert kept == plan
    sweep.run(kept, tmp_path, progress=False)
    assert {row["name"]: row["digest"] for row in records(tmp_path)} == before
    assert loaded == [str(stages["stage2"])]


@pytest.mark.slow
def test_three_stages(stages, one_device, tmp_path):
    plan = planned(ablation_of(stages, ("stage1", *LATER), call={"upscaler": {"steps": 2}, "guidance_scale": 3.0}))
    assert [stage.facts.stage for stage in plan.chain] == ["stage1", *LATER]
    sweep.run(plan, tmp_path, progress=False)
    names = {"stage1": stages["stage1"], **{name: stages[name] for name in LATER}}
    check(plan, tmp_path, load_cascade(*names.values(), devices=one_device))
    for name in ("stage1", "stage2"):
        assert sweep.status(tmp_path / "stages" / name).done == 2


@pytest.mark.slow
def test_the_command(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "cascade.toml"
    file.write_text(
        f"""
        [model]
        source = "{stages["stage1"]}"
        stage2 = {{ source = "{stages["stage2"]}" }}
        [call]
        prompt = "a cat"
        steps = 2
        stage2.steps = 2
        [edits.hat]
        [grid]
        stage2.noise_level = [50, 250]
        """
    )
    out = tmp_path / "out"
    dry = CliRunner().invoke(main, ["sweep", str(file), "--out", str(out), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "stage1: pictures: 1 (from 2 points)" in dry.output
    assert "stage2: pictures: 2 (from 2 points)" in dry.output
    assert dry.output.count("MiB for each") == 2
    made = CliRunner().invoke(main, ["sweep", str(file), "--out", str(out)])
    assert made.exit_code == 0, made.output
    again = CliRunner().invoke(main, ["sweep", str(file), "--out", str(out)])
    assert "Made 0 pictures" in again.output
    status = CliRunner().invoke(main, ["sweep", "status", str(out)])
    lines = ["stage1: 1 of 1 pictures, 1 of 1 batches", "stage2: 2 of 2 pictures, 1 of 1 batches"]
    assert status.output.splitlines() == lines


@pytest.mark.slow
def test_nan_in_the_first_stage_marks_the_final_picture(stages, tmp_path, monkeypatch):
    plan = planned(ablation_of(stages))
    (batch,) = plan.earlier.batches
    broken, add = batch.points.index(1), BatchWriter.add

    def adding(writer, i, image, finite, flagged, rows):
        add(writer, i, image, finite and i != broken, flagged, rows)

    with monkeypatch.context() as patched:
        patched.setattr(BatchWriter, "add", adding)
        sweep.run(plan.earlier, tmp_path / "stages" / "stage1", progress=False)
    sweep.run(plan, tmp_path, progress=False)
    rows = {row["point"]: row for row in records(tmp_path)}
    assert [rows[i]["finite"] for i in range(2)] == [True, False]
    assert rows[1]["file"] is None


@pytest.mark.parametrize(
    ("model", "call", "error", "message"),
    [
        (
            {"stage2": "upscaler"},
            {},
            CheckpointError,
            "stage2=.* is a checkpoint of Stable Diffusion's x4 upscaler; give a checkpoint",
        ),
        ({"upscaler": "upscaler"}, {}, CheckpointError, "upscaler enlarges the pictures of stage2, which is missing"),
        ({"stage2": 5}, {}, TypeError, "stage2=5 should be this stage's checkpoint, or a table"),
        ({"stage2": {"dtype": "float32"}}, {}, TypeError, "should be this stage's checkpoint, or a table"),
        ({}, {"stage2": {"steps": 2}}, ValueError, r"'stage2.steps' needs stage2, which is missing; add its"),
        ({}, {"edited": ["stage1"]}, ValueError, "'edited' is only for cascades, where it lists the stages"),
        ({"stage2": "stage2"}, {"edited": ["upscaler"]}, ValueError, "'edited' needs upscaler, which is missing"),
        ({"stage2": "stage2"}, {"edited": ["stage3"]}, ValueError, "should be a list of the stages that the edits"),
        ({"stage2": "stage2"}, {"stage2": {"wobble": 2}}, ValueError, "'stage2.wobble' is unknown; the settings of"),
        ({"stage2": "stage2"}, {"stage2": {"prompt": "x"}}, ValueError, "'stage2.prompt' is unknown; the settings of"),
        ({"stage2": "stage2"}, {"stage2": {"noise_level": -1}}, ValueError, "call: stage2.noise_level=-1 should be"),
        (
            {"stage2": "stage2"},
            {"stage2": {"noise_level": 10**6}},
            ValueError,
            "a point of the sweep: noise_level=10+ should",
        ),
    ],
)
def test_invalid_settings_are_refused(stages, model, call, error, message):
    known = {name: str(stages[value]) if isinstance(value, str) else value for name, value in model.items()}

    def planned():
        model = {"source": str(stages["stage1"])} | known
        ablation = sweep.Sweep(model=model, call={"prompt": "a cat", "steps": 2} | call)
        sweep.check(sweep.plan(ablation, sweep.Facts.of(ablation)))

    with pytest.raises(error, match=message):
        planned()


def test_other_models_start_no_cascade(least_folder, stages):
    ablation = sweep.Sweep(
        model={"source": str(least_folder), "stage2": str(stages["stage2"])}, call={"prompt": "a cat"}
    )
    with pytest.raises(CheckpointError, match="is not the first stage of a cascade with stage2"):
        sweep.Facts.of(ablation)


def test_a_cascade_accepts_no_pipeline(stages, first, tmp_path):
    with pytest.raises(TypeError, match="a cascade loads its stages one after another and cannot use a loaded pipe"):
        sweep.run(planned(ablation_of(stages)), tmp_path, first)


@pytest.mark.slow
def test_first_stage_lora_changes_second_stage_text(stages, tmp_path, one_device):
    """The stages of a cascade share the encoded text, which a LoRA of the first stage may change."""
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, tiny.T5["d_model"]), "lora_B": (tiny.T5["num_heads"] * tiny.T5["d_kv"], 2)}
    layer = "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    tensors = {
        f"{layer}.{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "t5.safetensors")
    plan = planned(ablation_of(stages, lora=[{}, {str(tmp_path / "t5.safetensors"): 3.0}]))
    assert len({batch.text_adapters for batch in plan.batches}) == 2
    sweep.run(plan, tmp_path / "out", progress=False)
    rows = records(tmp_path / "out")
    for row in rows:
        lora = {str(tmp_path / "t5.safetensors"): 3.0} if row["lora"] else None
        cascade = load_cascade(stages["stage1"], stages["stage2"], loras={"stage1": lora}, devices=one_device)
        call = {"stage1": {"steps": 3}, "stage2": {"steps": 2}, "output": "uint8", "seed": row["seed"]}
        out = cascade("a cat", Edit("hat", **HAT), **call)
        made = np.asarray(Image.open(tmp_path / "out" / row["file"])).astype(int)
        assert (abs(made - out.images[0]) > 1).mean() < 2e-3
    assert len({row["digest"] for row in rows}) == 4


@pytest.mark.slow
def test_records_list_the_guided_stages(stages, tmp_path):
    plan = planned(ablation_of(stages, seed=[0], edited=[["stage1"], ["stage2"]]))
    sweep.run(plan, tmp_path, progress=False)
    rows = {row["point"]: row for row in records(tmp_path)}
    assert [rows[i]["edited"] for i in range(2)] == ["stage1", "stage2"]
    assert {row["stage2.model"] for row in rows.values()} == {str(stages["stage2"])}


@pytest.mark.slow
def test_a_finished_cascade_does_not_need_its_first_stage(stages, loaded, tmp_path):
    plan = planned(ablation_of(stages))
    sweep.run(plan, tmp_path, progress=False)
    for path in (tmp_path / "stages" / "stage1" / "pictures").iterdir():
        path.unlink()
    del loaded[:]
    assert sweep.seconds_left(tmp_path) == 0
    assert sweep.run(plan, tmp_path, progress=False).done == 2
    assert loaded == []


def test_status_as_json_lists_the_stages(stages, tmp_path):
    sweep.keep(planned(ablation_of(stages)), tmp_path)
    result = CliRunner().invoke(main, ["sweep", "status", str(tmp_path), "--json"])
    printed = json.loads(result.stdout)
    progress = {name: one._asdict() | {"seconds_left": None} for name, one in sweep.stages(tmp_path).items()}
    assert printed["stages"] == progress
    assert list(progress) == ["stage1", "stage2"]
    assert {name: printed[name] for name in progress["stage2"]} == progress["stage2"]


def test_stages_are_checked_before_weights_are_fetched(stages, monkeypatch):
    model = {"source": str(stages["stage1"]), "stage2": {"source": str(stages["upscaler"])}}
    ablation = sweep.Sweep(model=model, call={"prompt": "a cat"})

    def fetch(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr(Source, "fetch", fetch)
    with pytest.raises(CheckpointError, match=r"stage2=.* is a checkpoint of Stable Diffusion's x4 upscaler"):
        sweep.Facts.of(ablation)


def test_the_first_stage_has_no_prefix(stages):
    with pytest.raises(ValueError, match=r"'stage1.steps' belongs to the first stage, whose settings have no prefix"):
        ablation_of(stages, call={"stage1.steps": 3})


@pytest.mark.slow
def test_later_stages_scale_the_first_stages_size(stages, cascade, tmp_path):
    """The sizes of later stages are multiples of the first stage's size."""
    plan = planned(ablation_of(stages, seed=[0], call={"height": 12, "width": 20}))
    sweep.run(plan, tmp_path, progress=False)
    (row,) = check(plan, tmp_path, cascade)
    assert (row["stage2.height"], row["stage2.width"]) == (48, 80)
