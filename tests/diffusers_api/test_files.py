"""Tests that diffusers' methods for single files, LoRAs and textual inversions do the same as the native functions."""

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny
from support.checkpoints import same
from support.hub import Stub

from sega_jax import CheckpointError, SemanticStableDiffusionPipeline, add_words, load, merge_lora
from sega_jax.diffusers_api import StableDiffusionPipeline

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def pipe(small):
    return SemanticStableDiffusionPipeline(**SemanticStableDiffusionPipeline.from_pipe(small).components)


@pytest.fixture
def lora(tmp_path):
    rng = np.random.default_rng(0)

    def write(name, folder=tmp_path):
        shapes = {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 2)}
        folder.mkdir(exist_ok=True)
        save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}, folder / name)
        return folder / name

    return write


def equal(models, expected):
    pairs = zip(jax.tree.leaves(models), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_single_files(tmp_path, small, small_folder):
    save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "a.safetensors")
    pipe = SemanticStableDiffusionPipeline.from_single_file(
        tmp_path / "a.safetensors", config=small_folder, devices=small.devices, torch_dtype="torch.float32"
    )
    assert same(pipe.pipeline, small)
    changed = {"scheduler": "EulerDiscreteScheduler", "tokenizer": small.tokenizer, "prediction_type": "v_prediction"}
    pipe = SemanticStableDiffusionPipeline.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(small_folder), devices=small.devices, **changed
    )
    assert pipe.scheduler.name == "EulerDiscreteScheduler"


def test_loras(pipe, lora, tmp_path):
    before = pipe.pipeline.models
    one, two = lora("one.safetensors"), lora("pytorch_lora_weights.safetensors", tmp_path / "two")
    pipe.load_lora_weights(tmp_path, weight_name="one.safetensors")
    assert equal(pipe.pipeline.models, merge_lora(before, one))
    pipe.load_lora_weights(str(tmp_path / "two"), adapter_name="two")
    assert equal(pipe.pipeline.models, merge_lora(before, two))  # only the newest LoRA is active, as in diffusers
    assert pipe.get_active_adapters() == ["two"]
    pipe.set_adapters(["default_0", "two"])
    assert equal(pipe.pipeline.models, merge_lora(before, {one: 1, two: 1}))
    pipe.set_adapters(["default_0", "two"], [0.5, -1])
    assert equal(pipe.pipeline.models, merge_lora(before, {one: 0.5, two: -1}))
    pipe.set_adapters("two", 0.3)
    assert equal(pipe.pipeline.models, merge_lora(before, {two: 0.3}))
    assert pipe.get_active_adapters() == ["two"]
    pipe.unload_lora_weights()
    assert equal(pipe.pipeline.models, before)
    pipe.load_lora_weights(one)
    pipe.fuse_lora(lora_scale=0.7)
    fused = pipe.pipeline.models
    assert equal(fused, merge_lora(before, {one: 0.7}))
    pipe.unload_lora_weights()
    assert pipe.pipeline.models is fused
    pipe.load_lora_weights(two)
    assert equal(pipe.pipeline.models, merge_lora(fused, two))


def test_loras_from_repositories(pipe, lora, tmp_path, monkeypatch):
    client = Stub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    before, one = pipe.pipeline.models, lora("one.safetensors", client.folder)
    pipe.load_lora_weights("owner/style", weight_name="one.safetensors", revision="v1")
    assert client.calls[0][:2] == ("owner/style", "v1")
    assert equal(pipe.pipeline.models, merge_lora(before, one))
    one.rename(client.folder / "pytorch_lora_weights.safetensors")
    pipe.unload_lora_weights()
    pipe.load_lora_weights("owner/style")
    assert equal(pipe.pipeline.models, merge_lora(before, client.folder))


def test_several_loras_are_rounded_once(small_folder, one_device, lora):
    """In half precision, the sum of two LoRAs is added to the weights before rounding."""
    pipe = SemanticStableDiffusionPipeline.from_pipe(load(small_folder, devices=one_device, dtype="bfloat16"))
    before, one, two = pipe.pipeline.models, lora("one.safetensors"), lora("two.safetensors")
    pipe.load_lora_weights(one, "one")
    pipe.load_lora_weights(two, "two")
    pipe.set_adapters(["one", "two"])
    assert equal(pipe.pipeline.models, merge_lora(before, {one: 1, two: 1}))
    assert not equal(pipe.pipeline.models, merge_lora(merge_lora(before, one), two))


