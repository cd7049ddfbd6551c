"""Tests runs of sweeps: after crashes, interruptions and lack of memory, every picture exists exactly once and is
unchanged."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from PIL import Image
from support.sweeping import records, same

from sega_jax import CheckpointError, Edit, sweep
from sega_jax.cli.main import main
from sega_jax.pipelines import loading, stored_settings
from sega_jax.sweep.running import run, store
from sega_jax.sweep.running.folder import Folder
from sega_jax.sweep.running.prefixes import SharedRun
from sega_jax.sweep.running.records import columns

CALL = {"steps": 3, "guidance_scale": 4.0, "prompt": "a cat"}
EDITS = {"hat": {"warmup": 1, "threshold": 0.5}, "glasses": {"warmup": 0}}
GRID = {"seed": range(3), "edits": [["hat"], ["hat", "glasses"]], "hat.scale": [2, -4]}


@pytest.fixture(scope="module")
def plan(least_folder):
    ablation = sweep.Sweep(model={"source": str(least_folder)}, call=CALL, edits=EDITS, grid=GRID)
    return sweep.plan(ablation, sweep.Facts.of(ablation), rows=2, share=False)


@pytest.fixture(scope="module")
def done(plan, least, tmp_path_factory):
    """Returns the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert sweep.run(plan, folder, least) == (12, 12, 6, 6, 0)
    return folder


def test_pictures_equal_those_of_a_call_with_the_same_batch(done, plan, least):
    """Calling the pipeline with the rows of a batch gives the same pictures, bit for bit."""
    rows = {row["name"]: row for row in records(done)}
    for batch in plan.batches:
        points = [plan.point(i) for i in batch.points]
        edits = [list(point.edits.values()) for point in points]
        call = CALL | {"prompt": ["a cat"] * 2, "seed": [point.call["seed"] for point in points], "output": "uint8"}
        images = least(edits=edits, **call).images
        for name, image in zip(batch.names, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(done / rows[name]["file"])), image)


def test_records_have_all_settings(done, plan):
    table = pyarrow.parquet.read_table(done / "records")
    assert table.column_names == list(columns(plan.sweep, plan.facts))
    rows = table.to_pylist()
    assert sorted(row["point"] for row in rows) == list(range(12))
    files = {path.name for path in (done / "pictures").iterdir()}
    assert {row["name"]: row["file"] for row in rows} == {name: f"pictures/{file}" for name, file in plan.files.items()}
    assert files == set(plan.files.values()) >= {"0002-seed=0-edits=hat_glasses-hat.scale=2.png"}
    assert len({row["digest"] for row in rows}) == 12
    (row,) = [row for row in rows if row["point"] == 2]
    assert row.items() >= {"seed": 0, "steps": 3, "calls": 3, "prompt": "a cat", "guidance_scale": 4.0}.items()
    assert row.items() >= {"hat.scale": 2.0, "hat.warmup": 1, "glasses.warmup": 0, "hat.cooldown": None}.items()
    assert row.items() >= {"scheduler": "DDIMScheduler", "rows": 2, "finite": True, "flagged": None}.items()
    (row,) = [row for row in rows if row["point"] == 0]
    assert row.items() >= {"hat.concept": "hat", "glasses.concept": None, "glasses.scale": None}.items()
    assert all(row["seconds"] > 0 for row in rows)


def test_pictures_store_their_settings(done, plan, tmp_path):
    """`info` prints a command that reproduces the picture, except for rounding differences due to a different batch."""
    row = next(row for row in records(done) if row["point"] == 3)
    known = stored_settings.read(done / row["file"])
    assert [Edit(**edit) for edit in known["edits"]] == list(plan.point(3).edits.values())
    ablation = CliRunner().invoke(main, ["info", str(done / row["file"])])
    assert ablation.exit_code == 0, ablation.output
    assert "--edit=-hat:scale=4" in ablation.output or "-hat:scale=4" in ablation.output


def test_a_second_run_does_nothing(done, plan, least, tmp_path, compilations, monkeypatch):
    sweep.run(plan, tmp_path, least)
    assert not compilations
    same(tmp_path, done)
    monkeypatch.setattr(SharedRun, "make", lambda *_: pytest.fail("sampled"))
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    assert sweep.run(plan, tmp_path) == (12, 12, 6, 6, 0)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("renames", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2, 4, 7, 8, 17))])
def test_resuming_after_a_crash(done, plan, least, tmp_path, monkeypatch, renames):
    """The run crashes after it has renamed a given number of pictures and records. No picture is written twice."""
    count, replace = iter(range(renames)), os.replace

    def crash(source, target):
        if target.parent.name != "leases" and next(count, None) is None:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(Crash):
            sweep.run(plan, tmp_path, least)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir() if path.name[0] != "."}
    assert sweep.status(tmp_path).done <= len(written) <= renames
    assert sweep.run(plan, tmp_path, least).done == 12
    assert {path: path.stat().st_mtime_ns for path in written} == written
    same(tmp_path, done)


