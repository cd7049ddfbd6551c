"""Tests sweep settings other than numbers and text: input pictures, LoRAs, textual inversions, text options and tiled
decoding. Every picture equals the picture from a single call."""

import re
import shlex
import shutil

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from support.hub import COMMIT, Stub
from support.sweeping import records

from sega_jax import CheckpointError, Pipeline, sweep
from sega_jax.cli.main import main
from sega_jax.pipelines.adapters import with_adapters
from sega_jax.sweep.description.fields import adapter_kinds
from sega_jax.sweep.planning import outline
from sega_jax.sweep.running import run as running

pytestmark = pytest.mark.usefixtures("one_by_default")

HAT = {"hat": {"threshold": 0.5, "scale": 8, "momentum_scale": 1.0, "momentum_beta": 0.3}}
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def folder(small_folder):
    return small_folder


@pytest.fixture(scope="module")
def pipe(small):
    return small


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns a folder with two LoRAs, a textual inversion, two pictures of 16x16 pixels and two of 8x8."""
    where, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for name in "ab":
        down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
        save_file({f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up}, where / f"{name}.safetensors")
    save_file({"<toy>": rng.standard_normal((2, 16)).astype(np.float32)}, where / "toy.safetensors")
    for side in (8, 16):
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(where / f"{side}-{i}.png")
    return where


def planned(folder, files, rows=2, share=True, call=None, grid=None, **blocks):
    call = {"prompt": "a cat", "steps": 6} | (call or {})
    ablation = sweep.Sweep(
        model={"source": str(folder)},
        call={name: value for name, value in call.items() if value is not None},
        edits=HAT,
        grid={"hat.warmup": [2, 4]} | (grid or {}),
        zip={"seed": [0, 1], **blocks},
        folder=files,
    )
    plan = sweep.plan(ablation, sweep.Facts.of(ablation), rows=rows, share=share)
    assert sweep.Plan.from_json(plan.to_json()) == plan
    return plan


def made_separately(pipe, point):
    """Makes the picture for a point in a separate call."""
    copy, kinds = Pipeline(**pipe.components), adapter_kinds()
    given = {name: kinds[name].given(pairs) for name, pairs in point.adapters}
    added = with_adapters(pipe.models, pipe.tokenizer, given.get("lora"), given.get("textual_inversion"))
    copy.models, copy.tokenizer = added
    call = {name: value for name, value in point.call.items() if value is not None}
    return copy(**call, edits=list(point.edits.values()), output="uint8", progress=False).images[0]


def check(plan, out, pipe, different=4):
    """Runs a plan and compares its pictures with pictures from single calls."""
    sweep.run(plan, out / "whole", pipe, progress=False)
    rows = records(out / "whole")
    assert len({row["digest"] for row in rows}) == different
    for row in rows:
        made = np.asarray(Image.open(out / "whole" / row["file"])).astype(int)
        assert (abs(made - made_separately(pipe, plan.point(row["point"]))) > 1).mean() < 1e-3
    return rows


def repeated(picture):
    """Returns the command that `info` prints for a picture, split into words."""
    result = CliRunner().invoke(main, ["info", str(picture)])
    assert result.exit_code == 0, result.output
    return shlex.split(result.output.splitlines()[-1])


def test_starting_from_pictures(folder, pipe, files, tmp_path):
    """Each row of a batch starts from its own picture, whose path is relative to the sweep's folder."""
    plan = planned(folder, files, image=["16-0.png", "16-1.png"], call={"strength": 0.7})
    assert all(batch.calls == 4 and batch.shares for batch in plan.batches)
    assert max(len(batch.points) for batch in plan.batches) == 4
    rows = check(plan, tmp_path, pipe)
    assert {row["image"] for row in rows} == {str((files / f"16-{i}.png").resolve()) for i in range(2)}
    command = repeated(tmp_path / "whole" / rows[0]["file"])
    assert command[command.index("--image") + 1] == rows[0]["image"]
    assert command[command.index("--strength") + 1] == "0.7"


