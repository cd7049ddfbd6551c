"""Odd files, numbers and texts cause one-line errors instead of tracebacks."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from sega_jax import Edit, sweep
from sega_jax.cli.main import main
from sega_jax.pipelines import png

KNOWN = {"picture": "original", "model": None, "prompt": "a", "seed": 1, "steps": 2, "edits": [], "device": "cpu"}
KNOWN |= {"system": "stable_diffusion", "revision": None}


def shell(*words):
    result = CliRunner().invoke(main, list(map(str, words)))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    "change",
    [
        {"steps": float("inf")},
        {"steps": "two"},
        {"edits": 5},
        {"edits": [{"concept": "a", "scale": float("inf")}]},
        {"edits": [{"concept": 5}]},
        {"prompt": 5},
        {"prompt": None},
        {"model": 5},
        {"system": [1]},
        {"lora": 5},
    ],
    ids=str,
)
def test_odd_metadata(tmp_path, change):
    png.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", KNOWN | change)
    assert "a.png has settings that this version of sega-jax cannot read" in shell("info", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe[call]", "is not UTF-8 text"),
        (b"a = " + b"1" * 5000, "has a number with too many digits"),
        (b"\xef\xbb\xbf[grid]\nseed = [1]\nsteps = [1e39]", "steps"),
        (b"a = " + b"[" * 3000 + b"]" * 3000, "too many nested brackets"),
        (b"[grid]\nseed = { from = 0, count = 1" + b"0" * 30 + b" }", "should be from 0 to 2147483648"),
        (b"[grid]\nseed = [1]\nguidance_scale = [1e39]", "beyond the range of float32"),
        (b"[sample]\ncount = 9" + b"0" * 18 + b"\nguidance_scale = { low = 1.0, high = 2.0 }", "split it into several"),
    ],
    ids=["invalid UTF-8", "digits", "BOM", "brackets", "count", "float32", "points"],
)
def test_odd_sweep_files(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("odd.toml").write_bytes(content if b"[call]" in content else content + b'\n[call]\nprompt = "a"\n')
    assert message in shell("sweep", "odd.toml", "--dry-run")


def test_folders_and_files_in_each_others_place(tmp_path):
    (tmp_path / "file").write_text("text")
    for words in (["info", tmp_path], ["sweep", tmp_path], ["sweep", "status", tmp_path / "file"]):
        shell(*words)
    shell("edit", "--prompt", "a", "--out", tmp_path / "file")
    shell("edit", "--prompt", "a", "--image", tmp_path)
    shell("edit", "--prompt", "a", "--model", tmp_path / "file")
    with pytest.raises(ValueError, match=r"has no plan\.json"):
        sweep.status(tmp_path / "file")


@pytest.mark.parametrize("call", [{"prompt": "a\ud800b"}, {"prompt": "a", "edits": [Edit("\udfff")]}])
def test_texts_that_are_not_unicode(pipe, call):
    with pytest.raises(ValueError, match="is not valid Unicode; remove its surrogate characters"):
        pipe.prepare(**call)
