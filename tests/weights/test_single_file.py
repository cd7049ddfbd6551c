"""Tests single-file Stable Diffusion checkpoints: names at full size, loading, and files that are rejected."""

import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from support import published, tiny
from support.checkpoints import same
from support.recorded import REFERENCE
from support.single_files import KINDS, shapes

from sega_jax import CheckpointError, Edit, load
from sega_jax.cli.main import main
from sega_jax.pipelines.loading import describe
from sega_jax.systems import original_files
from sega_jax.systems.registry import recognise
from sega_jax.systems.stable_diffusion import SYSTEM, Models
from sega_jax.weights.layout import leaves


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def write(tensors, name="model.safetensors"):
        path = tmp_path_factory.mktemp("single") / name
        save_file(tensors, path)
        return path

    return write


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory, write):
    """Returns a folder in diffusers layout, and the tensors of a single file with the same weights."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("folder") / "tiny", **KINDS[request.param])
    return folder, tiny.original(**KINDS[request.param], openclip=request.param == "2", ema=True)


@pytest.fixture(scope="module")
def simple():
    """Returns the tensors of a single file whose UNet has one level."""
    return tiny.original(unet=tiny.UNET_1)


# Loading


def test_a_file_loads_bit_identically_to_a_folder(both, write, one_device):
    folder, tensors = both
    expected = load(folder, devices=one_device)
    assert same(load(write(tensors), config=folder, devices=one_device), expected)


@pytest.mark.slow
def test_a_file_makes_the_same_picture_as_a_folder(simple, write, small, small_folder):
    call = {"prompt": "a cat", "edits": [Edit("hat", warmup=1)], "steps": 3, "output": "float"}
    result = load(write(simple), config=small_folder, devices=small.devices)(**call)
    np.testing.assert_array_equal(result.images, small(**call).images)


def test_the_moving_average(both, write, one_device):
    folder, tensors = both
    last = load(write(tensors), config=folder, devices=one_device).models
    averages = load(write(tensors), config=folder, devices=one_device, ema=True).models
    for a, b in zip(jax.tree.leaves(last.unet), jax.tree.leaves(averages.unet), strict=True):
        np.testing.assert_array_equal(np.asarray(a) + np.float32(0.01), b)
    for part in ("vae", "text_encoder"):
        pairs = zip(jax.tree.leaves(getattr(last, part)), jax.tree.leaves(getattr(averages, part)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


NAMES = {
    "linear": {},
    "to_q": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    "query": {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
}


@pytest.mark.parametrize("names", NAMES)
def test_other_names_in_the_autoencoder(simple, write, small, small_folder, names):
    """The attention is stored as linear layers instead of convolutions, under the names that several versions use."""
    result = {}
    for key, array in simple.items():
        if ".attn_1." in key:
            array = array.reshape(array.shape[:2])
            for old, new in NAMES[names].items():
                key = key.replace(f".attn_1.{old}.", f".attn_1.{new}.")
        result[key.replace("first_stage_model.", "vae.") if names == "query" else key] = array
    assert same(load(write(result), config=small_folder, devices=small.devices), small)


def test_a_text_encoder_without_its_prefix(simple, write, small, small_folder):
    result = {key.replace("transformer.text_model.", "transformer."): array for key, array in simple.items()}
    assert same(load(write(result), config=small_folder, devices=small.devices), small)


def test_tensors_of_other_networks_are_ignored(simple, write, small, small_folder):
    others = ["first_stage_model.loss.logvar", "control_model.x", "cond_stage_model.logit_scale", "global_step"]
    result = simple | {key: np.zeros(2, np.float32) for key in others}
    assert same(load(write(result), config=small_folder, devices=small.devices), small)


def test_networks_of_other_pipelines(simple, write, small, small_folder):
    """Other pipelines can supply the networks that the file lacks."""
    path = write({key: array for key, array in simple.items() if key.startswith(original_files.UNET)})
    with pytest.raises(
        CheckpointError,
        match=r"has no text_encoder \(.*; give a file, .* as text_encoder, or another",
    ):
        load(path, config=small_folder, devices=small.devices)
    others = {"text_encoder": small.models.text_encoder, "vae": small.models.vae}
    assert same(load(path, config=small_folder, devices=small.devices, **others), small)


def test_the_folder_of_a_tokenizer(simple, write, small, small_folder, tmp_path):
    """The tokenizer's folder is needed if the config's folder has no tokenizer."""
    bare = shutil.copytree(small_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    with pytest.raises(CheckpointError, match=r"does not contain CLIP's vocabulary: .*As tokenizer, give"):
        load(write(simple), config=bare, devices=small.devices)
    result = load(write(simple), config=bare, tokenizer=str(small_folder / "tokenizer"), devices=small.devices)
    np.testing.assert_array_equal(result.tokenizer(["a b"]), small.tokenizer(["a b"]))
    assert same(load(write(simple), config=bare, tokenizer=small.tokenizer, devices=small.devices), small)
    with pytest.raises(CheckpointError, match=r"vocab\.json and .*merges\.txt missing"):
        load(write(simple), config=bare, tokenizer=tmp_path, devices=small.devices)


def test_the_prediction_type(simple, write, small, small_folder):
    result = load(write(simple), config=small_folder, prediction_type="v_prediction", devices=small.devices)
    assert result.scheduler.options["prediction_type"] == "v_prediction"
    assert result.scheduler.config == small.scheduler.config | {"prediction_type": "v_prediction"}
    result = load(
        small_folder, prediction_type="v_prediction", scheduler="EulerDiscreteScheduler", devices=small.devices
    )
    assert (result.scheduler.name, result.scheduler.options["prediction_type"]) == (
        "EulerDiscreteScheduler",
        "v_prediction",
    )


# Published checkpoints


@pytest.mark.parametrize(
    ("name", "count", "parameters"),
    [("sd_1", 1130, 1_066_235_307), ("sd_2", 1214, 1_289_952_427), ("sdxl", 2513, 3_468_837_867)],
)
def test_names_at_full_size(name, count, parameters):
    """The names are from Stable Diffusion 1.5, 2.1 and XL base, without the tensors that this library does not use."""
    config = {"sd_1": published.SD_1, "sd_2": published.SD_2, "sdxl": published.XL}[name]
    result = shapes(config, name == "sd_2")
    lines = (REFERENCE / f"{name}_file.txt").read_text().splitlines()
    expected = {key: tuple(map(int, shape)) for key, *shape in map(str.split, lines)}
    assert result == expected
    assert (len(result), sum(map(math.prod, result.values()))) == (count, parameters)


@pytest.mark.parametrize(
    ("width", "asked", "name", "predicts", "solver"),
    [
        (768, None, "sd-1.5", "epsilon", "PNDMScheduler"),
        (768, "v_prediction", "sd-1.5", "epsilon", "PNDMScheduler"),
        (1024, None, "sd-2.1", "v_prediction", "DDIMScheduler"),
        (1024, "v_prediction", "sd-2.1", "v_prediction", "DDIMScheduler"),
        (1024, "epsilon", "sd-2.1-base", "epsilon", "PNDMScheduler"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_configs_as_published(small, width, asked, name, predicts, solver):
    key = f"{original_files.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    folder = original_files.STABLE_DIFFUSION_FILE.published(Path("x"), {key: (320, width)}, asked)
    assert folder.name == name
    assert recognise(folder) is SYSTEM
    result = describe(folder, tokenizer=small.tokenizer)
    assert type(result.models) is Models
    assert (result.scheduler.name, result.scheduler.options["prediction_type"]) == (solver, predicts)
    expected = Models.build(**(published.SD_1 if width == 768 else published.SD_2))
    assert [leaves(network) for network in result.models] == [leaves(net) for net in expected]
    size = 64 if name == "sd-2.1-base" else expected.unet.config.sample_size
    assert result.models.unet.config == expected.unet.config._replace(sample_size=size)


# Rejected files


def without(start):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(start)]


def misshapen(tensors):
    tensors[f"{original_files.UNET}out.2.bias"] = np.zeros(3, np.float32)


XL = f"{original_files.UNET}label_emb.0.0.weight"
UNET_IN = f"{original_files.UNET}input_blocks.0.0.weight"
BROKEN = {
    "no UNet": (without("model."), "is not a single-file checkpoint of Stable Diffusion 1.x or 2.x"),
    "a LoRA": (
        lambda t: (t.clear(), t.update({"lora_unet_x.alpha": np.ones(1)})),
        "it is a LoRA; load a checkpoint and pass the LoRA as lora=",
    ),
    "one network": (
        lambda t: (t.clear(), t.update({"down_blocks.x": np.ones(1)})),
        "it is one network in diffusers' layout; give the folder",
    ),
    "nothing": (lambda t: t.clear(), "it contains nothing"),
    "XL": (
        lambda t: t.update({XL: np.ones(1)}),
        "is Stable Diffusion 1.x or 2.x, expected Stable Diffusion XL, the family of",
    ),
    "the refiner": (
        lambda t: t.update({"conditioner.embedders.0.model.x": np.ones(1)}),
        "is the Stable Diffusion XL refiner",
    ),
    "EDM": (lambda t: t.update({"edm_mean": np.ones(4)}), "with EDM preconditioning, which is not supported"),
    "inpainting": (
        lambda t: t.update({UNET_IN: np.ones((8, 9, 3, 3))}),
        "has 9 input channels, expected 4: inpainting",
    ),
    "missing": (
        lambda t: t.pop(f"{original_files.UNET}out.2.bias"),
        "missing    model.diffusion_model.out.2.bias (4,)",
    ),
    "misshapen": (misshapen, "misshapen  model.diffusion_model.out.2.bias: (3,), expected (4,)"),
    "twice": (
        lambda t: t.update({f"{original_files.VAE}encoder.mid.attn_1.to_q.bias": np.ones(16, np.float32)}),
        "are the same parameter",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_unsupported_files_are_rejected(simple, write, small, small_folder, name):
    change, message = BROKEN[name]
    change(tensors := dict(simple))
    path = write(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(path, config=small_folder, devices=small.devices)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_an_unused_tensor_raises_a_warning(simple, write, small, small_folder):
    path = write(simple | {f"{original_files.UNET}x": np.ones(1, np.float32)})
    with pytest.warns(UserWarning, match=rf"{path} has a tensor that is not used.*: model\.diffusion_model\.x \(1,\)$"):
        assert same(load(path, config=small_folder, devices=small.devices), small)


def test_truncated_and_missing_files_are_rejected(write, tmp_path, small, small_folder):
    truncated = {
        "truncated.safetensors": (b"\x08\0\0\0\0\0\0\0{", CheckpointError, "truncated or not a safetensors file"),
        "model.ckpt": (b"PK\3\4", CheckpointError, r"model\.ckpt is truncated or not a torch weight file"),
    }
    for name, (content, error, message) in truncated.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message):
            load(tmp_path / name, config=small_folder, devices=small.devices)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not a file"):
        load(tmp_path / "none.safetensors", devices=small.devices)


def test_the_shell_explains_a_missing_vocabulary(simple, write):
    attention = {
        f"{original_files.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": np.ones((8, 768), np.float32)
    }
    result = CliRunner().invoke(
        main, ["edit", "--model", str(write(simple | attention)), "--prompt", "a", "--edit", "b"]
    )
    assert result.exit_code == 1
    assert "does not contain CLIP's vocabulary" in result.output
    assert "As --tokenizer, give a folder" in result.output
    assert (
        "fetching it failed, because stable-diffusion-v1-5/stable-diffusion-v1-5 is not a local folder" in result.output
    )


def test_arguments_that_do_not_fit_the_source_are_rejected(simple, write, small, small_folder, stages):
    path = write(simple)
    for arguments, message in [
        ({"variant": "fp16"}, "variant='fp16' applies only to folders and repo"),
        ({"revision": "main"}, "revision='main' applies only to the hub"),
        ({"ema": True}, "has no moving average"),
        ({"prediction_type": "v"}, "prediction_type='v' should be one of epsilon, v_prediction, or None"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(path, config=small_folder, devices=small.devices, **arguments)
    with pytest.raises(CheckpointError, match=r"attends to text of width 16, expected 768 \(Stable Diffusion 1"):
        load(path, devices=small.devices)
    with pytest.raises(CheckpointError, match=r"config=.* is Stable Diffusion's x4 upscaler, expected"):
        load(path, config=stages["upscaler"])
    with pytest.raises(ValueError, match="applies only to single files"):
        load(small_folder, config=small_folder)
    with pytest.raises(ValueError, match="ema=True applies only to single files"):
        load(small_folder, ema=True)
    with pytest.raises(TypeError, match="tokenizer=3 should be"):
        load(path, config=small_folder, tokenizer=3)