@pytest.mark.slow
def test_each_lora_is_merged_once(folder, pipe, files, tmp_path, monkeypatch):
    merged = []
    monkeypatch.setattr(running, "with_adapters", lambda *given: merged.append(given[2]) or with_adapters(*given))
    loras = [{}, "a.safetensors", {"a.safetensors": 0.5, "b.safetensors": -1}]
    rows = check(planned(folder, files, grid={"lora": loras}), tmp_path, pipe, different=12)
    a, b = ((files / f"{name}.safetensors").resolve() for name in "ab")
    assert {row["lora"] for row in rows} == {None, f"{a}:1.0", f"{a}:0.5, {b}:-1.0"}
    assert len(merged) == 2
    row = next(row for row in rows if row["lora"] == f"{a}:1.0")
    command = repeated(tmp_path / "whole" / row["file"])
    assert command[command.index("--lora") + 1] == f"{a}:1.0"


def test_loras_in_a_folder_and_on_the_hub(folder, files, tmp_path, monkeypatch):
    """Both sources are resolved to files before they are hashed, so the names do not depend on the source."""
    client = Stub(tmp_path / "style", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    client.folder.mkdir()
    shutil.copy(files / "a.safetensors", client.folder / "pytorch_lora_weights.safetensors")
    plans = [
        planned(folder, where, call={"lora": name}) for where, name in ((tmp_path, "style"), (files, "owner/style"))
    ]
    here, there = (next(iter(plan.sweep.files)) for plan in plans)
    assert here == str(tmp_path / "style" / "pytorch_lora_weights.safetensors")
    assert there == f"owner/style@{COMMIT}/pytorch_lora_weights.safetensors"
    assert plans[0].batches[0].names == plans[1].batches[0].names
    assert plans[0].batches[0].names == planned(folder, files, call={"lora": "a.safetensors"}).batches[0].names
    outline.check_files(plans[1])
    shutil.copy(files / "b.safetensors", client.folder / "pytorch_lora_weights.safetensors")
    for plan, path in zip(plans, (here, there), strict=True):
        with pytest.raises(ValueError, match=f"{re.escape(path)} has changed since the sweep was planned"):
            outline.check_files(plan)


def test_textual_inversions(folder, pipe, files, tmp_path):
    call = {"prompt": "a <toy> cat"}
    rows = check(
        planned(folder, files, call=call, textual_inversion=[{}, {"<toy>": "toy.safetensors"}]), tmp_path, pipe
    )
    named = f"<toy>={(files / 'toy.safetensors').resolve()}"
    assert {row["textual_inversion"] for row in rows} == {None, named}
    command = repeated(tmp_path / "whole" / next(row["file"] for row in rows if row["textual_inversion"]))
    assert command[command.index("--textual-inversion") + 1] == named


@pytest.mark.slow
def test_texts_of_different_lengths_are_in_different_batches(folder, pipe, files, tmp_path):
    """In a common batch, a short text would be padded to the length of the longest text, and its picture would
    change."""
    call = {"prompt": None, "long_prompts": True, "weighted": True}
    plan = planned(folder, files, call=call, prompt=["a (cat:1.5)", "a cat " * 20])
    assert all(len({plan.point(i).call["prompt"] for i in batch.points}) == 1 for batch in plan.batches)
    check(plan, tmp_path, pipe)


@pytest.mark.slow
def test_tiled_decoding(folder, pipe, files, tmp_path):
    plan = planned(folder, files, call={"height": 32, "width": 32}, tiled=[False, 8])
    assert len({batch.program for batch in plan.batches}) == 2
    check(plan, tmp_path, pipe)


@pytest.mark.slow
@pytest.mark.parametrize("anew", [False, True])
def test_enlarging_pictures(stages, second, files, tmp_path, anew):
    call = {"steps": 6, "noise_anew": anew}
    words = {"text_encoder": second.models.text_encoder, "tokenizer": second.tokenizer}
    plan = planned(
        stages["stage1"].parent / "2", files, call=call, image=["8-0.png", "8-1.png"], noise_level=[100, 300]
    )
    del words
    rows = check(plan, tmp_path, second)
    assert {row["noise_level"] for row in rows} == {100, 300}


@pytest.mark.slow
def test_the_x4_upscaler(stages, upscaler, files, tmp_path):
    plan = planned(stages["upscaler"], files, image=["8-0.png", "8-1.png"], tiled=[False, False])
    check(plan, tmp_path, upscaler)


@pytest.mark.slow
def test_resuming_a_sweep_with_adapters(folder, pipe, files, tmp_path):
    plan = planned(folder, files, grid={"lora": [{}, "a.safetensors"]}, image=["16-0.png", "16-1.png"])
    check(plan, tmp_path, pipe, different=8)
    sweep.run(plan, tmp_path / "again", pipe, progress=False)
    parts = sorted((tmp_path / "again" / "records").iterdir())
    for part in parts[1:]:
        part.unlink()
    sweep.run(sweep.Folder(tmp_path / "again").plan(), tmp_path / "again", progress=False)
    digests = [{row["name"]: row["digest"] for row in records(tmp_path / name)} for name in ("whole", "again")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"image": "missing.png"}, FileNotFoundError, "call: image: .*missing.png does not exist"),
        ({"image": "a.safetensors"}, ValueError, "cannot be read as a picture"),
        ({"image": 5}, TypeError, "call: image=5 should be the path of an image file"),
        ({"image": "8-0.png"}, ValueError, r"image has 8x8 pixels .* expected 16x16"),
        ({"strength": 0.5}, ValueError, "needs a picture to start from"),
        ({"lora": "missing.safetensors"}, FileNotFoundError, "call: lora: .*missing.safetensors does not exist"),
        ({"lora": {"a.safetensors": "much"}}, TypeError, "the scale of a.safetensors='much' should be a finite number"),
        ({"lora": 5}, TypeError, "call: lora=5 should be a LoRA file, .* or {file: scale}; {} adds none"),
        ({"lora": "toy.safetensors"}, CheckpointError, "toy.safetensors"),
        ({"textual_inversion": "a.safetensors"}, CheckpointError, "a.safetensors"),
        ({"textual_inversion": {"cat": 5}}, TypeError, "should be {word: file}"),
        ({"tiled": 6}, ValueError, "tiled=6 is not a multiple of 8"),
        ({"prompt": "(a:1.2.3)", "weighted": True, "long_prompts": True}, ValueError, "1.2.3"),
        ({"clip_skip": 9}, ValueError, "clip_skip=9 should be from 0 to 2 for this text encoder"),
    ],
)
def test_invalid_settings_are_refused(folder, files, call, error, message):
    with pytest.raises(error, match=message):
        sweep.check(planned(folder, files, call=call))


