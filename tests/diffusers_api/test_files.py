"""diffusers' words for single files, LoRAs and textual inversion: what they do is what ours do."""

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
def face(small):
    return SemanticStableDiffusionPipeline(**SemanticStableDiffusionPipeline.from_pipe(small).components)


@pytest.fixture
def lora(tmp_path):
    rng = np.random.default_rng(0)

    def write(name, folder=tmp_path):
        made = {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 2)}
        folder.mkdir(exist_ok=True)
        save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in made.items()}, folder / name)
        return folder / name

    return write


def equal(ours, wanted):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_single_files(tmp_path, small, small_folder):
    save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "a.safetensors")
    face = SemanticStableDiffusionPipeline.from_single_file(
        tmp_path / "a.safetensors", config=small_folder, devices=small.devices, torch_dtype="torch.float32"
    )
    assert same(face.pipeline, small)
    changed = {"scheduler": "EulerDiscreteScheduler", "tokenizer": small.tokenizer, "prediction_type": "v_prediction"}
    face = SemanticStableDiffusionPipeline.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(small_folder), devices=small.devices, **changed
    )
    assert face.scheduler.name == "EulerDiscreteScheduler"


def test_loras(face, lora, tmp_path):
    before = face.pipeline.models
    one, two = lora("one.safetensors"), lora("pytorch_lora_weights.safetensors", tmp_path / "two")
    face.load_lora_weights(tmp_path, weight_name="one.safetensors")
    assert equal(face.pipeline.models, merge_lora(before, one))
    face.load_lora_weights(str(tmp_path / "two"), adapter_name="two")
    assert equal(face.pipeline.models, merge_lora(before, two))  # the newest alone, as in diffusers
    assert face.get_active_adapters() == ["two"]
    face.set_adapters(["default_0", "two"])
    assert equal(face.pipeline.models, merge_lora(before, {one: 1, two: 1}))
    face.set_adapters(["default_0", "two"], [0.5, -1])
    assert equal(face.pipeline.models, merge_lora(before, {one: 0.5, two: -1}))
    face.set_adapters("two", 0.3)
    assert equal(face.pipeline.models, merge_lora(before, {two: 0.3}))
    assert face.get_active_adapters() == ["two"]
    face.unload_lora_weights()
    assert equal(face.pipeline.models, before)
    face.load_lora_weights(one)
    face.fuse_lora(lora_scale=0.7)
    fused = face.pipeline.models
    assert equal(fused, merge_lora(before, {one: 0.7}))
    face.unload_lora_weights()
    assert face.pipeline.models is fused
    face.load_lora_weights(two)
    assert equal(face.pipeline.models, merge_lora(fused, two))


def test_loras_of_repositories(face, lora, tmp_path, monkeypatch):
    client = Stub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    before, one = face.pipeline.models, lora("one.safetensors", client.folder)
    face.load_lora_weights("owner/style", weight_name="one.safetensors", revision="v1")
    assert client.calls[0][:2] == ("owner/style", "v1")
    assert equal(face.pipeline.models, merge_lora(before, one))
    one.rename(client.folder / "pytorch_lora_weights.safetensors")
    face.unload_lora_weights()
    face.load_lora_weights("owner/style")
    assert equal(face.pipeline.models, merge_lora(before, client.folder))


def test_several_loras_are_rounded_once(small_folder, one_device, lora):
    """In half precision the sum of two LoRAs is added to the weights before it is rounded."""
    face = SemanticStableDiffusionPipeline.from_pipe(load(small_folder, devices=one_device, dtype="bfloat16"))
    before, one, two = face.pipeline.models, lora("one.safetensors"), lora("two.safetensors")
    face.load_lora_weights(one, "one")
    face.load_lora_weights(two, "two")
    face.set_adapters(["one", "two"])
    assert equal(face.pipeline.models, merge_lora(before, {one: 1, two: 1}))
    assert not equal(face.pipeline.models, merge_lora(merge_lora(before, one), two))


def test_pipelines_that_share_their_networks(face, lora, small):
    """Each has a scheduler of its own, and a LoRA of one is one of both until a network is exchanged."""
    other = StableDiffusionPipeline.from_pipe(face)
    before, path = face.pipeline.models, lora("one.safetensors")
    other.scheduler = "EulerDiscreteScheduler"
    assert (face.scheduler.name, small.scheduler.name) == ("DDIMScheduler", "DDIMScheduler")
    other.load_lora_weights(path, "a")
    assert face.get_active_adapters() == ["a"]
    assert equal(face.pipeline.models, merge_lora(before, path))
    face.set_adapters("a", 0.5)
    assert equal(other.pipeline.models, merge_lora(before, {path: 0.5}))
    other.unet = small.models.unet
    face.unload_lora_weights()
    assert equal(face.pipeline.models, before)
    assert equal(small.models, before)


