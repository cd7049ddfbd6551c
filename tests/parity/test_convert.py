"""Converts torch's pickles, which must never run code, and loads converted files with torch's loaders."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import collections
import os
import pickle
import random
import shutil
from collections import OrderedDict

import diffusers
import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from support import tiny

import convert
from parity.hostile import Hostile
from sega_jax import CheckpointError
from sega_jax.weights.torch_pickle import PickledTensors, opened

pytestmark = pytest.mark.parity

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def pickled(source, folder, *, legacy=False, sharded=False, variant=None):
    """Returns a copy of a checkpoint whose weights are .bin files."""
    shutil.copytree(source, folder)
    for part, stem in STEMS.items():
        (weights,) = (folder / part).glob("*.safetensors")
        tensors = load_torch(weights)
        weights.unlink()
        stem = stem.replace("model", "pytorch_model") if part == "text_encoder" else stem
        dot = f".{variant}" if variant else ""
        names = [f"{stem}{dot}.bin"]
        if sharded:
            names = [f"{stem}-0000{i}-of-00002{dot}.bin" for i in (1, 2)]
            places = {key: names[i % 2] for i, key in enumerate(tensors)}
            tiny.write_json(folder / part / f"{stem}.bin.index{dot}.json", {"weight_map": places})
        for i, name in enumerate(names):
            shard = OrderedDict((key, t) for j, (key, t) in enumerate(tensors.items()) if j % len(names) == i)
            torch.save(shard, folder / part / name, _use_new_zipfile_serialization=not legacy)
    return folder


def same(folder, source):
    for part, stem in STEMS.items():
        ours, theirs = (load_file(f / part / f"{stem}.safetensors") for f in (folder, source))
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            assert ours[key].dtype == array.dtype
            assert ours[key].tobytes() == array.tobytes()
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"sharded": True}, {"variant": "fp16"}], ids=str)
def test_pickles(tmp_path, dtype, options):
    source = tiny.checkpoint(tmp_path / "source", dtype=DTYPES[dtype], unet=tiny.UNET_1, prefix="text_model.")
    folder = pickled(source, tmp_path / "pickled", **options)
    variant = options.get("variant")
    convert.convert(folder, tmp_path / "orbax", variant=variant)
    convert.convert(folder, tmp_path / "direct", variant=variant, to="diffusers")
    convert.convert(tmp_path / "orbax", tmp_path / "back", to="diffusers")
    assert same(tmp_path / "direct", source)
    assert same(tmp_path / "back", source)


def test_safetensors_come_first(tmp_path):
    source = tiny.checkpoint(tmp_path / "source", unet=tiny.UNET_1)
    (source / "unet/diffusion_pytorch_model.bin").write_bytes(b"never read")
    convert.convert(source, tmp_path / "orbax")


def write(path, content, form):
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.fixture
def unet(tmp_path):
    source = tiny.checkpoint(tmp_path / "source", unet=tiny.UNET_1)
    (source / "unet/diffusion_pytorch_model.safetensors").unlink()
    return source / "unet/diffusion_pytorch_model.bin"


@pytest.mark.parametrize("form", ["zip", "legacy", "raw pickle"])
@pytest.mark.parametrize("call", [os.system, open, eval], ids=["os.system", "open", "eval"])
@pytest.mark.parametrize("place", ["value", "key's place", "everything"])
def test_hostile_pickles_are_refused(unet, tmp_path, form, call, place):
    canary = tmp_path / "canary"
    hostile = Hostile(canary, call)
    content = {"value": {"conv_in.weight": hostile}, "key's place": [hostile, {}], "everything": hostile}[place]
    write(unet, content, form)
    with pytest.raises(CheckpointError, match="was rejected, and none of its code was run"):
        convert.convert(unet.parents[1], tmp_path / "dest")
    assert not canary.exists()
    assert not (tmp_path / "dest").exists()


@pytest.mark.filterwarnings("ignore")
def test_torch_runs_the_hostile_pickle(unet, tmp_path):
    write(unet, {"conv_in.weight": Hostile(tmp_path / "canary")}, "zip")
    torch.load(unet, weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "contains a list, expected a dictionary of tensors"),
        ({"state_dict": {"x": torch.zeros(1)}}, "'state_dict' is not the name of a dense tensor"),
        ({3: torch.zeros(1)}, "3 is not the name of a dense tensor"),
        ({"x": torch.zeros(1).expand(10**12)}, "its tensors exceed the file's"),
        ({"x": torch._neg_view(torch.ones(2))}, "'x' is not the name of a dense tensor"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "'x' is not the name of a dense tensor"),
        ({"x": torch.zeros(2, device="meta")}, "'x' is not the name of a dense tensor"),
        ({"x": torch.zeros(2)}, "unexpected x (2,)"),
    ],
)
def test_pickles_of_other_content_are_refused(unet, tmp_path, content, words):
    torch.save(content, unet)
    with pytest.raises(CheckpointError) as caught:
        convert.convert(unet.parents[1], tmp_path / "dest")
    assert words in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99])
def test_truncated_pickles_are_refused(tmp_path, legacy, part):
    source = tiny.checkpoint(tmp_path / "source", unet=tiny.UNET_1)
    folder = pickled(source, tmp_path / "pickled", legacy=legacy)
    path = folder / "unet/diffusion_pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin is (truncated|refused|missing or empty)"):
        convert.convert(folder, tmp_path / "dest")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_pickles_load_or_are_refused(tmp_path, legacy):
    folder = pickled(tiny.checkpoint(tmp_path / "source", unet=tiny.UNET_1), tmp_path / "pickled", legacy=legacy)
    path, rng, good = folder / "vae/diffusion_pytorch_model.bin", random.Random(0), 0
    original = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged) // (1 if rng.random() < 0.5 else 10))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors = PickledTensors(folder / "vae", "diffusion_pytorch_model", None, str)
            good += all(tensors[name].shape == shape for name, shape in tensors.shapes.items())
        except CheckpointError:
            continue
    assert 0 < good < 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_converted_files(tmp_path, dtype):
    source = tiny.checkpoint(tmp_path / "source")
    convert.convert(source, tmp_path / "orbax", dtype=str(dtype).removeprefix("torch."))
    folder = convert.convert(tmp_path / "orbax", tmp_path / "diffusers", to="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None)
    assert isinstance(pipe.text_encoder, transformers.CLIPTextModel)
    for part, stem in STEMS.items():
        expected = load_torch(source / part / f"{stem}.safetensors")
        loaded = getattr(pipe, part).state_dict()
        for key, tensor in expected.items():
            name = key if key in loaded else f"text_model.{key}"
            assert loaded[name].dtype == dtype
            assert torch.equal(loaded[name], tensor.to(dtype))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_pickles_of_8_bit_floats(tmp_path, dtype, legacy):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    transposed = every.reshape(4, 64).T
    torch.save({"x": every, "y": transposed}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with opened(tmp_path / "a.pt") as tensors:
        np.testing.assert_array_equal(tensors["x"].astype(np.float32), every.float().numpy())
        np.testing.assert_array_equal(tensors["y"].astype(np.float32), transposed.float().numpy())


def test_safetensors_of_8_bit_floats(tmp_path):
    every = torch.arange(256, dtype=torch.uint8)
    written = {"x": every.view(torch.float8_e4m3fn), "y": every.view(torch.float8_e5m2).reshape(16, 16)}
    save_torch({name: tensor.clone() for name, tensor in written.items()}, tmp_path / "a.safetensors")
    with opened(tmp_path / "a.safetensors") as tensors:
        for name, tensor in written.items():
            np.testing.assert_array_equal(tensors[name].astype(np.float32), tensor.float().numpy())


def test_pickles_of_unusual_tensors_and_training_states(tmp_path):
    """The files contain buffers, tensors with attributes, expanded tensors, and the states of learning-rate
    schedulers."""
    named = torch.ones(3)
    named.note = "a"
    content = {"buffer": torch.nn.Buffer(torch.arange(4.0)), "named": named, "repeated": torch.ones(1).expand(8)}
    state = {"milestones": collections.Counter([3, 3, 5]), "seen": {1, 2}, "bytes": bytearray(b"x")}
    torch.save({"step": torch.tensor(5), "state_dict": content, "state": state}, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as tensors:
        assert tensors.shapes.keys() == content.keys()
        for name, tensor in content.items():
            np.testing.assert_array_equal(tensors[name], tensor.numpy())