def test_pipelines_that_share_their_networks(pipe, lora, small):
    """Each pipeline has its own scheduler; LoRAs are shared until a network is replaced."""
    other = StableDiffusionPipeline.from_pipe(pipe)
    before, path = pipe.pipeline.models, lora("one.safetensors")
    other.scheduler = "EulerDiscreteScheduler"
    assert (pipe.scheduler.name, small.scheduler.name) == ("DDIMScheduler", "DDIMScheduler")
    other.load_lora_weights(path, "a")
    assert pipe.get_active_adapters() == ["a"]
    assert equal(pipe.pipeline.models, merge_lora(before, path))
    pipe.set_adapters("a", 0.5)
    assert equal(other.pipeline.models, merge_lora(before, {path: 0.5}))
    other.unet = small.models.unet
    pipe.unload_lora_weights()
    assert equal(pipe.pipeline.models, before)
    assert equal(small.models, before)


def test_the_scale_multiplies_the_weights_of_all_networks(pipe, lora):
    """Networks for which no weight is given have weight 1, which is also scaled."""
    before, path = pipe.pipeline.models, lora("one.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    text = {f"{layer}.lora_A.weight": np.ones((2, 16)), f"{layer}.lora_B.weight": np.ones((16, 2))}
    save_file(load_file(path) | {key: array.astype(np.float32) for key, array in text.items()}, path)
    pipe.load_lora_weights(path, "a")
    pipe.set_adapters("a", {"unet": 0.5})
    with pipe._scaled_loras(0.5):
        assert equal(pipe.text_encoder, merge_lora(before, {path: 0.5}).text_encoder)
        assert equal(pipe.unet, merge_lora(before, {path: 0.25}).unet)
    assert not equal(pipe.text_encoder, before.text_encoder)
    with pytest.raises(ValueError, match=r"components=\['unet'\] does not include 'text_encoder'"):
        pipe.fuse_lora(components=["unet"])


def test_replacing_a_network_removes_loras(pipe, lora, small):
    pipe.load_lora_weights(lora("one.safetensors"))
    pipe.unet = small.models.unet
    assert pipe.get_active_adapters() == []
    pipe.unload_lora_weights()
    assert equal(pipe.pipeline.models, small.models)


def test_a_word_named_in_the_file_is_removed_by_its_name(pipe, tmp_path):
    save_file({"<own>": np.ones((2, 16), np.float32)}, tmp_path / "learned_embeds.safetensors")
    before = pipe.pipeline.models
    pipe.load_textual_inversion(tmp_path)
    assert "<own>" in pipe.tokenizer.words(pipe.tokenizer.tokens("<own>"))
    pipe.unload_textual_inversion("<own>")
    assert equal(pipe.pipeline.models, before)


def test_textual_inversion(pipe, small, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    save_file({"<a>": vectors}, tmp_path / "learned_embeds.safetensors")
    save_file({"<b>": vectors[0]}, tmp_path / "b.safetensors")
    pipe.load_textual_inversion(tmp_path)
    pipe.load_textual_inversion([tmp_path / "b.safetensors"], token=["<c>"])
    models, tokenizer = add_words(small.models, small.tokenizer, tmp_path / "learned_embeds.safetensors")
    models, tokenizer = add_words(models, tokenizer, {"<c>": tmp_path / "b.safetensors"})
    assert equal(pipe.pipeline.models, models)
    texts = ["x <a> <c>", "<b>"]
    np.testing.assert_array_equal(pipe.tokenizer(texts), tokenizer(texts))
    assert (pipe.tokenizer(texts) != small.tokenizer(texts)).any()


def test_wrong_arguments_are_errors(pipe, lora, tmp_path):
    path = lora("one.safetensors")
    pipe.load_lora_weights(path, "a")
    empty, two = tmp_path / "empty", "two.safetensors"
    empty.mkdir()
    for error, message, attempt in [
        (ValueError, "adapter_name='a' is already loaded", lambda: pipe.load_lora_weights(path, "a")),
        (ValueError, r"adapter_weights=\[1, 2\] should be one", lambda: pipe.set_adapters("a", [1, 2])),
        (
            ValueError,
            "the LoRA 'b' in adapter_names is not loaded; loaded LoRAs: a",
            lambda: pipe.set_adapters(["a", "b"]),
        ),
        (CheckpointError, "has no LoRA; it contains nothing", lambda: pipe.load_lora_weights(empty)),
        (CheckpointError, r"two\.safetensors is missing", lambda: pipe.load_lora_weights(tmp_path, weight_name=two)),
        (FileNotFoundError, "does not contain learned_embeds", lambda: pipe.load_textual_inversion(tmp_path)),
        (TypeError, "has type dict; expected the path", lambda: pipe.load_lora_weights({})),
        (
            ValueError,
            "should be a list with one word for each of the 2 files",
            lambda: pipe.load_textual_inversion([path, path], token="<a>"),
        ),
        (CheckpointError, "is a LoRA|give a LoRA as", lambda: pipe.load_textual_inversion(path)),
        (CheckpointError, "it is a LoRA", lambda: SemanticStableDiffusionPipeline.from_single_file(path)),
    ]:
        with pytest.raises(error, match=message):
            attempt()
    assert pipe.get_active_adapters() == ["a"]
