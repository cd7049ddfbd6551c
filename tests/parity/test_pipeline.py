"""Compares complete calls with diffusers' `SemanticStableDiffusionPipeline`, using the same initial and fresh noise.

The tests compare the latents, predictions and semantic guidance of every call, and the pictures.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import functools
import inspect

import diffusers
import numpy as np
import torch
from support import tiny

from parity import theirs
from parity.theirs import double, first, fresh, inject, last, noise, relative, schedule, stretch
from sega_jax import Edit, SemanticIFPipeline, SemanticStableDiffusionPipeline, SemanticStableDiffusionXLPipeline

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:the edit .* begins at:UserWarning", "ignore::DeprecationWarning"),
]

SEED = 7
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TWO = {"prompt": ["a cat", "dog"], "num_inference_steps": 10}
THREE = TWO | {
    "editing_prompt": ["glasses", "b", "cd"],
    "edit_guidance_scale": [4, 5.5, 6],
    "edit_threshold": [0.9, 0.5, 0.95],
    "edit_warmup_steps": [0, 2, 4],
    "edit_cooldown_steps": [5, 7, 9],
    "edit_weights": [1, 2, 0.5],
    "reverse_editing_direction": [False, True, False],
    "edit_momentum_scale": 0.3,
    "edit_mom_beta": 0.6,
}
ONE = TWO | {"editing_prompt": "glasses", "edit_warmup_steps": 2, "edit_threshold": 0.7, "edit_cooldown_steps": 8}
EIGHT = TWO | {
    "editing_prompt": ["a", "b", "c d", "e,", "f", "gh", "i", "j k l"],
    "edit_guidance_scale": [4, 5, 6, 7, 3, 2, 1, 0.5],
    "edit_threshold": [0.9, 0.8, 0.95, 0.7, 0.6, 0.5, 0.97, 0.85],
    "edit_warmup_steps": [0, 1, 2, 3, 4, 5, 6, 7],
    "edit_cooldown_steps": [9, 10, 8, 11, 7, 12, 9, 20],
    "edit_weights": [1, 2, 3, 0, 1, 0.5, 0.1, 1],
    "reverse_editing_direction": [True, False] * 4,
}
EDGES = {
    "edit_threshold": [0, 0.5, 1],
    "edit_weights": [0, 1, 3],
    "edit_warmup_steps": [0, 0, 1],
    "edit_cooldown_steps": [9, 4, 3],
    "edit_momentum_scale": 1.0,
    "edit_mom_beta": 0.0,
}
DEFAULTS = {"editing_prompt": ["glasses", "b", "cd"], "num_inference_steps": 14}
# {name: (checkpoint, scheduler, arguments of the call)}
CASES = {
    "no edits": ("1.x", tiny.DDIM, TWO),
    "no edits, with noise": ("1.x", tiny.DDIM, TWO | {"eta": 1.0, "guidance_scale": 2, "negative_prompt": ["e", "no"]}),
    "one": ("1.x", tiny.DDIM, ONE),
    "one, PNDM": ("1.x", tiny.PNDM, ONE),
    "three": ("1.x", tiny.DDIM, THREE),
    "three, default settings": ("1.x", tiny.DDIM, TWO | DEFAULTS),
    "three at the edges": ("1.x", tiny.DDIM, THREE | EDGES),
    "three, one never warm": (
        "1.x",
        tiny.DDIM,
        THREE | {"edit_warmup_steps": [1, 3, 99], "edit_cooldown_steps": None},
    ),
    "three, all cooled down": ("1.x", tiny.DDIM, THREE | {"edit_warmup_steps": 0, "edit_cooldown_steps": 4}),
    "three, without momentum": ("1.x", tiny.DDIM, THREE | {"edit_momentum_scale": 0.0}),
    "three, negative prompts": ("1.x", tiny.DDIM, THREE | {"negative_prompt": ["bad", "worse"], "guidance_scale": 3}),
    "three, with noise": ("1.x", tiny.DDIM, THREE | {"eta": 0.7}),
    "three, two pictures": ("1.x", tiny.DDIM, THREE | {"prompt": "a cat", "num_images_per_prompt": 2}),
    "three, trailing": ("1.x", tiny.DDIM | {"timestep_spacing": "trailing", "set_alpha_to_one": True}, THREE),
    "three, clipped": ("1.x", tiny.DDIM | {"clip_sample": True}, THREE | {"num_inference_steps": 4}),
    "three, PNDM": ("1.x", tiny.PNDM, THREE),
    "three, PNDM, linspace": ("1.x", tiny.PNDM | {"timestep_spacing": "linspace"}, THREE | {"num_inference_steps": 6}),
    "three, wide": ("1.x", tiny.DDIM, THREE | {"height": 16, "width": 24}),
    "eight": ("1.x", tiny.DDIM, EIGHT),
    **{
        f"three, {name}": ("1.x", config, THREE)
        for name, config in tiny.SCHEDULERS.items()
        if name not in ("DDIM", "PNDM")
    },
    "three, TCD with noise": ("1.x", tiny.FURTHER["TCD"], THREE | {"eta": 0.4}),
    "three, Karras sigmas": ("1.x", tiny.SCHEDULERS["DPM"] | {"use_karras_sigmas": True, "solver_type": "heun"}, THREE),
    "three, predicting x0": ("1.x", tiny.SCHEDULERS["UniPC"] | {"prediction_type": "sample"}, THREE),
    "three, zero terminal SNR": ("1.x", tiny.SCHEDULERS["Euler"] | V | ZERO_SNR, THREE | {"num_inference_steps": 8}),
    "SD 2.x, DPM": ("2.x", tiny.SCHEDULERS["DPM"] | V, THREE),
    "SD 2.x": ("2.x", tiny.DDIM | V, THREE),
    "SD 2.x, predicting noise": ("2.x", tiny.DDIM, THREE | {"eta": 0.2}),
    "SD 2.x, PNDM": ("2.x", tiny.PNDM | V, THREE),
}
# With these thresholds and numbers of positions, no value equals its quantile.
IN_DOUBLE = ["three", "three, with noise", "three, clipped", "three, PNDM", "SD 2.x"]
IN_DOUBLE += ["three, DPM", "three, DDPM", "three, Heun"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "1.x": tiny.checkpoint(folder / "1.x"),
        "2.x": tiny.checkpoint(folder / "2.x", unet=tiny.UNET_2, text=tiny.TEXT_2),
    }


@pytest.fixture(scope="module")
def both(folders, one_device):
    """Returns a function that loads a checkpoint into both our semantic pipeline and diffusers'."""
    return functools.cache(lambda name, dtype="float32": theirs.load(folders[name], dtype, one_device))