def test_adapters_are_not_options_of_the_model(folder):
    with pytest.raises(ValueError, match=r"model: 'lora' is unknown; give it in \[call\] or as an axis"):
        sweep.Sweep(model={"source": str(folder), "lora": "a.safetensors"}, call={"prompt": "a"})


def test_families_without_adapters(paella_folder, files):
    for name, value in {"lora": "a.safetensors", "textual_inversion": "toy.safetensors"}.items():
        ablation = sweep.Sweep(
            model={"source": str(paella_folder)}, call={"prompt": "a", "steps": 2, name: value}, folder=files
        )
        with pytest.raises(ValueError, match=f"{name} .*Paella"):
            sweep.plan(ablation, sweep.Facts.of(ablation))


def test_changed_files_are_noticed(folder, pipe, files, tmp_path):
    """A changed file changes the pictures' names in new plans, and running an earlier plan raises an error."""
    image = tmp_path / "a.png"
    Image.open(files / "16-0.png").save(image)
    plan = planned(folder, tmp_path, call={"image": "a.png"})
    Image.open(files / "16-1.png").save(image)
    other = planned(folder, tmp_path, call={"image": "a.png"})
    assert not {name for batch in plan.batches for name in batch.names} & {*other.batches[0].names}
    with pytest.raises(ValueError, match=r"a.png has changed since the sweep was planned; restore the file"):
        sweep.run(plan, tmp_path / "out", pipe, progress=False)
    assert not (tmp_path / "out").exists()