def test_resuming_after_ctrl_c(done, plan, least, tmp_path, monkeypatch):
    """The batch before the interrupted one is written completely."""
    make, count = SharedRun.make, iter(range(2))

    def interrupted(*args):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return make(*args)

    with monkeypatch.context() as patched:
        patched.setattr(SharedRun, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(plan, tmp_path, least)
    assert sweep.status(tmp_path).batches_done == 2
    sweep.run(plan, tmp_path, least)
    same(tmp_path, done)


@pytest.mark.slow
def test_two_runs_into_one_folder(done, plan, least, tmp_path):
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(sweep.run, plan, tmp_path, least, patience=1) for _ in range(2)]
    assert [run.result().done for run in runs] == [12, 12]
    same(tmp_path, done)


@pytest.mark.slow
def test_a_missing_picture_is_made_again(done, plan, least, tmp_path):
    sweep.run(plan, tmp_path, least)
    next((tmp_path / "pictures").iterdir()).unlink()
    assert sweep.status(tmp_path).batches_done == 5
    sweep.run(plan, tmp_path, least)
    same(tmp_path, done)


@pytest.mark.slow
def test_lack_of_memory_halves_the_rows(done, plan, least, tmp_path, monkeypatch):
    """Only the first batch of each program is tried with too many rows."""
    make, tried_rows = SharedRun.make, []

    def narrow(run, batch, *args):
        tried_rows.append(batch.rows)
        if batch.rows > 1:
            raise MemoryError("too little")
        # Use the program of the undisturbed run, so that the pictures are bit-identical.
        return make(run, batch.select([0, 0]), *args)

    with monkeypatch.context() as patched:
        patched.setattr(SharedRun, "make", narrow)
        with pytest.warns(UserWarning, match="2 rows of .* do not fit into memory"):
            sweep.run(plan, tmp_path / "narrow", least)
    assert tried_rows == [2, 1, 1, 1, 1, 1, 1] * 2
    rows, expected = ({row["name"]: row for row in records(folder)} for folder in (tmp_path / "narrow", done))
    assert {row["rows"] for row in rows.values()} == {1}
    assert {name: row["digest"] for name, row in rows.items()} == {
        name: row["digest"] for name, row in expected.items()
    }

    def none(*_, **__):
        raise MemoryError("too little")

    monkeypatch.setattr(SharedRun, "make", none)
    with (
        pytest.warns(UserWarning, match="continuing with 1"),
        pytest.raises(MemoryError, match="too little"),
    ):
        sweep.run(plan, tmp_path / "none", least)


def test_pictures_with_nan_have_no_file(least, least_folder, tmp_path):
    ablation = sweep.Sweep(
        model={"source": str(least_folder)},
        call=CALL,
        edits={"hat": {"warmup": 0, "threshold": 0}},
        grid={"seed": [0, 1], "hat.scale": [1, 3e38]},
    )
    planned = sweep.plan(ablation, sweep.Facts.of(ablation), rows=2, share=False)
    assert len(planned.batches) == 2
    with pytest.warns(RuntimeWarning) as warned:
        assert sweep.run(planned, tmp_path, least).done == 4
    (message,) = [str(one.message) for one in warned]
    assert "NaN or infinite values, which are not shown: 0001-seed=0-hat.scale=3e38, 0003-seed=1-hat.scale" in message
    assert [(row["finite"], row["file"] is None) for row in records(tmp_path)] == [(True, False), (False, True)] * 2
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert sweep.without_files(tmp_path) == {"not finite": 2, "flagged": 0}
    status = CliRunner().invoke(main, ["sweep", "status", str(tmp_path)])
    assert status.output == "4 of 4 pictures, 2 of 2 batches\n2 of them are not finite, without a file\n"


