"""Checks that pickled single-file checkpoints give the same weights as safetensors and never run code."""

import pytest

pytest.importorskip("torch")

import torch
from safetensors.numpy import load_file
from support import tiny

import convert
from parity.hostile import Hostile
from sega_jax import CheckpointError

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def tensors():
    return {key: torch.tensor(array) for key, array in tiny.original(unet=tiny.UNET_1).items()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_gives_the_same_weights(tmp_path, tensors, small_folder, wrapped, zipped):
    content = {"state_dict": tensors, "global_step": 3, "epoch": 1, "lr_schedulers": []} if wrapped else tensors
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    converted = convert.convert_single(tmp_path / "model.ckpt", tmp_path / "made", config=small_folder)
    for path in small_folder.rglob("*.safetensors"):
        ours, source = load_file(converted / path.relative_to(small_folder)), load_file(path)
        assert {key: array.tobytes() for key, array in ours.items()} == {k: a.tobytes() for k, a in source.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_is_not_run(tmp_path, tensors, small_folder, wrapped):
    hostile = tensors | {"model.x": Hostile(tmp_path / "canary")}
    torch.save({"state_dict": hostile} if wrapped else hostile, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"was rejected, and none of its code was run: .*system"):
        convert.convert_single(tmp_path / "model.ckpt", tmp_path / "made", config=small_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt"]


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {"state_dict": {}}, [], {"a": {"b": 1}}, 3])
def test_pickles_of_other_content_are_refused(tmp_path, small_folder, content):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        convert.convert_single(tmp_path / "model.ckpt", tmp_path / "made", config=small_folder)