def test_results_can_be_read_without_the_input_files(folder, pipe, files, tmp_path):
    for name in ("16-0.png", "a.safetensors"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    plan = planned(folder, tmp_path, call={"image": "16-0.png", "lora": "a.safetensors"})
    sweep.run(plan, tmp_path / "out", pipe, progress=False)
    for name in ("16-0.png", "a.safetensors"):
        (tmp_path / name).unlink()
    assert sweep.status(tmp_path / "out").done == 4
    results = sweep.Results(tmp_path / "out")
    assert len(results.rows) == 4
    assert "16 × 16" in sweep.report(results)
    assert sweep.run(results.plan, tmp_path / "out", pipe, progress=False).done == 4


def test_names_do_not_depend_on_the_paths_of_files(folder, files, tmp_path):
    for name in ("16-0.png", "a.safetensors"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    call = {"image": "16-0.png", "lora": "a.safetensors"}
    names = [planned(folder, where, call=call).batches[0].names for where in (files, tmp_path)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_changing_adapters_takes_the_planned_evaluations(folder, pipe, files, tmp_path):
    """Covers programs for cool-downs, which are prepared again after each change of adapters."""
    plan = planned(folder, files, grid={"lora": ["a.safetensors", "b.safetensors"], "hat.cooldown": [5]})
    sweeping = running._Run(plan, sweep.Folder(tmp_path), Pipeline(**pipe.components))
    sweeping.folder.begin(plan)
    taken = []
    for number in range(len(plan.batches)):
        before = sweeping.shared.evaluations
        sweeping.run_batches([number], lambda: True, False)
        taken.append(sweeping.shared.evaluations - before)
        assert taken[-1] == plan.evaluations(number)
    assert len({batch.adapters for batch in plan.batches}) == 2


def test_glob_lists_matching_pictures(folder, files):
    ablation = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat", "steps": 4, "strength": 0.5},
        grid={"image": {"glob": "16-*.png"}},
        folder=files,
    )
    assert ablation.grid["image"] == tuple(str(files / f"16-{i}.png") for i in range(2))
    assert sweep.Sweep(**ablation.as_dict()) == ablation
    with pytest.raises(ValueError, match="grid: image has no values"):
        sweep.Sweep(call={"prompt": "a cat"}, grid={"image": {"glob": "none-*.png"}}, folder=files)


@pytest.mark.slow
def test_reports_show_file_names_without_folders(folder, pipe, files, tmp_path):
    plan = planned(folder, files, grid={"lora": [{}, "a.safetensors"]}, image=["16-0.png", "16-1.png"])
    sweep.run(plan, tmp_path, pipe, progress=False)
    results = sweep.Results(tmp_path)
    assert results.axes["lora"] == ["none", "a.safetensors:1.0"]
    assert results.axes["image"] == ["16-0.png", "16-1.png"]
    assert len(results.where({"lora": "a.safetensors:1.0", "image": "16-1.png"})) == 2
    assert "<bdi>&#34;none&#34;</bdi>, <bdi>&#34;a.safetensors:1.0&#34;</bdi>" in sweep.report(results)


@pytest.mark.slow
def test_info_repeats_pictures_without_edits(folder, pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ablation = sweep.Sweep(model={"source": str(folder)}, call={"prompt": "a cat", "steps": 2}, grid={"seed": [3, 4]})
    sweep.run(sweep.plan(ablation, sweep.Facts.of(ablation), 1), tmp_path / "out", pipe, progress=False)
    # A report also works if no axis varies an edit.
    assert "<figure" in sweep.report(sweep.Results(tmp_path / "out"))
    row = records(tmp_path / "out")[0]
    command = repeated(tmp_path / "out" / row["file"])
    result = CliRunner().invoke(main, [*command[1:], "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["0001-original.png"]
    pictures = [Image.open(path) for path in (tmp_path / "out" / row["file"], tmp_path / "again" / "0001-original.png")]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": {"from": 0, "count": 10**30}}, "grid: seed.count=1000.* should be from 0 to"),
        ({"image": ["~nobody-here/x.png"]}, "grid: image: .*x.png does not exist"),
        ({"image": ["x" * 5000]}, "grid: image: .* cannot be read"),
        ({"image": ["a\0b"]}, "grid: image: embedded null byte"),
    ],
)
def test_extreme_paths_and_counts_are_refused(grid, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        sweep.Sweep(call={"prompt": "a cat"}, grid=grid)