@pytest.mark.parametrize(
    ("ours", "reference", "same", "others"),
    [
        (SemanticStableDiffusionPipeline, diffusers.SemanticStableDiffusionPipeline, 25, {"prompt"}),
        (
            SemanticStableDiffusionXLPipeline,
            diffusers.StableDiffusionXLPipeline,
            5,
            {"callback_on_step_end_tensor_inputs"},
        ),
        # The stage determines the defaults for steps and guidance scale.
        (SemanticIFPipeline, diffusers.IFPipeline, 17, {"num_inference_steps", "guidance_scale"}),
    ],
)
def test_arguments(ours, reference, same, others):
    """Positional arguments have the same order as in diffusers, and all arguments have the same defaults."""
    mine, its = (inspect.signature(pipeline.__call__).parameters for pipeline in (ours, reference))
    positional = [name for name, one in mine.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional[1:] == ["seed" if name == "generator" else name for name in its][1 : same + 1]
    defaults = {name: one.default for name, one in its.items() if one.default is not inspect.Parameter.empty}
    del defaults["generator"]
    if ours is SemanticIFPipeline:
        del defaults["cross_attention_kwargs"]
    assert {name: mine[name].default for name in defaults.keys() - others} == {
        name: default for name, default in defaults.items() if name not in others
    }


def run(ours, reference, call, mine=None, its=None, scheduler=tiny.DDIM):
    """Runs a call in both pipelines. `mine` and `its` are additional arguments for our pipeline and diffusers'.

    Returns:
        Both outputs, and the arguments that both callbacks received at every call.
    """
    rows = len(call["prompt"]) if isinstance(call["prompt"], list) else call["num_images_per_prompt"]
    shape = ours.pipeline.latent_shape(call.get("height"), call.get("width"))
    latents, seen, expected = noise(rows, *shape), [], []
    schedule(ours, reference, scheduler)
    inject(reference.scheduler, fresh(range(SEED, SEED + rows), shape))
    steps = call["num_inference_steps"]
    if (calls := len(ours.pipeline.scheduler.table(steps).call)) > steps + 1:
        stretch(reference.scheduler, steps)
        its = {"num_inference_steps": calls} | (its or {})
    call = call | {"output_type": "np"}
    mine = {"latents": latents, "callback": lambda *step: seen.append(step), "seed": SEED} | (mine or {})
    its = {"latents": first(latents), "callback": lambda *step: expected.append(step)} | (its or {})
    return ours(**call, **mine, return_guidance=True), reference(**(call | its)), seen, expected


def check_pictures(a, b, seen, expected, end):
    np.testing.assert_allclose([t for _, t, _ in seen], [float(t) for _, t, _ in expected], rtol=1e-5, atol=1e-4)
    assert max(relative(x, last(y)) for (*_, x), (*_, y) in zip(seen, expected, strict=True)) < end
    assert (np.abs(a.images - b.images) > 2e-3).mean() <= 1e-3


def check_guidance(a, reference, one, end):
    """Compares the recorded arrays; the tolerance is `one` for the first call and `end` for all calls."""
    for name in ("uncond_estimates", "text_estimates", "edit_estimates", "sem_guidance"):
        ours, expected = getattr(a, name), getattr(reference, name)
        if expected is None or not expected.numel() or not expected.any():
            assert ours is None or not ours.any()
            continue
        expected = last(expected)
        assert not expected[len(ours) :].any()
        assert relative(ours, expected[: len(ours)]) < end
        if name != "sem_guidance":
            assert relative(ours[0], expected[0]) < one


def check(name, ours, reference, one, end):
    _, scheduler, call = CASES[name]
    a, *rest = run(ours, reference, call, scheduler=scheduler)
    check_pictures(a, *rest, end)
    check_guidance(a, reference, one, end)


@pytest.mark.parametrize("name", CASES)
def test_case(name, both):
    check(name, *both(CASES[name][0]), one=1e-5, end=3e-4)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_case_in_float64(name, both):
    pipelines = both(CASES[name][0], "float64")
    with double():
        check(name, *pipelines, one=1e-9, end=1e-9)


@pytest.mark.parametrize("scale", [1, 0.3])
def test_without_classifier_free_guidance(scale, both):
    check_pictures(*run(*both("1.x"), TWO | {"guidance_scale": scale}), end=3e-4)


def test_replayed_guidance(both):
    """Guidance that was recorded with edits is added to a call without edits."""
    ours, reference = both("1.x")
    a, *_ = run(ours, reference, THREE)
    a, *rest = run(ours, reference, TWO, {"sem_guidance": a.sem_guidance}, {"sem_guidance": reference.sem_guidance})
    check_pictures(a, *rest, end=3e-4)


def test_embedded_concepts(both):
    ours, reference = both("1.x")
    call = THREE | {"prompt": "a cat", "num_images_per_prompt": 2}
    embeddings = ours.pipeline.encode(call.pop("editing_prompt"))
    its = {"editing_prompt_embeddings": torch.tensor(embeddings.states)}
    a, *rest = run(ours, reference, call, {"editing_prompt_embeddings": embeddings}, its)
    check_pictures(a, *rest, end=3e-4)
    check_guidance(a, reference, one=1e-5, end=3e-4)


def test_pil_pictures(both):
    ours, reference = both("1.x")
    latents = noise(2, 8, 8, 4)
    schedule(ours, reference, tiny.DDIM)
    pictures = ours(**THREE, latents=latents).images
    expected = reference(**THREE, latents=first(latents)).images
    for a, b in zip(pictures, expected, strict=True):
        assert a.size == b.size
        assert a.mode == b.mode
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_rows_with_different_settings(both):
    """The rows of a call differ in text, scale, noise and number of concepts; the reference needs one call per row."""
    ours, reference = both("1.x")
    latents = noise(2, 8, 8, 4)
    schedule(ours, reference, tiny.DDIM)
    words, negatives, scales, etas, seeds = ["a cat", "dog"], ["bad", "worse"], [7.5, 3.0], [0.0, 0.6], [5, 90]
    edits = [
        [Edit("glasses", 4, 0.9, 0, 5), Edit("b", -5.5, 0.5, 2, 7, weight=2), Edit("cd", 6, 0.95, 4, weight=0.5)],
        [Edit("e", 7, 0.8, 3, 9, weight=3)],
    ]
    out = ours.pipeline(
        words,
        edits,
        negative_prompt=negatives,
        guidance_scale=scales,
        eta=etas,
        seed=seeds,
        latents=latents,
        steps=10,
        momentum_scale=0.3,
        momentum_beta=0.6,
        output="latent",
    )
    for row, concepts in enumerate(edits):
        schedule(ours, reference, tiny.DDIM)
        inject(reference.scheduler, fresh(seeds[row : row + 1], (8, 8, 4)))
        expected = reference(
            words[row],
            negative_prompt=negatives[row],
            guidance_scale=scales[row],
            eta=etas[row],
            latents=first(latents[row : row + 1]),
            num_inference_steps=10,
            editing_prompt=[edit.concept for edit in concepts],
            edit_guidance_scale=[edit.scale for edit in concepts],
            edit_threshold=[edit.threshold for edit in concepts],
            edit_warmup_steps=[edit.warmup for edit in concepts],
            edit_cooldown_steps=[99 if edit.cooldown is None else edit.cooldown for edit in concepts],
            edit_weights=[edit.weight for edit in concepts],
            edit_momentum_scale=0.3,
            edit_mom_beta=0.6,
            output_type="latent",
        ).images
        assert relative(out.images[row : row + 1], last(expected)) < 3e-4
