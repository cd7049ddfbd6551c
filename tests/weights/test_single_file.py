"""Stable Diffusion in single files: names at full size, what they load as, and what they are refused for."""

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
    """A folder in diffusers layout, and the tensors of a single file with the same weights."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("folder") / "tiny", **KINDS[request.param])
    return folder, tiny.original(**KINDS[request.param], openclip=request.param == "2", ema=True)


@pytest.fixture(scope="module")
def simple():
    """The tensors of a single file whose UNet has one level."""
    return tiny.original(unet=tiny.UNET_1)


# What is loaded


def test_a_file_is_the_folder_to_the_bit(both, write, one_device):
    folder, tensors = both
    wanted = load(folder, devices=one_device)
    assert same(load(write(tensors), config=folder, devices=one_device), wanted)


@pytest.mark.slow
def test_the_picture_is_the_same_to_the_bit(simple, write, small, small_folder):
    call = {"prompt": "a cat", "edits": [Edit("hat", warmup=1)], "steps": 3, "output": "float"}
    found = load(write(simple), config=small_folder, devices=small.devices)(**call)
    np.testing.assert_array_equal(found.images, small(**call).images)


def test_averages(both, write, one_device):
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
def test_other_names_of_the_autoencoder(simple, write, small, small_folder, names):
    """Linear layers in place of convolutions, under names of other times."""
    found = {}
    for key, array in simple.items():
        if ".attn_1." in key:
            array = array.reshape(array.shape[:2])
            for old, new in NAMES[names].items():
                key = key.replace(f".attn_1.{old}.", f".attn_1.{new}.")
        found[key.replace("first_stage_model.", "vae.") if names == "query" else key] = array
    assert same(load(write(found), config=small_folder, devices=small.devices), small)


def test_text_without_its_prefix(simple, write, small, small_folder):
    found = {key.replace("transformer.text_model.", "transformer."): array for key, array in simple.items()}
    assert same(load(write(found), config=small_folder, devices=small.devices), small)


def test_what_is_not_of_the_networks_is_left(simple, write, small, small_folder):
    others = ["first_stage_model.loss.logvar", "control_model.x", "cond_stage_model.logit_scale", "global_step"]
    found = simple | {key: np.zeros(2, np.float32) for key in others}
    assert same(load(write(found), config=small_folder, devices=small.devices), small)


def test_networks_of_other_pipelines(simple, write, small, small_folder):
    """In place of those that a file lacks."""
    path = write({key: array for key, array in simple.items() if key.startswith(original_files.UNET)})
    with pytest.raises(CheckpointError, match=r"has no text_encoder, names that start with .*; give text_encoder="):
        load(path, config=small_folder, devices=small.devices)
    others = {"text_encoder": small.models.text_encoder, "vae": small.models.vae}
    assert same(load(path, config=small_folder, devices=small.devices, **others), small)


def test_a_tokenizer_by_its_folder(simple, write, small, small_folder, tmp_path):
    """Where there is none in the config's."""
    bare = shutil.copytree(small_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    with pytest.raises(CheckpointError, match=r"does not contain CLIP's vocabulary: .*Give tokenizer="):
        load(write(simple), config=bare, devices=small.devices)
    found = load(write(simple), config=bare, tokenizer=str(small_folder / "tokenizer"), devices=small.devices)
    np.testing.assert_array_equal(found.tokenizer(["a b"]), small.tokenizer(["a b"]))
    assert same(load(write(simple), config=bare, tokenizer=small.tokenizer, devices=small.devices), small)
    with pytest.raises(CheckpointError, match=r"vocab\.json and .*merges\.txt missing"):
        load(write(simple), config=bare, tokenizer=tmp_path, devices=small.devices)


def test_the_prediction(simple, write, small, small_folder):
    found = load(write(simple), config=small_folder, prediction_type="v_prediction", devices=small.devices)
    assert found.scheduler.options["prediction_type"] == "v_prediction"
    assert found.scheduler.config == small.scheduler.config | {"prediction_type": "v_prediction"}
    found = load(
        small_folder, prediction_type="v_prediction", scheduler="EulerDiscreteScheduler", devices=small.devices
    )
    assert (found.scheduler.name, found.scheduler.options["prediction_type"]) == (
        "EulerDiscreteScheduler",
        "v_prediction",
    )


# Published checkpoints


@pytest.mark.parametrize(
    ("name", "count", "parameters"),
    [("sd_1", 1130, 1_066_235_307), ("sd_2", 1214, 1_289_952_427), ("sdxl", 2513, 3_468_837_867)],
)
def test_names_at_full_size(name, count, parameters):
    """The fixtures are of the files of Stable Diffusion 1.5, 2.1 and XL's base, without what no network of ours has."""
    config = {"sd_1": published.SD_1, "sd_2": published.SD_2, "sdxl": published.XL}[name]
    found = shapes(config, name == "sd_2")
    lines = (REFERENCE / f"{name}_file.txt").read_text().splitlines()
    wanted = {key: tuple(map(int, shape)) for key, *shape in map(str.split, lines)}
    assert found == wanted
    assert (len(found), sum(map(math.prod, found.values()))) == (count, parameters)


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
    found = describe(folder, tokenizer=small.tokenizer)
    assert type(found.models) is Models
    assert (found.scheduler.name, found.scheduler.options["prediction_type"]) == (solver, predicts)
    wanted = Models.build(**(published.SD_1 if width == 768 else published.SD_2))
    assert [leaves(network) for network in found.models] == [leaves(net) for net in wanted]
    size = 64 if name == "sd-2.1-base" else wanted.unet.config.sample_size
    assert found.models.unet.config == wanted.unet.config._replace(sample_size=size)


# What is refused


def without(start):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(start)]


