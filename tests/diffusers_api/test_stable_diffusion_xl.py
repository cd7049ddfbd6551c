"""Stable Diffusion XL in diffusers' words: its calls are the pipeline's, and what it does not have is refused."""

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
def pipe(folder, one_device):
    return load(folder, devices=one_device)


@pytest.fixture(scope="module")
def face(pipe):
    return SemanticStableDiffusionXLPipeline.from_pipe(pipe)


@pytest.fixture(scope="module")
def two(pipe):
    """The embeddings of texts as diffusers has them, in two."""

    def encode(*texts):
        made = pipe.encode(texts)
        return made.states, made.pooled

    return encode


def test_a_call_is_the_pipelines(pipe, face):
    sizes = {"original_size": (20, 34), "target_size": [(24, 16), (8, 9)]}
    same = {"negative_prompt": ["bad", ""], "guidance_rescale": 0.4, "seed": [3, 8]} | sizes
    found = face(["a cat", "dog"], **CALL, **same, crops_coords_top_left=(3, 5), return_guidance=True)
    wanted = pipe(["a cat", "dog"], **OURS, **same, crops_top_left=(3, 5), record=True)
    assert np.array_equal(found.images, wanted.images)
    assert np.array_equal(found.sem_guidance, np.moveaxis(wanted.record.sem_guidance, 0, 1))
    assert np.array_equal(found.edit_estimates, np.moveaxis(wanted.record.edits, 0, 2))
    assert found.sem_guidance.any()


def test_embeddings_in_two_are_the_words(face, two):
    wanted = face("a cat", negative_prompt="bad", **CALL).images
    states, pooled = two("a cat", "bad", "a hat", "snow")
    given = {"prompt_embeds": states[:1], "pooled_prompt_embeds": pooled[:1], "negative_prompt_embeds": states[1:2]}
    given |= {"negative_pooled_prompt_embeds": pooled[1:2], "editing_prompt": None}
    edits = {"editing_prompt_embeddings": states[2:], "editing_pooled_prompt_embeddings": pooled[2:]}
    assert np.array_equal(face(**CALL | given | edits).images, wanted)
    edits = {name: value[None] for name, value in edits.items()}
    assert np.array_equal(face(**CALL | given | edits).images, wanted)
    assert not np.array_equal(face(**CALL | given | {"pooled_prompt_embeds": pooled[1:2]} | edits).images, wanted)


def test_the_second_text_encoder_may_read_others(pipe, face, two):
    states, pooled = two("a cat", "dog")
    mixed = pipe.encode("a cat", second="dog")
    assert (mixed.states.shape, mixed.pooled.shape) == ((1, 12, 36), (1, 12))
    assert np.array_equal(mixed.states[0, :, :16], states[0, :, :16])
    assert np.array_equal(mixed.states[0, :, 16:], states[1, :, 16:])
    assert np.array_equal(mixed.pooled[0], pooled[1])
    wanted = pipe(mixed, **OURS, negative_prompt=pipe.encode("bad", second="no")).images
    words = {"negative_prompt": "bad", "negative_prompt_2": "no"}
    assert np.array_equal(face("a cat", "dog", **CALL, **words).images, wanted)
    assert np.array_equal(face(prompt_embeds=mixed, **CALL, **words).images, wanted)
    several, one = pipe.encode(["a", "b"], second="c")[1], pipe.encode("b", second="c")
    assert np.array_equal(several.states, one.states)
    assert np.array_equal(several.pooled, one.pooled)
    plain = face("a cat", **CALL).images
    assert not np.array_equal(plain, wanted)
    for same in ("", "a cat", ["a cat"]):
        assert np.array_equal(face("a cat", same, **CALL).images, plain)


def test_long_and_weighted_prompts(pipe, face):
    """Also in words of their own for the second text encoder, and as embeddings of several chunks."""
    long, reading = "cow, (black:1.4), on [my] mud", {"long_prompts": True, "weighted": True}
    wanted = pipe(long, **OURS, **reading).images
    assert np.array_equal(face(long, **CALL, **reading).images, wanted)
    made = pipe.encode(long, **reading)
    assert made.states.shape == (1, 24, 36)
    given = {"prompt_embeds": made.states, "pooled_prompt_embeds": made.pooled}
    assert np.array_equal(face(**CALL, **given).images, wanted)
    mixed = pipe.encode("cat", second=long, **reading)
    wanted = pipe(mixed, **OURS, negative_prompt=pipe.encode("bad", second=long, **reading)).images
    words = {"negative_prompt": "bad", "negative_prompt_2": long}
    assert np.array_equal(face("cat", long, **CALL, **words, **reading).images, wanted)


def test_a_picture_to_start_from_has_diffusers_strength(pipe, face):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    call = {"num_inference_steps": 8}
    wanted = pipe("cat", **OURS | {"steps": 8}, image=image, strength=0.3).images
    assert np.array_equal(face("cat", **CALL | call, image=image).images, wanted)


