"""Compares semantic guidance in DeepFloyd-IF's stages with a plain torch loop that uses the same noise.

The tests compare the pictures, and the predictions and guidance of every call.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import contextlib
import functools

import diffusers
import jax
import numpy as np
import torch
from support import tiny

import sega_jax
from parity import if_loops
from parity.if_loops import Text
from parity.theirs import double, fresh, precision, relative
from sega_jax import Edit

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

SEEDS, STEPS, LEVEL = [3, 8], 8, 250
INITIAL, SMALL = 2**32 - 1, 2**32 - 2
PROMPTS, NEGATIVES = ["a cat at", "dog,"], ["bad", ""]
PICTURES = np.random.default_rng(1).random((2, 8, 8, 3))
NOISING = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
KINDS = {"1": (diffusers.IFPipeline, tiny.STAGE_1), "2": (diffusers.IFSuperResolutionPipeline, tiny.STAGE_2)}
# The edits have different warm-ups and cool-downs, and one of them removes its concept.
EDITS = {
    "one": [Edit("smile", scale=6, threshold=0.8, warmup=2)],
    "three": [
        Edit("smile", scale=6, threshold=0.8, warmup=1),
        Edit("a hat", scale=-4, threshold=0.95, warmup=3, cooldown=6, weight=0.5),
        Edit("snow", scale=2, threshold=0.0, warmup=5),
    ],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_device):
    """Returns a function that loads a stage into both our pipeline and diffusers'."""
    folder = tmp_path_factory.mktemp("stages")

    @functools.cache
    def load(name, dtype):
        theirs, unet = KINDS[name]
        if not (folder / name).is_dir():
            tiny.stage(folder / name, unet)
        with jax.enable_x64(dtype == "float64"):
            ours = sega_jax.load(folder / name, dtype=dtype, devices=one_device)
        return ours, theirs.from_pretrained(folder / name, watermarker=None).to(dtype=getattr(torch, dtype))

    return load


def on_small(shape, call=0):
    """Returns the noise that our pipeline adds to the small pictures of rows with `SEEDS`. By default, all calls use
    the same noise."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SMALL), call) for seed in SEEDS]
    return np.stack([jax.random.normal(key, shape, precision()) for key in keys])


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize(("dtype", "end"), [("float32", 3e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("name", KINDS)
def test_edits(name, dtype, end, edits, both):
    check(name, dtype, end, edits, both)


def test_new_noise_on_the_small_picture_at_every_call(both):
    """The original code draws new noise for the small picture at every call."""
    check("2", "float64", 1e-9, "one", both, every_call=True)


def check(name, dtype, end, edits, both, every_call=False):
    ours, reference = both(name, dtype)
    with double() if dtype == "float64" else contextlib.nullcontext():
        shape = ours.latent_shape()
        draw = fresh(SEEDS, shape)
        # Both libraries use our text encoder, so that the test compares only the loops.
        concepts = [edit.concept for edit in EDITS[edits]]
        small = {} if name == "1" else {"image": PICTURES, "noise_level": LEVEL, "noise_anew": every_call}
        call = {"steps": STEPS, "guidance_scale": 3.0}
        output = ours(
            PROMPTS,
            EDITS[edits],
            negative_prompt=NEGATIVES,
            seed=SEEDS,
            output="float",
            record=True,
            momentum_scale=0.3,
            momentum_beta=0.6,
            **call,
            **small,
        )
        more = {}
        if name == "2":
            noises = [on_small((*shape[:2], 3), call) for call in range(STEPS if every_call else 1)]
            more = {"picture": 2 * PICTURES - 1, "noising": NOISING, "level": LEVEL, "level_noises": noises}
        run = (if_loops.first_stage if name == "1" else if_loops.second_stage)(
            reference.unet,
            ours.scheduler.config,
            Text(ours.encode(NEGATIVES).states, ours.encode(PROMPTS).states),
            draw(INITIAL),
            [draw(i) for i in range(STEPS)],
            edits=[
                Edit(vector, e.scale, e.threshold, e.warmup, e.cooldown, e.weight)
                for vector, e in zip(ours.encode(concepts).states, EDITS[edits], strict=True)
            ],
            momentum=(0.3, 0.6),
            **call,
            **more,
        )
    assert relative(output.images, np.clip(run.x / 2 + 0.5, 0, 1)) < end
    for field in ("uncond", "cond", "edits"):
        assert relative(getattr(output.record, field), getattr(run, field)) < end
    # In float32, a value near its threshold may fall on either side, and momentum carries the difference to later
    # calls.
    off = (np.abs(output.record.sem_guidance - run.sem_guidance) > 2e-3).mean()
    assert off <= (5e-3 if dtype == "float32" else 0)
    assert dtype == "float32" or relative(output.record.sem_guidance, run.sem_guidance) < end
    assert np.abs(run.sem_guidance[:, 5:]).max() > 0.1
