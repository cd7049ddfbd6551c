"""Tests the order, documentation and errors of the arguments in diffusers' interface."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax import (
    CheckpointError,
    SemanticIFPipeline,
    SemanticPaellaPipeline,
    SemanticStableDiffusionPipeline,
    SemanticStableDiffusionXLPipeline,
)
from sega_jax.diffusers_api.arguments import PipelineArguments
from sega_jax.method.arguments import arguments

EDITS = ["editing_prompt", "editing_prompt_embeddings", "reverse_editing_direction", "edit_guidance_scale"]
EDITS += ["edit_warmup_steps", "edit_cooldown_steps", "edit_threshold", "edit_momentum_scale", "edit_mom_beta"]
EDITS += ["edit_weights"]
OUTPUT = ["output_type", "return_dict", "callback", "callback_steps"]
# The positional arguments in order. diffusers has `generator` in place of `seed`.
POSITIONAL = {
    SemanticStableDiffusionPipeline: [
        *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"),
        *("num_images_per_prompt", "eta", "seed", "latents", *OUTPUT, *EDITS, "sem_guidance"),
    ],
    SemanticStableDiffusionXLPipeline: ["prompt", "prompt_2", "height", "width", "num_inference_steps"],
    SemanticIFPipeline: [
        *("prompt", "num_inference_steps", "timesteps", "guidance_scale", "negative_prompt", "num_images_per_prompt"),
        *("height", "width", "eta", "seed", "prompt_embeds", "negative_prompt_embeds", *OUTPUT, "clean_caption"),
    ],
    SemanticPaellaPipeline: [
        *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"),
        *("num_images_per_prompt", "seed", "latents", *OUTPUT),
    ],
}
CALL = {"num_inference_steps": 3, "output_type": "latent", "progress": False}


@pytest.fixture(scope="module")
def pipe(small):
    return SemanticStableDiffusionPipeline.from_pipe(small)


@pytest.mark.parametrize("kind", POSITIONAL, ids=lambda kind: kind.__name__)
def test_order_and_documentation_of_arguments(kind):
    """The signature and the documentation contain all arguments."""
    _, *parameters = inspect.signature(kind.__call__).parameters.values()
    positional = [
        parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == POSITIONAL[kind]
    names = {parameter.name for parameter in parameters}
    assert names >= set(arguments(PipelineArguments))
    assert all(f"\n    {name}: " in kind.__call__.__doc__ for name in names)


def test_arguments_by_position(pipe):
    named = {"guidance_scale": 5.0, "negative_prompt": "bad", "num_images_per_prompt": 2, "seed": 3, **CALL}
    expected = pipe(prompt="a cat", height=12, width=16, **named).images
    out = pipe("a cat", 12, 16, 3, 5.0, "bad", 2, 0.0, 3, None, "latent", progress=False)
    assert np.array_equal(out.images, expected)


def test_errors_in_edit_settings_use_diffusers_names(pipe):
    for value in (np.array(1.5), jnp.float32([1.5]), (1.5,), 1.5):
        with pytest.raises(ValueError, match=r"edit_threshold=1.5 should be a number in \[0, 1\]"):
            pipe("a cat", editing_prompt="hat", edit_threshold=value)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (["a cat"] * 26, {}, "26 positional arguments were given, expected at most 25"),
        (["a cat"], {"prompt": "a dog"}, "prompt was given both by position and by name"),
        (["a cat"], {"edit_warmup": 3}, "edit_warmup is not an argument of .*; did you mean edit_warmup_steps?"),
        (["a cat"], {"editing_prompt_embeddings": 3}, "editing_prompt_embeddings=3 should be a floating-point array"),
        (["a cat"], {"return_dict": 3}, "return_dict=3 should be True or False"),
    ],
)
def test_wrong_arguments_are_errors(pipe, args, options, message):
    with pytest.raises(TypeError, match=message):
        pipe(*args, **options)


def test_native_text_conditioning_replaces_words(pipe):
    call = {"editing_prompt": ["hat", "bow"], "edit_warmup_steps": 0, **CALL}
    expected = pipe(["a cat", "a dog"], negative_prompt="bad", **call).images
    prompts, negative, concepts = map(pipe.pipeline.encode, (["a cat", "a dog"], "bad", ["hat", "bow"]))
    texts = {"prompt_embeds": prompts, "negative_prompt_embeds": negative}
    assert np.array_equal(pipe(**call, **texts).images, expected)
    texts |= {"editing_prompt": None, "editing_prompt_embeddings": [concepts, concepts]}
    assert np.array_equal(pipe(**call | texts).images, expected)


def test_loading_options(small_folder, tmp_path):
    load = SemanticStableDiffusionPipeline.from_pretrained
    with pytest.raises(TypeError, match=r"low_cpu_mem is not an argument of .*; did you mean low_cpu_mem_usage"):
        load(tmp_path / "missing", low_cpu_mem=True)
    with pytest.raises(ValueError, match="attention='flash' should be one of xla, cudnn, pallas"):
        load(tmp_path / "missing", attention="flash")
    with pytest.raises(CheckpointError, match=r"expected DeepFloyd-IF's first stage or .* second stage for"):
        SemanticIFPipeline.from_pretrained(small_folder, text_encoder=None)
    assert load(small_folder, torch_dtype="torch.bfloat16", safety_checker=None).pipeline.dtype == jnp.bfloat16