def test_weights_by_network_are_scaled_whole(face, lora):
    """Networks that are not named have weight 1, times the scale."""
    before, path = face.pipeline.models, lora("one.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    text = {f"{layer}.lora_A.weight": np.ones((2, 16)), f"{layer}.lora_B.weight": np.ones((16, 2))}
    save_file(load_file(path) | {key: array.astype(np.float32) for key, array in text.items()}, path)
    face.load_lora_weights(path, "a")
    face.set_adapters("a", {"unet": 0.5})
    with face._scaled_loras(0.5):
        assert equal(face.text_encoder, merge_lora(before, {path: 0.5}).text_encoder)
        assert equal(face.unet, merge_lora(before, {path: 0.25}).unet)
    assert not equal(face.text_encoder, before.text_encoder)
    with pytest.raises(ValueError, match=r"components=\['unet'\] does not include 'text_encoder'"):
        face.fuse_lora(components=["unet"])


def test_networks_exchanged_with_loras_in_them(face, lora, small):
    face.load_lora_weights(lora("one.safetensors"))
    face.unet = small.models.unet
    assert face.get_active_adapters() == []
    face.unload_lora_weights()
    assert equal(face.pipeline.models, small.models)


def test_a_files_own_word_is_taken_away_by_its_name(face, tmp_path):
    save_file({"<own>": np.ones((2, 16), np.float32)}, tmp_path / "learned_embeds.safetensors")
    before = face.pipeline.models
    face.load_textual_inversion(tmp_path)
    assert "<own>" in face.tokenizer.words(face.tokenizer.tokens("<own>"))
    face.unload_textual_inversion("<own>")
    assert equal(face.pipeline.models, before)


def test_textual_inversion(face, small, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    save_file({"<a>": vectors}, tmp_path / "learned_embeds.safetensors")
    save_file({"<b>": vectors[0]}, tmp_path / "b.safetensors")
    face.load_textual_inversion(tmp_path)
    face.load_textual_inversion([tmp_path / "b.safetensors"], token=["<c>"])
    models, tokenizer = add_words(small.models, small.tokenizer, tmp_path / "learned_embeds.safetensors")
    models, tokenizer = add_words(models, tokenizer, {"<c>": tmp_path / "b.safetensors"})
    assert equal(face.pipeline.models, models)
    texts = ["x <a> <c>", "<b>"]
    np.testing.assert_array_equal(face.tokenizer(texts), tokenizer(texts))
    assert (face.tokenizer(texts) != small.tokenizer(texts)).any()


def test_mistakes(face, lora, tmp_path):
    path = lora("one.safetensors")
    face.load_lora_weights(path, "a")
    empty, two = tmp_path / "empty", "two.safetensors"
    empty.mkdir()
    for error, words, attempt in [
        (ValueError, "adapter_name='a' is already loaded", lambda: face.load_lora_weights(path, "a")),
        (ValueError, r"adapter_weights=\[1, 2\] should be one", lambda: face.set_adapters("a", [1, 2])),
        (ValueError, "the LoRA 'b' in adapter_names is not loaded; loaded LoRAs: a", lambda: face.set_adapters(["a", "b"])),
        (CheckpointError, "has no file with a LoRA; it has nothing", lambda: face.load_lora_weights(empty)),
        (CheckpointError, r"two\.safetensors is missing", lambda: face.load_lora_weights(tmp_path, weight_name=two)),
        (FileNotFoundError, "does not contain learned_embeds", lambda: face.load_textual_inversion(tmp_path)),
        (TypeError, "is a dict, .* expected the path", lambda: face.load_lora_weights({})),
        (ValueError, "should be a list with one word for each of the 2 files", lambda: face.load_textual_inversion([path, path], token="<a>")),
        (CheckpointError, "is a LoRA|a LoRA goes with", lambda: face.load_textual_inversion(path)),
        (CheckpointError, "it is a LoRA", lambda: SemanticStableDiffusionPipeline.from_single_file(path)),
    ]:
        with pytest.raises(error, match=words):
            attempt()
    assert face.get_active_adapters() == ["a"]