def test_webp_is_lossless_and_stores_the_settings(plan, done, least, least_folder, tmp_path):
    ablation = sweep.Sweep(model={"source": str(least_folder)}, call=CALL, edits=EDITS, grid=GRID, format="webp")
    sweep.run(sweep.plan(ablation, plan.facts, rows=2, share=False), tmp_path, least)
    for path in (tmp_path / "pictures").iterdir():
        ours, theirs = (np.asarray(Image.open(p)) for p in (path, done / "pictures" / f"{path.stem}.png"))
        np.testing.assert_array_equal(ours, theirs)
        with Image.open(path) as image:
            assert image.format == "WEBP"
        stored = stored_settings.read(done / "pictures" / f"{path.stem}.png")
        assert stored_settings.read(path) == stored
        command = CliRunner().invoke(main, ["info", str(path)]).output.splitlines()[-1]
        assert command.startswith(f"sega-jax edit --model {least_folder} --prompt")


def test_a_folder_has_one_plan(done, plan, least):
    with pytest.raises(
        ValueError, match="contains a different sweep, or this sweep with a different model, number of rows"
    ):
        sweep.run(sweep.plan(plan.sweep, plan.facts, rows=3), done, least)
    with pytest.raises(ValueError, match=r"has no plan\.json; give the folder of a sweep"):
        sweep.status(done / "pictures")
    assert Folder(done).plan() == plan


TOML = """
[call]
prompt = "a cat"
steps = 3
[edits.hat]
warmup = 1
[grid]
seed = { from = 0, count = 3 }
"""


