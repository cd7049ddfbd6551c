"""Saving pipelines and loading them again."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny
from support.checkpoints import same

from sega_jax import Pipeline, add_words, load
from sega_jax.pipelines.safety import Safety
from sega_jax.pipelines.saving import save
from sega_jax.systems.stable_diffusion import SYSTEM

PIPES = ("small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("least_xl", "first", "second")))
PIPES += tuple(pytest.param(name, marks=pytest.mark.slow) for name in ("upscaler", "paella"))


@pytest.mark.parametrize("name", PIPES)
def test_a_saved_pipeline_loads_bit_for_bit(name, request, tmp_path):
    """The scheduler, tokenizers and extras are also the same."""
    pipe = request.getfixturevalue(name)
    if name != "paella":
        pipe = Pipeline(**pipe.components)
        pipe.scheduler = pipe.scheduler.config | {"timestep_spacing": "trailing"}
    folder = pipe.save(tmp_path / "saved", progress=False)
    found = load(folder, devices=pipe.devices)
    assert found.system is pipe.system
    assert same(found, pipe)
    assert found.extras == pipe.extras
    if name != "paella":
        assert found.scheduler.options == pipe.scheduler.options
    tokenizers = pipe.tokenizer if isinstance(pipe.tokenizer, tuple) else (pipe.tokenizer,)
    others = found.tokenizer if isinstance(found.tokenizer, tuple) else (found.tokenizer,)
    for one, other in zip(tokenizers, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one(["a cat", ""]), other(["a cat", ""]))


@pytest.mark.slow
def test_half_precision_new_words_and_the_safety_checker(recorded_pipe, tmp_path):
    """A pipeline is saved in its current state. Loading the result and saving it again changes nothing."""
    checked = recorded_pipe("sd1_checked")
    assert isinstance(checked.safety, Safety)
    vectors = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    save_file({"<a>": vectors}, tmp_path / "a.safetensors")
    pipe = Pipeline(**checked.components)
    pipe.models, pipe.tokenizer = add_words(pipe.models, pipe.tokenizer, tmp_path / "a.safetensors")
    found = load(pipe.save(tmp_path / "one"), devices=pipe.devices)
    assert same(found, pipe)
    np.testing.assert_array_equal(found.tokenizer(["x <a> y"]), pipe.tokenizer(["x <a> y"]))
    for one, other in zip(*(vars(p.safety.feature_extractor).values() for p in (found, pipe)), strict=True):
        np.testing.assert_array_equal(one, other)
    half = load(tmp_path / "one", devices=pipe.devices, dtype="bfloat16")
    again = load(half.save(tmp_path / "two"), devices=pipe.devices, dtype="bfloat16")
    assert same(again, half)
    names = ["text_encoder/model", "unet/diffusion_pytorch_model", "safety_checker/model"]
    kinds = [{array.dtype.name for array in load_file(tmp_path / f"two/{name}.safetensors").values()} for name in names]
    assert kinds == [{"bfloat16"}] * 3


def test_saved_files_suit_other_libraries(least_xl, tmp_path):
    """Keys, classes and options are the same as in published checkpoints."""
    least_xl.save(tmp_path / "xl", progress=False)
    index = json.loads((tmp_path / "xl/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["force_zeros_for_empty_prompt"] is True
    keys = load_file(tmp_path / "xl/text_encoder/model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)
    assert "num_class_embeds" not in json.loads((tmp_path / "xl/unet/config.json").read_text())


def test_invalid_arguments(small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder; choose a new one"):
        small.save(tmp_path / "full")
    with pytest.raises(TypeError, match="folder=3 should be the path of a new folder"):
        small.save(3)
    unsaved = Pipeline(**small.components)
    unsaved.system = SYSTEM._replace(checkpoint=SYSTEM.checkpoint._replace(saved=None))
    with pytest.raises(TypeError, match="does not support saving"):
        save(unsaved, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    "options",
    [{"mid_block_type": None}, {"mid_block_type": "UNetMidBlock2D"}, {"transformer_layers_per_block": [0, 1, 2]}],
)
def test_unet_variants_are_saved(options, tmp_path, one_device):
    """Options whose value is None are written, because a missing option would mean the default."""
    source = tiny.checkpoint(tmp_path / "source", unet=tiny.UNET | options)
    pipe = load(source, devices=one_device)
    found = load(pipe.save(tmp_path / "saved", progress=False), devices=one_device)
    assert found.models.unet.config == pipe.models.unet.config
    assert same(found, pipe)