def misshapen(tensors):
    tensors[f"{original_files.UNET}out.2.bias"] = np.zeros(3, np.float32)


XL = f"{original_files.UNET}label_emb.0.0.weight"
UNET_IN = f"{original_files.UNET}input_blocks.0.0.weight"
BROKEN = {
    "no UNet": (without("model."), "is no single file of Stable Diffusion 1.x or 2.x or Stable Diffusion XL: it"),
    "a LoRA": (
        lambda t: (t.clear(), t.update({"lora_unet_x.alpha": np.ones(1)})),
        "it is a LoRA, which goes with a checkpoint as lora=",
    ),
    "one network": (
        lambda t: (t.clear(), t.update({"down_blocks.x": np.ones(1)})),
        "it is one network in diffusers layout, give the folder",
    ),
    "nothing": (lambda t: t.clear(), "it has nothing"),
    "XL": (lambda t: t.update({XL: np.ones(1)}), "is Stable Diffusion 1.x or 2.x, expected Stable Diffusion XL, as"),
    "the refiner": (
        lambda t: t.update({"conditioner.embedders.0.model.x": np.ones(1)}),
        "is Stable Diffusion XL's refi",
    ),
    "EDM": (lambda t: t.update({"edm_mean": np.ones(4)}), "with EDM's preconditioning, which is not supported"),
    "inpainting": (lambda t: t.update({UNET_IN: np.ones((8, 9, 3, 3))}), "takes 9 channels, as models that fill in"),
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
def test_broken_files(simple, write, small, small_folder, name):
    change, words = BROKEN[name]
    change(tensors := dict(simple))
    path = write(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(path, config=small_folder, devices=small.devices)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_tensor_that_is_not_needed(simple, write, small, small_folder):
    path = write(simple | {f"{original_files.UNET}x": np.ones(1, np.float32)})
    with pytest.warns(UserWarning, match=rf"{path} has a tensor that is not used.*: model\.diffusion_model\.x \(1,\)$"):
        assert same(load(path, config=small_folder, devices=small.devices), small)


def test_no_weights_but_a_name(write, tmp_path, small, small_folder):
    load_broken = {
        "truncated.safetensors": (b"\x08\0\0\0\0\0\0\0{", CheckpointError, "truncated or no safetensors file"),
        "model.ckpt": (b"PK\3\4", CheckpointError, r"model\.ckpt is truncated or no weight file"),
    }
    for name, (content, error, words) in load_broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=words):
            load(tmp_path / name, config=small_folder, devices=small.devices)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not a file"):
        load(tmp_path / "none.safetensors", devices=small.devices)


def test_the_shell_says_what_is_missing(simple, write):
    like = {
        f"{original_files.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": np.ones((8, 768), np.float32)
    }
    result = CliRunner().invoke(main, ["edit", "--model", str(write(simple | like)), "--prompt", "a", "--edit", "b"])
    assert result.exit_code == 1
    assert "does not contain CLIP's vocabulary" in result.output
    assert "Give tokenizer= (in the shell --tokenizer)" in result.output
    assert "fetching it failed, because stable-diffusion-v1-5/stable-diffusion-v1-5 is no folder here" in result.output


def test_arguments_that_do_not_go_together(simple, write, small, small_folder, stages):
    path = write(simple)
    for arguments, words in [
        ({"variant": "fp16"}, "variant='fp16' is for folders and repo"),
        ({"revision": "main"}, "revision='main' is for repositories"),
        ({"ema": True}, "has no moving average"),
        ({"prediction_type": "v"}, "prediction_type='v' should be one of epsilon, v_prediction, or None"),
    ]:
        with pytest.raises(ValueError, match=words):
            load(path, config=small_folder, devices=small.devices, **arguments)
    with pytest.raises(CheckpointError, match="attends to text of width 16, which is 768 for Stable Diffusion 1"):
        load(path, devices=small.devices)
    with pytest.raises(CheckpointError, match=r"config=.* is Stable Diffusion's x4 upscaler, expected"):
        load(path, config=stages["upscaler"])
    with pytest.raises(ValueError, match="is for single files"):
        load(small_folder, config=small_folder)
    with pytest.raises(ValueError, match="ema=True is for single files"):
        load(small_folder, ema=True)
    with pytest.raises(TypeError, match="tokenizer=3 should be"):
        load(path, config=small_folder, tokenizer=3)
