"""Stable Diffusion's files in the shell: single files, LoRAs, textual inversions, and commands that reproduce
pictures."""

import shlex
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from support import tiny

from sega_jax import Edit, load
from sega_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("one_by_default")
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes a checkpoint both as a folder and as a single file, its configs, two LoRAs, and two textual inversions."""
    where, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    tiny.checkpoint(where / "folder", unet=tiny.UNET_1, vae=tiny.VAE_1)
    save_file(tiny.original(unet=tiny.UNET_1, vae=tiny.VAE_1, ema=True), where / "model.safetensors")
    shutil.copytree(where / "folder", where / "bare", ignore=lambda *_: ["tokenizer"])
    for name in "ab":
        down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
        save_file({f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up}, where / f"{name}.safetensors")
    save_file({"<toy>": rng.standard_normal((2, 16)).astype(np.float32)}, where / "toy.safetensors")
    save_file({"emb_params": rng.standard_normal((1, 16)).astype(np.float32)}, where / "a=b.safetensors")
    return where


def edit(*words):
    return CliRunner().invoke(main, ["edit", *map(str, words)])


def pictures(folder):
    return [np.asarray(Image.open(folder / f"0001-{name}.png")) for name in ("original", "edited")]


def check(words, tmp_path, monkeypatch, prompt="a cat", **loading):
    """Checks that the command makes the same pictures as a Python call, and that the command from `info` reproduces
    them."""
    settings = ["--prompt", prompt, "--edit", "hat:warmup=0", "--steps", 2]
    result = edit(*words, *settings, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    expected = load(**loading)([prompt] * 2, [[], [Edit("hat", warmup=0)]], steps=2, seed=[0, 0], output="uint8").images
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "out" / "0001-edited.png")])
    assert shown.exit_code == 0, shown.output
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(main, [*shlex.split(shown.output.splitlines()[-1])[1:], "--out", "again"])
    assert again.exit_code == 0, again.output
    for folder in ("out", "again"):
        assert np.array_equal(pictures(tmp_path / folder), expected)
    return expected


@pytest.mark.slow
def test_a_single_file(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    source = files / "model.safetensors"
    check(["--model", "model.safetensors", "--config", "folder"], tmp_path, monkeypatch, source=source, config="folder")


@pytest.mark.slow
def test_a_single_file_with_a_separate_tokenizer(files, tmp_path, monkeypatch):
    vocabulary = {"config": files / "bare", "tokenizer": files / "folder" / "tokenizer", "prediction_type": "epsilon"}
    words = [part for name, value in vocabulary.items() for part in (f"--{name.replace('_', '-')}", value)]
    source = files / "model.safetensors"
    check(["--model", source, "--ema", *words], tmp_path, monkeypatch, source=source, ema=True, **vocabulary)


@pytest.mark.slow
def test_loras(files, tmp_path, monkeypatch):
    """Covers a LoRA given as a relative path with a scale, and a LoRA given as a folder."""
    monkeypatch.chdir(files)
    style = files / "style"
    style.mkdir()
    shutil.copy(files / "b.safetensors", style)
    words = ["--model", files / "folder", "--lora", "a.safetensors:-0.5", "--lora", style]
    loras = {files / "a.safetensors": -0.5, style / "b.safetensors": 1.0}
    pictures_with = check(words, tmp_path, monkeypatch, source=files / "folder", lora=loras)
    call = {"steps": 2, "seed": [0, 0], "output": "uint8"}
    plain = load(files / "folder")(["a cat"] * 2, [[], [Edit("hat", warmup=0)]], **call).images
    assert not np.array_equal(pictures_with, plain)


@pytest.mark.parametrize(
    ("given", "prompt", "named"),
    [
        (["toy.safetensors"], "<toy>", "toy.safetensors"),
        pytest.param(
            ["<cat>=toy.safetensors", "<dog>=a=b.safetensors"],
            "<cat> <dog>",
            ["<cat>", "<dog>"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_textual_inversions(files, tmp_path, monkeypatch, given, prompt, named):
    monkeypatch.chdir(files)
    words = [part for one in given for part in ("--textual-inversion", one)]
    paths = [files / "toy.safetensors", files / "a=b.safetensors"]
    known = files / named if isinstance(named, str) else dict(zip(named, paths, strict=True))
    words = ["--model", files / "folder", *words]
    check(words, tmp_path, monkeypatch, prompt, source=files / "folder", textual_inversion=known)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--tokenizer", "nowhere"], "--tokenizer nowhere is not a folder"),
        (["--config", "folder"], "applies only to single files"),
        (["--prediction-type", "x"], "'x' is not one of 'epsilon', 'v_prediction'"),
        (["--ema"], "--ema applies only to single files"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors is not a file"),
        (["--lora", "a.safetensors:nan"], "'nan' should be a finite number like 0.8"),
        (["--lora", "a.safetensors:x"], "'x' should be a finite number like 0.8"),
        (["--lora", "a.safetensors:2", "--lora", "./a.safetensors"], "is given twice"),
        (["--lora", "toy.safetensors"], "toy.safetensors"),
        (["--textual-inversion", "<x>=nowhere.bin"], "nowhere.bin is not a file"),
        (["--textual-inversion", "a=b.safetensors"], "does not store its word"),
        (
            ["--textual-inversion", "toy.safetensors", "--textual-inversion", "<x>=a=b.safetensors"],
            "needs a word, as in",
        ),
        (
            ["--textual-inversion", "<x>=toy.safetensors", "--textual-inversion", "<x>=a=b.safetensors"],
            "<x> is given twice",
        ),
        (["--textual-inversion", "a toy=toy.safetensors"], "the new word 'a toy' should have no spaces"),
    ],
)
def test_unsuitable_files_are_refused(files, tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(files)
    settings = ["--model", files / "folder", "--prompt", "a cat", "--edit", "hat", "--out", tmp_path / "out"]
    result = edit(*settings, *given)
    assert isinstance(result.exception, SystemExit)  # not a traceback
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lora", "a.safetensors"], "a.safetensors does not fit this checkpoint's text_encoder and unet"),
        (["--textual-inversion", "toy.safetensors"], "DeepFloyd-IF's first stage does not support textual inversion"),
        (["--tokenizer", "folder/tokenizer"], "--tokenizer is not supported for cascades"),
        (["--config", "folder"], "--config folder applies only to single files"),
        (["--ema"], "--ema is not supported for cascades"),
    ],
)
def test_files_for_other_families_are_refused(stages, files, tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(files)
    settings = ["--prompt", "a cat", "--edit", "hat", "--out", tmp_path]
    result = edit("--model", stages["stage1"], *settings, *given)
    assert result.exit_code == 1
    assert words in result.output
