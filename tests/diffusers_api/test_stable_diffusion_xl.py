"""Tests that SemanticStableDiffusionXLPipeline matches the native pipeline and refuses unsupported arguments."""

import jax
import numpy as np
import pytest
from support import tiny

from sega_jax import CheckpointError, Edit, SemanticStableDiffusionPipeline, SemanticStableDiffusionXLPipeline, load

UNET = tiny.UNET_XL | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 1],
}
STEPS = 3
EDITS = {
    "editing_prompt": ["a hat", "snow"],
    "edit_guidance_scale": [6, 4],
    "reverse_editing_direction": [False, True],
    "edit_threshold": [0.8, 0.5],
    "edit_warmup_steps": [0, 1],
    "edit_momentum_scale": 0.3,
}
NATIVE = [Edit("a hat", scale=6, threshold=0.8, warmup=0), Edit("snow", scale=-4, threshold=0.5, warmup=1)]
CALL = {"num_inference_steps": STEPS, "output_type": "latent", "progress": False} | EDITS
OURS = {"edits": NATIVE, "momentum_scale": 0.3, "steps": STEPS, "output": "latent", "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.xl(tmp_path_factory.mktemp("xl") / "tiny", unet=UNET)


@pytest.fixture(scope="module")
def native(folder, one_device):
    return load(folder, devices=one_device)


@pytest.fixture(scope="module")
def pipe(native):
    return SemanticStableDiffusionXLPipeline.from_pipe(native)


@pytest.fixture(scope="module")
def encode(native):
    """Returns embeddings and pooled embeddings as two arrays, as in diffusers."""

    def states_and_pooled(*texts):
        text = native.encode(texts)
        return text.states, text.pooled

    return states_and_pooled


def test_a_call_equals_the_native_call(native, pipe):
    sizes = {"original_size": (20, 34), "target_size": [(24, 16), (8, 9)]}
    same = {"negative_prompt": ["bad", ""], "guidance_rescale": 0.4, "seed": [3, 8]} | sizes
    out = pipe(["a cat", "dog"], **CALL, **same, crops_coords_top_left=(3, 5), return_guidance=True)
    expected = native(["a cat", "dog"], **OURS, **same, crops_top_left=(3, 5), record=True)
    assert np.array_equal(out.images, expected.images)
    assert np.array_equal(out.sem_guidance, np.moveaxis(expected.record.sem_guidance, 0, 1))
    assert np.array_equal(out.edit_estimates, np.moveaxis(expected.record.edits, 0, 2))
    assert out.sem_guidance.any()


def test_embeddings_and_pooled_embeddings_replace_words(pipe, encode):
    expected = pipe("a cat", negative_prompt="bad", **CALL).images
    states, pooled = encode("a cat", "bad", "a hat", "snow")
    embeds = {"prompt_embeds": states[:1], "pooled_prompt_embeds": pooled[:1], "negative_prompt_embeds": states[1:2]}
    embeds |= {"negative_pooled_prompt_embeds": pooled[1:2], "editing_prompt": None}
    edits = {"editing_prompt_embeddings": states[2:], "editing_pooled_prompt_embeddings": pooled[2:]}
    assert np.array_equal(pipe(**CALL | embeds | edits).images, expected)
    edits = {name: value[None] for name, value in edits.items()}
    assert np.array_equal(pipe(**CALL | embeds | edits).images, expected)
    assert not np.array_equal(pipe(**CALL | embeds | {"pooled_prompt_embeds": pooled[1:2]} | edits).images, expected)


def test_the_second_text_encoder_reads_prompt_2(native, pipe, encode):
    states, pooled = encode("a cat", "dog")
    mixed = native.encode("a cat", second="dog")
    assert (mixed.states.shape, mixed.pooled.shape) == ((1, 12, 36), (1, 12))
    assert np.array_equal(mixed.states[0, :, :16], states[0, :, :16])
    assert np.array_equal(mixed.states[0, :, 16:], states[1, :, 16:])
    assert np.array_equal(mixed.pooled[0], pooled[1])
    expected = native(mixed, **OURS, negative_prompt=native.encode("bad", second="no")).images
    words = {"negative_prompt": "bad", "negative_prompt_2": "no"}
    assert np.array_equal(pipe("a cat", "dog", **CALL, **words).images, expected)
    assert np.array_equal(pipe(prompt_embeds=mixed, **CALL, **words).images, expected)
    several, one = native.encode(["a", "b"], second="c")[1], native.encode("b", second="c")
    assert np.array_equal(several.states, one.states)
    assert np.array_equal(several.pooled, one.pooled)
    plain = pipe("a cat", **CALL).images
    assert not np.array_equal(plain, expected)
    for same in ("", "a cat", ["a cat"]):
        assert np.array_equal(pipe("a cat", same, **CALL).images, plain)


def test_long_and_weighted_prompts(native, pipe):
    """Tests prompts for one or both text encoders, and embeddings of several chunks."""
    long, reading = "cow, (black:1.4), on [my] mud", {"long_prompts": True, "weighted": True}
    expected = native(long, **OURS, **reading).images
    assert np.array_equal(pipe(long, **CALL, **reading).images, expected)
    text = native.encode(long, **reading)
    assert text.states.shape == (1, 24, 36)
    embeds = {"prompt_embeds": text.states, "pooled_prompt_embeds": text.pooled}
    assert np.array_equal(pipe(**CALL, **embeds).images, expected)
    mixed = native.encode("cat", second=long, **reading)
    expected = native(mixed, **OURS, negative_prompt=native.encode("bad", second=long, **reading)).images
    words = {"negative_prompt": "bad", "negative_prompt_2": long}
    assert np.array_equal(pipe("cat", long, **CALL, **words, **reading).images, expected)


def test_the_default_strength_is_that_of_diffusers(native, pipe):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    call = {"num_inference_steps": 8}
    expected = native("cat", **OURS | {"steps": 8}, image=image, strength=0.3).images
    assert np.array_equal(pipe("cat", **CALL | call, image=image).images, expected)


def test_components(folder, pipe, one_device, compilations):
    expected = pipe("cat", **CALL).images
    compilations.clear()
    again = SemanticStableDiffusionXLPipeline(**pipe.components)
    assert np.array_equal(again("cat", **CALL, return_dict=False)[0], expected)
    assert not compilations
    again.text_encoder_2 = jax.tree.map(lambda leaf: leaf / 2, again.text_encoder_2)
    assert not np.array_equal(again("cat", **CALL).images, expected)
    parts = {name: pipe.components[name] for name in ("unet", "vae", "text_encoder_2", "tokenizer", "tokenizer_2")}
    loaded = SemanticStableDiffusionXLPipeline.from_pretrained(
        folder, devices=pipe.pipeline.devices, add_watermarker=False, force_zeros_for_empty_prompt=False, **parts
    )
    assert (loaded.tokenizer, loaded.tokenizer_2) == (pipe.tokenizer, pipe.tokenizer_2)
    assert not loaded.components["force_zeros_for_empty_prompt"]
    empty = loaded("cat", **CALL).images
    assert np.array_equal(empty, pipe("cat", negative_prompt="", **CALL).images)
    assert not np.array_equal(empty, expected)


def test_checkpoints_of_another_family_are_refused(folder, native, small, small_folder):
    with pytest.raises(TypeError, match=r"is for Stable Diffusion XL, expected Stable Diffusion 1.x or 2.x for"):
        SemanticStableDiffusionPipeline.from_pipe(native)
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion XL, expected Stable Diffusion 1.x or 2.x for"):
        SemanticStableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(TypeError, match="expected Stable Diffusion XL for SemanticStableDiffusionXLPipeline"):
        SemanticStableDiffusionXLPipeline.from_pipe(small)
    with pytest.raises(CheckpointError, match="expected Stable Diffusion XL for SemanticStableDiffusionXLPipeline"):
        SemanticStableDiffusionXLPipeline.from_pretrained(small_folder)


STATES, POOLED = np.zeros((1, 12, 36), np.float32), np.zeros((1, 12), np.float32)
NO_WORDS = {"prompt": None, "prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}
REFUSED = [
    ({"denoising_end": 0.8}, ValueError, "denoising_end=0.8 is not supported; it belongs to the SDXL refiner"),
    ({"clip_skip": 9}, ValueError, "clip_skip=9 should be from 0 to 1 for this text encoder"),
    ({"ip_adapter_image": STATES}, ValueError, "ip_adapter_image=.* is not supported; sega_jax has"),
    (
        {"negative_original_size": (1, 2)},
        ValueError,
        r"negative_original_size=\(1, 2\) is not supported; the negative prompt",
    ),
    ({"negative_crops_coords_top_left": (0, 1)}, ValueError, "negative_crops_coords_top_left=.* is not supported"),
    ({"callback_on_step_end": 3}, TypeError, "callback_on_step_end=3 should be a function of .pipe, step"),
    ({"cross_attention_kwargs": {"gain": 1}}, ValueError, "cross_attention_kwargs=.* is not supported; it should be"),
    ({"colour": 1}, TypeError, "colour is not an argument of SemanticStableDiffusionXLPipeline"),
    ({"prompt": None}, TypeError, "prompt=None should be a string or a list of strings"),
    ({"generator": "3"}, TypeError, "generator='3' should be a seeded torch generator, a seed"),
    ({"output_type": "pt"}, ValueError, "output_type='pt' .* is not supported; use 'np'"),
    ({"prompt_2": ["a", "b"]}, ValueError, "prompt_2 has 2 entries, expected 1, one for each"),
    ({"prompt_2": 3}, TypeError, r"prompt_2=\[3\] should be a string or a list"),
    ({"negative_prompt_2": "a"}, ValueError, "negative_prompt_2='a' has no effect .* give both"),
    ({"prompt_embeds": STATES}, ValueError, "prompt and prompt_embeds were both given"),
    ({"pooled_prompt_embeds": POOLED}, ValueError, "prompt_2 was given with prompt_embeds or pooled_"),
    (NO_WORDS | {"prompt_2": "a"}, ValueError, "prompt_2 was given with prompt_embeds or pooled_"),
    (NO_WORDS | {"pooled_prompt_embeds": None}, ValueError, "prompt_embeds and pooled_.* belong together"),
    (NO_WORDS | {"pooled_prompt_embeds": POOLED[:, 1:]}, ValueError, r"shape \(1, 11\), expected \(1, 12\)"),
    (NO_WORDS | {"prompt_embeds": STATES[:, 1:]}, ValueError, r"\(1, 11, 36\), expected \(..., 12, 36\) .* multiple"),
    (NO_WORDS | {"prompt_embeds": STATES[:, :0]}, ValueError, r"shape \(1, 0, 36\), expected \(..., 12, 36\)"),
    ({"long_prompts": 1}, TypeError, "long_prompts=1 should be True or False"),
    ({"negative_prompt_embeds": STATES}, ValueError, "negative_pooled_prompt_embeds belong together"),
    ({"editing_prompt_embeddings": STATES}, ValueError, "editing_pooled_prompt_embeddings belong together"),
    ({"strength": 0.5}, ValueError, "strength=0.5 needs a picture to start from"),
    ({"original_size": 3}, TypeError, "original_size=3 should be two whole numbers"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refused_before_anything_runs(pipe, monkeypatch, options, error, message):
    monkeypatch.setattr(type(pipe.pipeline.devices), "map", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(error, match=f"(?s){message}"):
        pipe(**{"prompt": "cat", "num_inference_steps": STEPS} | options)


def test_values_without_an_effect_in_diffusers_are_accepted(pipe):
    harmless = {"denoising_end": 1.0, "clip_skip": None, "negative_crops_coords_top_left": (0, 0)}
    assert np.isfinite(pipe("cat", **CALL, **harmless, cross_attention_kwargs=None).images).all()


def test_refused_components(folder, pipe):
    with pytest.raises(TypeError, match="only one of tokenizer and tokenizer_2 was given"):
        SemanticStableDiffusionXLPipeline.from_pretrained(folder, tokenizer=pipe.tokenizer)
    with pytest.raises(TypeError, match="add_watermarker=True is not supported: sega_jax adds no watermark"):
        SemanticStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=True)
    with pytest.raises(TypeError, match="text_encoder_2=int should be a CLIPTextModelWithProjection"):
        pipe.text_encoder_2 = 3
    with pytest.raises(ValueError, match="second has 2 entries, expected 3"):
        pipe.pipeline.encode(["a", "b", "c"], second=["d", "e"])


def test_a_second_text_needs_a_second_text_encoder(small):
    for reading in ({}, {"weighted": True}, {"long_prompts": True}):
        with pytest.raises(TypeError, match=r"second is not an option of Stable Diffusion 1.x or 2.x"):
            small.encode("a", second="b", **reading)
