"""The option --json of `edit`, `info` and `sweep status`: one strictly valid JSON document on standard output."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from support.sweeping import hat_plan

from sega_jax import sweep
from sega_jax.cli.main import main
from sega_jax.cli.terminal import as_json
from sega_jax.pipelines import png, stored_settings

pytestmark = pytest.mark.usefixtures("one_by_default")
ODD = "a caf\u00e9, \u732b \U0001f3a9 \u202e\x1b[31m \x7f\t"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def refuse(constant):
    pytest.fail(f"{constant} is not JSON")


def document(result):
    return json.loads(result.stdout, parse_constant=refuse)


def test_documents_are_strict_and_printable():
    value = {"a": [float("nan"), -float("inf"), 1.5, 2**70], "b": (ODD, "\udcff", None, True), "c": {"d": float("inf")}}
    text = as_json(value)
    assert all(character == "\n" or 32 <= ord(character) < 127 for character in text)
    read = json.loads(text, parse_constant=refuse)
    assert read == {"a": [None, None, 1.5, 2**70], "b": [ODD, "\udcff", None, True], "c": {"d": None}}


def edit(folder, out, *words):
    call = ["--model", folder, "--prompt", ODD, "--steps", 2, "--seed", "7,3", "--out", out]
    return run("edit", *call, *words, "--json")


def test_edit_prints_its_pictures_and_settings(least_folder, tmp_path):
    result = edit(least_folder, tmp_path / "out", "--edit", "hat:warmup=0")
    assert result.exit_code == 0, result.output
    printed = document(result)
    assert list(printed) == ["pictures", "sheet", "settings", "compile_seconds", "run_seconds"]
    assert [(one["seed"], one["kind"]) for one in printed["pictures"]] == [
        (seed, kind) for seed in (7, 3) for kind in ("original", "edited")
    ]
    for one in printed["pictures"]:
        assert list(one) == ["file", "seed", "kind", "flagged", "finite"]
        assert (one["flagged"], one["finite"]) == (None, True)
        stored = stored_settings.read(Path(one["file"]))
        assert {**printed["settings"], "picture": one["kind"], "seed": one["seed"]} == stored
    assert {**printed["settings"], "picture": "sheet"} == stored_settings.read(Path(printed["sheet"]))
    assert printed["settings"]["prompt"] == ODD
    assert printed["compile_seconds"] > 0
    assert printed["run_seconds"] > 0
    assert "Loaded" in result.stderr
    assert "Wrote" in result.stderr


def test_edit_lists_pictures_that_are_not_finite(least_folder, tmp_path):
    result = edit(least_folder, tmp_path, "--edit", "hat:scale=3e38,warmup=0")
    assert result.exit_code == 1
    pictures = document(result)["pictures"]
    assert [(one["file"] is None, one["finite"]) for one in pictures] == [(False, True), (True, False)] * 2
    assert "Error: pictures with NaN or infinity were not written: seed 7 edited, seed 3 edited;" in result.stderr


def test_errors_leave_standard_output_empty(tmp_path):
    for words in (
        ["edit", "--prompt", "a cat", "--model", "nowhere"],
        ["info", "nowhere"],
        ["sweep", "status", "nowhere"],
    ):
        result = run(*words, "--json")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "Error: " in result.stderr


def test_info_prints_the_stored_settings_and_the_command(tmp_path):
    path = tmp_path / "a.png"
    edits = [{"concept": "glasses", "scale": 4.0, "threshold": 0.9, "warmup": 8, "cooldown": None, "weight": 1.0}]
    known = {"picture": "edited", "model": None, "revision": None, "prompt": ODD, "edits": edits, "seed": [1, 2]}
    known |= {"steps": 20, "momentum_scale": 0.3, "note": float("inf")}
    png.save(Image.new("RGB", (8, 8)), path, known)
    printed = document(run("info", path, "--json"))
    assert list(printed) == ["settings", "command"]
    assert printed["settings"] == known | {"note": None}
    assert printed["command"][:4] == ["sega-jax", "edit", "--prompt", ODD]
    assert printed["command"][printed["command"].index("--seed") + 1] == "1,2"
    png.save(Image.new("RGB", (8, 8)), tmp_path / "b.png", known | {"prompt": "a 'cat'"})
    plain = run("info", tmp_path / "b.png").stdout.splitlines()[-1]
    assert shlex.split(plain) == document(run("info", tmp_path / "b.png", "--json"))["command"]


def test_status_prints_progress_and_problems(least_folder, tmp_path):
    plan = hat_plan(least_folder, 3, [1.0, 2.0])
    sweep.keep(plan, tmp_path)
    printed = document(run("sweep", "status", tmp_path, "--json"))
    expected = sweep.status(tmp_path)._asdict() | {"seconds_left": None, "stages": {}}
    expected |= {"without_files": {"not_finite": 0, "flagged": 0}, "problems": []}
    assert printed == expected
    assert list(printed) == list(expected)
    assert (printed["pictures"], printed["done"], printed["batches_done"]) == (6, 0, 0)
    assert printed["evaluations_left"] == plan.counts.evaluations
    (tmp_path / "pictures").mkdir(exist_ok=True)
    (tmp_path / "pictures" / "other\x1b.png").touch()
    result = run("sweep", "status", tmp_path, "--json")
    assert document(result)["problems"] == [{"file": "pictures/other\x1b.png", "problem": "is not part of this sweep"}]
    assert "problems: 1" in result.stderr
