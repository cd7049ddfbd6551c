"""Invalid calls are rejected before anything runs, both in the native interface and in the diffusers interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax import Edit, SemanticStableDiffusionPipeline
from sega_jax.pipelines.execution.devices import Devices

LATENTS = np.zeros((1, 8, 8, 4), np.float32)
EMBEDDING = np.zeros((12, 16), np.float32)
NAN = float("nan")


@pytest.fixture
def idle(pipe, monkeypatch):
    """Returns a pipeline whose programs fail if they run."""

    def refuse(*args, **kwargs):
        raise AssertionError("a program ran")

    monkeypatch.setattr(Devices, "map", refuse)
    return pipe


def with_nan(array):
    array = np.array(array)
    array.flat[-1] = NAN
    return array


PROMPTS = [
    ({"prompt": 3}, TypeError, "prompt=3 should be a string"),
    ({"prompt": None}, TypeError, "prompt=None should be"),
    ({"prompt": []}, TypeError, r"prompt=\[\] should be a string, text conditioning, or a non-empty list"),
    ({"prompt": ["a", 1]}, TypeError, r"prompt=\['a', 1\] should be a string"),
    ({"prompt": b"cat"}, TypeError, "prompt=b'cat' should be a string"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt has 2 entries, expected 1"),
    ({"negative_prompt": []}, TypeError, r"negative_prompt=\[\] should be a string, text conditioning, or a non"),
    ({"negative_prompt": 3}, TypeError, "negative_prompt=3 should be a string"),
    ({"negative_prompt": [None]}, TypeError, "negative_prompt=.* should be a string"),
]
NOISE = [
    ({"seed": -1}, ValueError, "seed=-1 should be from 0 to"),
    ({"seed": 2**32}, ValueError, "seed=4294967296 should be from 0 to"),
    ({"seed": 1.5}, TypeError, "seed=1.5 should be a whole number"),
    ({"seed": True}, TypeError, "seed=True should be a whole number"),
    ({"seed": "1"}, TypeError, "seed='1' should be a whole number"),
    ({"seed": [1, 2]}, ValueError, "seed has 2 entries, expected 1, one for each pic"),
    ({"seed": [[1]]}, TypeError, r"seed=\[1\] should be a whole number"),
    ({"seed": np.array([0.5])}, TypeError, "seed=.* should be a whole number"),
    ({"seed": jax.random.key(0)}, TypeError, "seed=.* should be a whole number"),
    ({"key": 3}, TypeError, "key=3 should be a JAX key"),
    ({"key": np.zeros(2, np.uint32)}, TypeError, "key=.* should be a JAX key"),
    ({"key": jnp.zeros(2)}, TypeError, "key=.* should be a JAX key"),
    ({"key": jnp.zeros(3, jnp.uint32)}, TypeError, "key=.* should be a JAX key"),
    ({"key": jax.random.split(jax.random.key(0))}, ValueError, r"key has shape \(2,\), expected a single key"),
    ({"key": jax.random.key(0), "seed": 1}, ValueError, "seed and key were both given"),
    ({"latents": LATENTS[0]}, ValueError, r"latents have shape \(8, 8, 4\), expected \(1, 8, 8, 4\)"),
    ({"latents": np.repeat(LATENTS, 2, 0)}, ValueError, r"expected \(1, 8, 8, 4\) \(pictures, height, width"),
    ({"latents": LATENTS.transpose(0, 3, 1, 2)}, ValueError, "move the channels of latents to the last axis"),
    ({"latents": with_nan(LATENTS)}, ValueError, "latents have NaN or infinite entries"),
    ({"latents": with_nan(LATENTS).astype(jnp.bfloat16)}, ValueError, "latents have NaN or infinite entries"),
    ({"latents": np.full(LATENTS.shape, np.inf)}, ValueError, "latents have NaN or infinite entries"),
    ({"latents": LATENTS.astype(int)}, TypeError, "latents=.* should be a floating-point array"),
    ({"latents": LATENTS.astype(complex)}, TypeError, "latents=.* should be a floating-point array"),
    ({"latents": LATENTS.astype(object)}, TypeError, "latents=.* should be a floating-point array"),
    ({"latents": [[1.0], [1.0, 2.0]]}, TypeError, "latents=.* should be a floating-point array"),
    ({"latents": "noise"}, TypeError, "latents='noise' should be a floating-point array"),
]
SIZES = [
    ({"height": 15}, ValueError, "height=15 is not a multiple of 2, .*; try 14"),
    ({"width": 1}, ValueError, "width=1 is not a multiple of 2, .*; try 2"),
    ({"height": -16}, ValueError, "height=-16 should be from 1 to"),
    ({"width": 16.0}, TypeError, "width=16.0 should be a whole number"),
    ({"width": "16"}, TypeError, "width='16' should be a whole number"),
]
SETTINGS = [
    ({"eta": -0.1}, ValueError, r"eta=-0.1 should be a number in \[0, 1\]"),
    ({"eta": 1.1}, ValueError, r"eta=1.1 should be a number in \[0, 1\]"),
    ({"eta": "0"}, TypeError, "eta='0' should be a number"),
    ({"eta": [0.5, 0.5]}, ValueError, "eta has 2 entries, expected 1"),
    ({"guidance_scale": NAN}, ValueError, "guidance_scale=nan should be a finite number"),
    ({"guidance_scale": np.inf}, ValueError, "guidance_scale=inf should be a finite number"),
    ({"guidance_scale": "7"}, TypeError, "guidance_scale='7' should be a finite number"),
    ({"guidance_scale": None}, TypeError, "guidance_scale=None should be a finite number"),
    ({"guidance_scale": True}, TypeError, "guidance_scale=True should be a finite number"),
    ({"guidance_scale": [7.0, 8.0]}, ValueError, "guidance_scale has 2 entries, expected 1"),
    ({"guidance_scale": [NAN]}, ValueError, "guidance_scale=nan should be a finite number"),
    ({"guidance_scale": [1.0, [2.0]]}, TypeError, "guidance_scale=.* should be a finite number"),
    ({"callback": 3}, TypeError, "callback=3 should be a function"),
    ({"callback_steps": 0}, ValueError, "callback_steps=0 should be at least 1"),
    ({"callback_steps": 1.5}, TypeError, "callback_steps=1.5 should be a whole number"),
    ({"callback_steps": None}, TypeError, "callback_steps=None should be a whole number"),
]
NATIVE = [
    ({"images_per_prompt": 0}, ValueError, "images_per_prompt=0 should be from 1 to 65536"),
    ({"images_per_prompt": 1.0}, TypeError, "images_per_prompt=1.0 should be a whole number"),
    ({"images_per_prompt": 2, "negative_prompt": ["a"] * 3}, ValueError, "expected 1, one for each prompt, or 2, one"),
    ({"images_per_prompt": 2, "seed": [1, 2, 3]}, ValueError, "seed has 3 entries, expected 2"),
    ({"images_per_prompt": 2, "latents": LATENTS}, ValueError, r"expected \(2, 8, 8, 4\)"),
    ({"steps": 0}, ValueError, "steps=0 should be at least 1"),
    ({"steps": 10.0}, TypeError, "steps=10.0 should be a whole number"),
    ({"steps": 1000}, ValueError, "use fewer steps"),
    ({"output": "png"}, ValueError, "output='png' should be one of pil, uint8, float, latent"),
    ({"output": None}, ValueError, "output=None should be one of pil, uint8, float, latent"),
    ({"semantics": "paper"}, ValueError, "semantics='paper' should be one of diffusers, per_concept"),
    ({"support": "row"}, ValueError, "support='row' should be one of channel, latent, pixel"),
    ({"momentum_scale": 1.5}, ValueError, r"momentum_scale=1.5 should be a number in \[0, 1\]"),
    ({"momentum_scale": None}, TypeError, "momentum_scale=None should be a number"),
    ({"momentum_beta": -0.5}, ValueError, r"momentum_beta=-0.5 should be a number in \[0, 1\]"),
    ({"momentum_beta": "0.4"}, TypeError, "momentum_beta='0.4' should be a number"),
    ({"edits": 3}, TypeError, "edits=3 should be a list of strings and Edits"),
    ({"edits": None}, TypeError, "edits=None should be a list of strings and Edits"),
    ({"edits": [3]}, TypeError, "edits: 3 should be a string or an Edit"),
    ({"edits": [EMBEDDING[0]]}, ValueError, "Edit: concept has shape"),
    ({"edits": {"a": 1}}, TypeError, "edits=.* should be a list of strings and Edits"),
    ({"edits": ["a", ["b"]]}, TypeError, "edits mixes lists with single edits"),
    ({"rows_at_once": 0}, ValueError, "rows_at_once=0 should be at least 1"),
    ({"rows_at_once": 1.5}, TypeError, "rows_at_once=1.5 should be a whole number"),
    ({"tiled": 12}, ValueError, "tiled=12 is not a multiple of 8; try 8"),
    ({"tiled": "yes"}, TypeError, "tiled='yes' should be a whole number"),
    ({"guidance_rescale": 1.5}, ValueError, r"guidance_rescale=1.5 should be a number in \[0, 1\]"),
    ({"guidance_rescale": [0.5, 0.5]}, ValueError, "guidance_rescale has 2 entries, expected 1"),
    ({"edits": [["a"], ["b"]]}, ValueError, "edits has 2 entries, expected 1, one for each"),
    ({"edits": [["a", None]]}, TypeError, "edits: None should be a string or an Edit"),
    ({"edits": Edit("a", warmup=3, cooldown=3)}, ValueError, "'a' ends at cooldown=3, before it begins at warmup=3"),
    ({"edits": Edit(EMBEDDING[:5])}, ValueError, r"embedding has shape \(5, 16\), expected \(12, 16\)"),
    ({"edits": Edit(EMBEDDING.T)}, ValueError, r"expected \(12, 16\) \(tokens, channels\)"),
    ({"replay": LATENTS}, ValueError, r"replay has shape \(1, 8, 8, 4\), expected \(1, calls, 8, 8, 4\)"),
    ({"replay": LATENTS[:, None].repeat(2, 0)}, ValueError, r"replay has shape \(2, 1, 8, 8, 4\), expected \(1, calls"),
    ({"replay": np.zeros((1, 0, 8, 8, 4))}, ValueError, "replay has shape"),
    ({"replay": with_nan(LATENTS[:, None])}, ValueError, "replay has NaN or infinite entries"),
    ({"replay": np.full((1, 1, 8, 8, 4), "a")}, (TypeError, ValueError), "replay"),
    ({"replay": [[1.0], [1.0, 2.0]]}, (TypeError, ValueError), "replay"),
]
FACE = [
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt=0 should be from 1 to 65536"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 should be at least 1"),
    ({"num_inference_steps": 50.0}, TypeError, "steps=50.0 should be a whole number"),
    ({"output_type": "pt"}, ValueError, "output_type='pt' .* is not supported; use 'np' for arrays"),
    ({"output_type": ["np"]}, (TypeError, ValueError), "output_type=.* should be one of pil, np, latent"),
    ({"editing_prompt": 5}, TypeError, "editing_prompt=5 should be a string"),
    ({"editing_prompt": ["a", 1]}, TypeError, r"editing_prompt=\['a', 1\] should be a string"),
    ({"editing_prompt": [["a"]]}, TypeError, "editing_prompt=.* should be a string"),
    ({"editing_prompt_embeddings": EMBEDDING}, ValueError, r"expected \(n, tokens, channels\) or"),
    ({"editing_prompt_embeddings": [EMBEDDING, EMBEDDING[0]]}, (TypeError, ValueError), "editing_prompt_embeddings"),
    ({"editing_prompt_embeddings": EMBEDDING[None, :5]}, ValueError, r"expected \(12, 16\)"),
    ({"editing_prompt_embeddings": np.zeros((2, 1, 12, 16))}, ValueError, "has 2 entries, expected 1"),
    ({"edit_guidance_scale": [5]}, ValueError, "edit_guidance_scale has 1 entries for 2 concepts"),
    ({"reverse_editing_direction": (True,)}, ValueError, "reverse_editing_direction has 1 entries for 2"),
    ({"reverse_editing_direction": "no"}, TypeError, "reverse_editing_direction=.* should be True or False"),
    ({"reverse_editing_direction": [0, 1]}, TypeError, "reverse_editing_direction=.* should be True or False"),
    ({"edit_warmup_steps": np.array([1])}, ValueError, "edit_warmup_steps has 1 entries for 2"),
    ({"edit_warmup_steps": -1}, ValueError, "edit_warmup_steps=-1 should be at least 0"),
    ({"edit_warmup_steps": "1"}, TypeError, "edit_warmup_steps='1' should be a whole number"),
    ({"edit_warmup_steps": NAN}, TypeError, "edit_warmup_steps=nan should be a whole number"),
    ({"edit_cooldown_steps": [None]}, ValueError, "edit_cooldown_steps has 1 entries for 2"),
    ({"edit_threshold": [0.9, 1.9]}, ValueError, r"edit_threshold=1.9 should be a number in \[0, 1\]"),
    ({"edit_weights": [1, -1]}, ValueError, "edit_weights=-1 should be a number of at least 0; to remove"),
    ({"edit_weights": [1]}, ValueError, "edit_weights has 1 entries for 2"),
    ({"edit_guidance_scale": "5"}, TypeError, "edit_guidance_scale='5' should be a finite number"),
    (
        {"edit_guidance_scale": "5", "reverse_editing_direction": True},
        TypeError,
        "edit_guidance_scale='5' should be a finite number",
    ),
    ({"edit_guidance_scale": [5, [5]]}, TypeError, r"edit_guidance_scale=\[5\] should be a finite number"),
    ({"edit_momentum_scale": 2}, ValueError, "edit_momentum_scale=2 should be"),
    ({"edit_mom_beta": "a"}, TypeError, "edit_mom_beta='a' should be"),
    ({"sem_guidance": 0.5}, (TypeError, ValueError), "sem_guidance|replay"),
    ({"sem_guidance": LATENTS}, ValueError, "sem_guidance|replay"),
    ({"sem_guidance": [LATENTS, LATENTS[0]]}, (TypeError, ValueError), "sem_guidance|replay"),
]


def check(call, options, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call(**{"prompt": "cat"} | options)


def label(case):
    return ",".join(case[0])


@pytest.mark.parametrize("case", [*PROMPTS, *NOISE, *SIZES, *SETTINGS, *NATIVE], ids=label)
def test_native_calls(idle, case):
    check(idle, *case)


@pytest.mark.parametrize("case", [*PROMPTS, *NOISE, *SIZES, *SETTINGS, *FACE], ids=label)
def test_calls_of_the_diffusers_interface(idle, case):
    options, *expected = case
    words = {} if {"editing_prompt", "editing_prompt_embeddings"} & options.keys() else {"editing_prompt": ["a", "b"]}
    check(SemanticStableDiffusionPipeline.from_pipe(idle), words | {"edit_warmup_steps": 0} | options, *expected)


@pytest.mark.parametrize(
    ("scale", "effect"), [(0, "=0 ignores"), (0.5, "=0.5 weakens"), ([7.0, 0.99], "=0.99 weakens")]
)
def test_guidance_scales_below_1(idle, scale, effect):
    """Scales below 1 raise errors here; the diffusers interface accepts them and, like diffusers, uses the conditional
    prediction."""
    with pytest.raises(ValueError, match=f"guidance_scale{effect} the prompt; give 1 to turn off classifier-free"):
        idle(["cat", "dog"], guidance_scale=scale)


@pytest.mark.parametrize(
    ("name", "entry"), [("negative_prompt", "a"), ("guidance_scale", 1.0), ("eta", 0.5), ("edits", ["a"])]
)
def test_numbers_of_entries_between_prompts_and_pictures(idle, name, entry):
    with pytest.raises(ValueError, match=f"{name} has 3 entries, expected 2, one for each prompt, or 4, one"):
        idle(["cat", "dog"], images_per_prompt=2, **{name: [entry] * 3})


def test_one_text_equals_a_list_of_one_text(small, least_xl):
    for pipe in (small, least_xl):
        assert np.array_equal(pipe.tokenizer("a cat"), pipe.tokenizer(["a cat"]))
