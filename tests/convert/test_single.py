"""Single files to folders: what is written loads as the file does, and what is refused leaves nothing."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny
from support.checkpoints import same
from support.conversion import run

import convert
from sega_jax import CheckpointError, load


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(tiny.original(unet=tiny.UNET_1, ema=True), path)
    return path


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
def test_the_folder_is_the_file_to_the_bit(single, tmp_path, small, small_folder, to):
    made = convert.convert_single(single, tmp_path / "made", config=small_folder, to=to)
    assert same(load(made, devices=small.devices), small)
    if to == "orbax":
        return
    for path in small_folder.rglob("*"):
        made_of = made / path.relative_to(small_folder)
        if path.suffix == ".safetensors":
            ours, wanted = load_file(made_of), load_file(path)
            assert ours.keys() == wanted.keys()
            assert all(np.array_equal(ours[key], wanted[key]) for key in wanted)
        elif path.suffix == ".json" and path.name != "model_index.json":
            assert json.loads(made_of.read_text()) == json.loads(path.read_text())


def test_options(single, tmp_path, small, small_folder):
    bare = shutil.copytree(small_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    options = ["--config", bare, "--tokenizer", small_folder / "tokenizer", "--ema", "--dtype", "float16"]
    result = run(single, tmp_path / "made", *options, "--prediction-type", "v_prediction")
    assert result.exit_code == 0, result.output
    found = load(tmp_path / "made", devices=small.devices)
    assert found.scheduler.options["prediction_type"] == "v_prediction"
    out = "unet/diffusion_pytorch_model.safetensors"
    ours, wanted = load_file(tmp_path / "made" / out), load_file(small_folder / out)
    for key, array in wanted.items():
        np.testing.assert_array_equal(ours[key], (array + np.float32(0.01)).astype(np.float16))


def test_what_is_refused(single, tmp_path, small_folder):
    bare = shutil.copytree(small_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    dest = tmp_path / "made"
    for error, words, arguments in [
        (CheckpointError, "attends to text of width 16", {}),
        (CheckpointError, r"does not contain CLIP's vocabulary: .*Give tokenizer", {"config": bare}),
        (CheckpointError, r"vocab\.json and", {"config": bare, "tokenizer": tmp_path}),
        (FileNotFoundError, "is not a folder", {"config": tmp_path / "none"}),
        (ValueError, "prediction_type='x' should be one of", {"config": small_folder, "prediction_type": "x"}),
        (ValueError, "to='x' should be one of", {"to": "x"}),
        (CheckpointError, "do not fit", {"config": tiny.checkpoint(tmp_path / "other")}),
    ]:
        with pytest.raises(error, match=words):
            convert.convert_single(single, dest, **arguments)
        assert not dest.exists()
    with pytest.raises(ValueError, match="is no single file"):
        convert.convert_single(small_folder, dest)
    with pytest.raises(FileNotFoundError, match="is no folder, but a single file, which is for convert_single"):
        convert.convert(single, dest)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt is not a file"):
        convert.convert_single(tmp_path / "none.ckpt", dest)
    for options, words in [
        (["--tokenizer", "x"], "--tokenizer goes with single files"),
        (["--prediction-type", "epsilon"], "--prediction-type goes with single files"),
    ]:
        result = run(small_folder, dest, *options)
        assert result.exit_code == 1
        assert words in result.output
    assert "--byt5 goes with Paella's published files" in run(single, dest, "--byt5", "x").output
    assert "'fp16' is not for single files" in run(single, dest, "--variant", "fp16").output