def test_components(folder, face, one_device, compilations):
    wanted = face("cat", **CALL).images
    compilations.clear()
    again = SemanticStableDiffusionXLPipeline(**face.components)
    assert np.array_equal(again("cat", **CALL, return_dict=False)[0], wanted)
    assert not compilations
    again.text_encoder_2 = jax.tree.map(lambda leaf: leaf / 2, again.text_encoder_2)
    assert not np.array_equal(again("cat", **CALL).images, wanted)
    parts = {name: face.components[name] for name in ("unet", "vae", "text_encoder_2", "tokenizer", "tokenizer_2")}
    loaded = SemanticStableDiffusionXLPipeline.from_pretrained(
        folder, devices=face.pipeline.devices, add_watermarker=False, force_zeros_for_empty_prompt=False, **parts
    )
    assert (loaded.tokenizer, loaded.tokenizer_2) == (face.tokenizer, face.tokenizer_2)
    assert not loaded.components["force_zeros_for_empty_prompt"]
    empty = loaded("cat", **CALL).images
    assert np.array_equal(empty, face("cat", negative_prompt="", **CALL).images)
    assert not np.array_equal(empty, wanted)


def test_faces_of_other_kinds(folder, pipe, small, small_folder):
    with pytest.raises(TypeError, match=r"is of Stable Diffusion XL, expected Stable Diffusion 1.x or 2.x for"):
        SemanticStableDiffusionPipeline.from_pipe(pipe)
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion XL, expected Stable Diffusion 1.x or 2.x for"):
        SemanticStableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(TypeError, match="expected Stable Diffusion XL for SemanticStableDiffusionXLPipeline"):
        SemanticStableDiffusionXLPipeline.from_pipe(small)
    with pytest.raises(CheckpointError, match="expected Stable Diffusion XL for SemanticStableDiffusionXLPipeline"):
        SemanticStableDiffusionXLPipeline.from_pretrained(small_folder)


STATES, POOLED = np.zeros((1, 12, 36), np.float32), np.zeros((1, 12), np.float32)
NO_WORDS = {"prompt": None, "prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}
REFUSED = [
    ({"denoising_end": 0.8}, ValueError, "denoising_end=0.8 is not supported; it belongs to the refiner"),
    ({"clip_skip": 9}, ValueError, "clip_skip=9 should be from 0 to 1, by the number of the text encoder's layers"),
    ({"ip_adapter_image": STATES}, ValueError, "ip_adapter_image=.* is not supported; IP-Adapters"),
    ({"negative_original_size": (1, 2)}, ValueError, r"negative_original_size=\(1, 2\) is not supported; all branches"),
    ({"negative_crops_coords_top_left": (0, 1)}, ValueError, "negative_crops_coords_top_left=.* is not supported"),
    ({"callback_on_step_end": 3}, TypeError, "callback_on_step_end=3 should be a function of pipeline, step"),
    ({"cross_attention_kwargs": {"gain": 1}}, ValueError, "cross_attention_kwargs=.* is not supported; it should be"),
    ({"colour": 1}, TypeError, "colour is not an argument of SemanticStableDiffusionXLPipeline"),
    ({"prompt": None}, TypeError, "prompt=None should be words, or give prompt_embeds"),
    ({"generator": "3"}, TypeError, "generator='3' should be a seeded generator of torch, a seed"),
    ({"output_type": "pt"}, ValueError, "output_type='pt' is for tensors of torch; give 'np'"),
    ({"prompt_2": ["a", "b"]}, ValueError, "prompt_2 has 2 entries, expected 1, one each"),
    ({"prompt_2": 3}, TypeError, r"prompt_2=\[3\] should be words or a list"),
    ({"negative_prompt_2": "a"}, ValueError, "negative_prompt_2='a' without negative_prompt .* give both"),
    ({"prompt_embeds": STATES}, ValueError, "prompt and prompt_embeds were both given"),
    ({"pooled_prompt_embeds": POOLED}, ValueError, "prompt_2 and prompt_embeds or pooled_.* were both given"),
    (NO_WORDS | {"prompt_2": "a"}, ValueError, "prompt_2 and prompt_embeds or pooled_.* were both given"),
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


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_refused_before_anything_runs(face, monkeypatch, options, error, words):
    monkeypatch.setattr(type(face.pipeline.devices), "map", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(error, match=f"(?s){words}"):
        face(**{"prompt": "cat", "num_inference_steps": STEPS} | options)


def test_what_changes_nothing_in_diffusers_is_taken(face):
    harmless = {"denoising_end": 1.0, "clip_skip": None, "negative_crops_coords_top_left": (0, 0)}
    assert np.isfinite(face("cat", **CALL, **harmless, cross_attention_kwargs=None).images).all()


def test_refused_parts(folder, face):
    with pytest.raises(TypeError, match="tokenizer and tokenizer_2 belong together"):
        SemanticStableDiffusionXLPipeline.from_pretrained(folder, tokenizer=face.tokenizer)
    with pytest.raises(TypeError, match="add_watermarker=True is not supported: there is no watermark"):
        SemanticStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=True)
    with pytest.raises(TypeError, match="text_encoder_2=int should be a CLIPTextModelWithProjection"):
        face.text_encoder_2 = 3
    with pytest.raises(ValueError, match="second has 2 entries, expected 3"):
        face.pipeline.encode(["a", "b", "c"], second=["d", "e"])


def test_a_second_text_needs_a_second_text_encoder(small):
    for reading in ({}, {"weighted": True}, {"long_prompts": True}):
        with pytest.raises(TypeError, match=r"second is not an option of Stable Diffusion 1.x or 2.x"):
            small.encode("a", second="b", **reading)
