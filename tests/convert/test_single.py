"""Tests the conversion of single files to folders: equal weights, options, and rejected arguments."""

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
def test_a_folder_is_bit_identical_to_its_file(single, tmp_path, small, small_folder, to):
    converted = convert.convert_single(single, tmp_path / "made", config=small_folder, to=to)
    assert same(load(converted, devices=small.devices), small)
    if to == "orbax":
        return
    for path in small_folder.rglob("*"):
        written = converted / path.relative_to(small_folder)
        if path.suffix == ".safetensors":
            result, expected = load_file(written), load_file(path)
            assert result.keys() == expected.keys()
            assert all(np.array_equal(result[key], expected[key]) for key in expected)
        elif path.suffix == ".json" and path.name != "model_index.json":
            assert json.loads(written.read_text()) == json.loads(path.read_text())


def test_options(single, tmp_path, small, small_folder):
    bare = shutil.copytree(small_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    options = ["--config", bare, "--tokenizer", small_folder / "tokenizer", "--ema", "--dtype", "float16"]
    result = run(single, tmp_path / "made", *options, "--prediction-type", "v_prediction")
    assert result.exit_code == 0, result.output
    pipe = load(tmp_path / "made", devices=small.devices)
    assert pipe.scheduler.options["prediction_type"] == "v_prediction"
    name = "unet/diffusion_pytorch_model.safetensors"
    weights, last = load_file(tmp_path / "made" / name), load_file(small_folder / name)
    for key, array in last.items():
        np.testing.assert_array_equal(weights[key], (array + np.float32(0.01)).astype(np.float16))


def test_wrong_arguments_are_rejected(single, tmp_path, small_folder):
    bare = shutil.copytree(small_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    dest = tmp_path / "made"
    for error, message, arguments in [
        (CheckpointError, "attends to text of width 16", {}),
        (CheckpointError, r"does not contain CLIP's vocabulary: .*As tokenizer, give", {"config": bare}),
        (CheckpointError, r"vocab\.json and", {"config": bare, "tokenizer": tmp_path}),
        (FileNotFoundError, "is not a folder", {"config": tmp_path / "none"}),
        (ValueError, "prediction_type='x' should be one of", {"config": small_folder, "prediction_type": "x"}),
        (ValueError, "to='x' should be one of", {"to": "x"}),
        (CheckpointError, "do not fit", {"config": tiny.checkpoint(tmp_path / "other")}),
    ]:
        with pytest.raises(error, match=message):
            convert.convert_single(single, dest, **arguments)
        assert not dest.exists()
    with pytest.raises(ValueError, match="is not a single file"):
        convert.convert_single(small_folder, dest)
    with pytest.raises(FileNotFoundError, match="is a single file, not a folder; use convert_single"):
        convert.convert(single, dest)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt is not a file"):
        convert.convert_single(tmp_path / "none.ckpt", dest)
    for options, message in [
        (["--tokenizer", "x"], "--tokenizer applies only to single files"),
        (["--prediction-type", "epsilon"], "--prediction-type applies only to single files"),
    ]:
        result = run(small_folder, dest, *options)
        assert result.exit_code == 1
        assert message in result.output
    assert "--byt5 applies only to Paella's published files" in run(single, dest, "--byt5", "x").output
    assert "because single files have no variants" in run(single, dest, "--variant", "fp16").output