@pytest.fixture
def shell(tmp_path, monkeypatch, least_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.toml").write_text(f"[model]\nsource = {str(least_folder)!r}\n{TOML}")
    return lambda *words: CliRunner().invoke(main, ["sweep", *map(str, words)])


def test_the_shell(shell, tmp_path, least, monkeypatch):
    planned = shell("cats.toml", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert (
        "pictures: 3 (from 3 points); batches: 1; predicted at a time: at most 3; compiled programs: 1"
        in planned.output
    )
    assert "27 UNet evaluations, the same as for making each picture separately\n" in planned.output
    assert not (tmp_path / "sega-jax-out").exists()
    monkeypatch.setattr(loading, "load", lambda *_, **__: least)
    made = shell("cats.toml", "--rows", 2)
    assert made.exit_code == 0, made.output
    assert "Made 3 pictures" in made.output
    said = shell("status", "sega-jax-out/cats")
    assert said.output == "3 of 3 pictures, 2 of 2 batches\n"
    assert "0 s left for one worker" in shell("cats.toml", "--rows", 2, "--dry-run").output
    (tmp_path / "sega-jax-out" / "cats" / "pictures" / "0001-seed=1.png").unlink()
    assert "Made 1 picture in" in shell("cats.toml", "--rows", 2).output
    for options in (["--dry-run"], []):
        refused = shell("cats.toml", "--rows", 3, *options)
        assert refused.exit_code == 1
        assert "sega-jax-out/cats contains a different sweep" in refused.output
        assert "choose a different --out, or use the original file and options" in refused.output
        assert "left for one worker" not in refused.output
    assert "3 of 3 pictures are already in sega-jax-out/cats" in shell("cats.toml", "--worker", "2/2").output


@pytest.mark.slow
def test_the_first_worker_decides_the_rows(shell, tmp_path, least, monkeypatch):
    """Another worker writes its plan while this worker is still planning."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: least)
    fitted, ablation = sweep.fitted, sweep.Sweep.read(tmp_path / "cats.toml")

    def late(*arguments, **options):
        sweep.keep(sweep.plan(ablation, sweep.Facts.of(ablation), 2), "sega-jax-out/cats")
        return fitted(*arguments, **options)

    monkeypatch.setattr(sweep, "fitted", late)
    result = shell("cats.toml")
    assert result.exit_code == 0, result.output
    assert sweep.kept("sega-jax-out/cats").rows == 2
    refused = shell("cats.toml", "--rows", 3)
    assert "contains a different sweep" in refused.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.toml"], "none.toml does not exist"),
        (["cats.toml", "--rows", 0], "--rows 0 should be at least 1"),
        (["status", "."], "has no plan.json"),
        (["cats.toml", "--worker", "3/2"], "--worker 3/2 should be the worker's number and the number of workers"),
    ],
)
def test_shell_prints_errors_without_a_traceback(shell, words, message):
    result = shell(*words)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_invalid_file_is_refused_before_the_model_is_loaded(shell, tmp_path):
    (tmp_path / "bad.toml").write_text("[model]\nsource = 'nowhere'\n[grid]\nprompt = ['a']\nstpes = [1]")
    result = shell("bad.toml")
    assert result.exit_code == 1
    assert "Error: bad.toml: grid: 'stpes' is unknown" in result.output


def test_a_sweep_that_cannot_start_leaves_no_folder(shell, tmp_path, monkeypatch):
    def lacking():
        raise ImportError("sweeps need pyarrow")

    (tmp_path / "nobody.toml").write_text(f"[model]\nsource = 'nowhere/at-all/here'\n{TOML}")
    (tmp_path / "long.toml").write_text((tmp_path / "cats.toml").read_text().replace("steps = 3", "steps = 100000"))
    with monkeypatch.context() as patched:
        patched.setattr("sega_jax.cli.sweep.arrow", lacking)
        assert "sweeps need pyarrow" in shell("cats.toml", "--out", "new/folder").output
    for file in ("nobody.toml", "long.toml", "missing.toml"):
        assert shell(file, "--out", "new/folder").exit_code == 1
    (tmp_path / "file").touch()
    assert "cannot be written to" in shell("cats.toml", "--out", "file/folder").output
    with monkeypatch.context() as patched:
        patched.setattr(store, "write_file", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is full")))
        assert "the disk is full" in shell("cats.toml", "--out", "new/folder").output
    assert not (tmp_path / "new").exists()


def test_a_sweep_whose_model_cannot_be_loaded_leaves_no_folder(shell, tmp_path, least_folder):
    shutil.copytree(least_folder, tmp_path / "broken")
    for path in (tmp_path / "broken").rglob("*.safetensors"):
        path.write_bytes(b"")
    (tmp_path / "cats.toml").write_text(f"[model]\nsource = {str(tmp_path / 'broken')!r}\n{TOML}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").touch()
    for out in ("new/folder", "old"):
        result = shell("cats.toml", "--out", out)
        assert result.exit_code == 1
        assert "is missing, truncated or not a safetensors file" in result.output
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["mine"]
    description = sweep.Sweep.read(tmp_path / "cats.toml")
    plan = sweep.plan(description, sweep.Facts.of(description))
    with pytest.raises(CheckpointError):
        sweep.run(plan, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    sweep.keep(plan, tmp_path / "new")
    with pytest.raises(CheckpointError):
        sweep.run(plan, tmp_path / "new")
    assert sweep.kept(tmp_path / "new") == plan
    with pytest.raises(CheckpointError):
        sweep.run(plan, tmp_path / "shared", worker=(1, 2), patience=0.2)
    assert sweep.kept(tmp_path / "shared") == plan


def test_a_sweep_that_fails_keeps_the_plan_of_the_same_command(plan, tmp_path, monkeypatch):
    """Another process starts the same sweep while the model is loaded."""

    def fails(*_, **__):
        assert not (tmp_path / "new").exists()
        sweep.keep(plan, tmp_path / "new")
        raise CheckpointError("broken")

    monkeypatch.setattr(loading, "load", fails)
    with pytest.raises(CheckpointError, match="broken"):
        sweep.run(plan, tmp_path / "new")
    assert sweep.kept(tmp_path / "new") == plan
    assert (tmp_path / "new" / "leases").is_dir()


def test_an_interrupted_sweep_names_the_next_commands(shell, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert "Interrupted; the same command continues the sweep\n" in shell("cats.toml").output
    assert not (tmp_path / "sega-jax-out").exists()
    # The only batch belongs to the second worker; the first would wait for it.
    shared = shell("cats.toml", "--worker", "2/2").output
    assert "continues the sweep, and sega-jax sweep status sega-jax-out/cats shows progress\n" in shared
    assert shell("status", "sega-jax-out/cats").output == "0 of 3 pictures, 0 of 1 batches\n"


def test_the_shell_checks_a_sweep_once(shell, least, monkeypatch):
    checked = []
    monkeypatch.setattr(loading, "load", lambda *_, **__: least)
    monkeypatch.setattr(sweep, "check", checked.append)
    monkeypatch.setattr(run, "check", checked.append)
    assert shell("cats.toml", "--rows", 2).exit_code == 0
    assert len(checked) == 1
    (plan,) = checked
    sweep.run(plan, "sega-jax-out/again", least)
    assert checked == [plan, plan]


def test_pictures_are_kept_after_an_error(plan, least, tmp_path, monkeypatch):
    make, calls = SharedRun.make, iter(range(2))

    def fails(*arguments):
        if next(calls, None) is None:
            raise OSError("no more")
        return make(*arguments)

    monkeypatch.setattr(SharedRun, "make", fails)
    with pytest.raises(OSError, match="no more"):
        sweep.run(plan, tmp_path / "new", least)
    assert sweep.status(tmp_path / "new").done == 4
