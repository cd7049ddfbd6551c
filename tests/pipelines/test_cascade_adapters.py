"""LoRAs and textual inversions for the stages of a cascade."""

import gc

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import loras, tiny

from sega_jax import CheckpointError, Edit, load, load_cascade
from sega_jax.pipelines import loading

pytestmark = pytest.mark.usefixtures("one_by_default")

T5_LAYER, UNET_LAYER = "encoder.block.0.layer.0.SelfAttention.q", "time_embedding.linear_1"
EDITS = [Edit("glasses", warmup=0, threshold=0.5), Edit("hat", scale=-4, warmup=1)]
TWO = ["a <toy>", "dog"]
STEPS = {"stage1": {"steps": 3}, "stage2": {"steps": 2, "noise_level": 100}, "upscaler": {"steps": 2}}


@pytest.fixture(autouse=True)
def _fast_garbage_collection():
    """Excludes existing objects from garbage collection, which a cascade runs after every stage."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def files(first, second, upscaler, tmp_path_factory):
    """Writes a LoRA for each stage (the first LoRA also changes the text encoder), and a textual inversion for the
    upscaler."""
    where = tmp_path_factory.mktemp("adapters")
    save_file(
        {"<toy>": np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)}, where / "toy.safetensors"
    )
    both = {"unet": [UNET_LAYER], "text_encoder": [T5_LAYER]}
    return {
        "stage1": loras.write(where / "1.safetensors", first.models, both),
        "stage2": loras.write(where / "2.safetensors", second.models, {"unet": [UNET_LAYER]}, 1),
        "upscaler": loras.write(where / "x4.safetensors", upscaler.models, {"unet": [UNET_LAYER]}, 2),
        "toy": where / "toy.safetensors",
    }


def adapters(files):
    """Returns the adapters as arguments for `load_cascade`."""
    return {
        "loras": {"stage1": files["stage1"], "stage2": {files["stage2"]: -0.5}, "upscaler": files["upscaler"]},
        "textual_inversions": {"upscaler": {"<toy>": files["toy"]}},
    }


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_cascade_with_adapters_equals_its_stages_loaded_alone(stages, first, files, low_memory):
    given, devices = adapters(files), first.devices
    made = load_cascade(**stages, **given, devices=devices, low_memory=low_memory)
    made = made(TWO, EDITS, seed=[5, 9], output="float", **STEPS)
    one = load(stages["stage1"], lora=files["stage1"], devices=devices)
    text = {"text_encoder": one.models.text_encoder, "tokenizer": one.tokenizer}
    two = load(stages["stage2"], lora={files["stage2"]: -0.5}, devices=devices, **text)
    words = {"<toy>": files["toy"]}
    three = load(stages["upscaler"], lora=files["upscaler"], textual_inversion=words, devices=devices)
    small = one(TWO, EDITS, seed=[5, 9], output="float", **STEPS["stage1"]).images
    middle = two(TWO, image=small, seed=[5, 9], output="float", **STEPS["stage2"]).images
    large = three(TWO, image=middle, seed=[5, 9], output="float", **STEPS["upscaler"]).images
    for name, wanted in zip(STEPS, (small, middle, large), strict=True):
        np.testing.assert_array_equal(made.stages[name].images, wanted)
    plain = load_cascade(**stages, devices=devices)(TWO, EDITS, seed=[5, 9], output="float", **STEPS)
    assert all(np.abs(plain.stages[name].images - made.stages[name].images).max() > 1e-3 for name in STEPS)


def same(ours, others):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True)
    return [np.array_equal(a, b) for a, b in pairs]


def test_merged_weights_equal_those_of_each_stage(stages, first, files):
    """With low memory, the text encoder and the first stage are loaded separately."""
    given, devices = adapters(files), first.devices
    one = load(stages["stage1"], lora=files["stage1"], devices=devices)
    wanted = one.models
    for low_memory in (False, True):
        made = load_cascade(**stages, **given, devices=devices, low_memory=low_memory)
        assert all(same(made.stages["stage1"].load().models.unet, wanted.unet))
        (text,) = made._encode(["dog"])
        np.testing.assert_array_equal(text.states, one.encode("dog").states)
        assert made.stages["upscaler"].load().tokenizer(["<toy>"]).max() >= tiny.TEXT["eos_token_id"] + 2
    assert not all(same(wanted.unet, first.models.unet))
    assert not all(same(wanted.text_encoder, first.models.text_encoder))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loras": "a.safetensors"}, TypeError, "loras='a.safetensors' should map stage names to values, such as"),
        ({"loras": {"stage3": "a"}}, ValueError, "loras has stage3; the stages are stage1, stage2, upscaler"),
        ({"textual_inversions": {"stage2": "a"}}, ValueError, "stage2's textual_inversion is given, but DeepFloyd-IF"),
        ({"textual_inversions": {"stage1": "a"}}, ValueError, "It is supported by Stable Diffusion 1.x or 2.x"),
        ({"loras": {"stage2": "{stage1}"}}, CheckpointError, "does not fit this checkpoint's unet:"),
        ({"loras": {"upscaler": "{stage1}"}}, CheckpointError, "does not fit this checkpoint's text_encoder and unet"),
        ({"loras": {"stage1": "{toy}"}}, CheckpointError, "unexpected <toy>"),
        ({"loras": {"stage1": "nowhere.safetensors"}}, CheckpointError, "nowhere.safetensors is missing"),
        ({"textual_inversions": {"upscaler": "nowhere.bin"}}, CheckpointError, "nowhere.bin is missing"),
    ],
)
@pytest.mark.parametrize("low_memory", [False, True])
def test_invalid_adapters_are_rejected_before_weights_are_read(
    stages, files, monkeypatch, low_memory, options, error, words
):
    monkeypatch.setattr(loading, "fill", lambda *_, **__: pytest.fail("weights were read"))
    named = {
        what: {stage: path.format(**files) for stage, path in by.items()} if isinstance(by, dict) else by
        for what, by in options.items()
    }
    with pytest.raises(error, match=words):
        load_cascade(**stages, **named, low_memory=low_memory)


def test_families_without_adapters_reject_them(stages, paella_folder, monkeypatch):
    monkeypatch.setattr(loading, "fill", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"lora is given, but Paella does not support LoRA; leave it"):
        load(paella_folder, lora="a.safetensors")
    for source in (paella_folder, stages["stage1"]):
        with pytest.raises(ValueError, match=r"textual_inversion is given, but .* does not support textual inversion"):
            load(source, textual_inversion="a.bin")
