"""The argument `noise`, which replaces the noise that a call draws from its seeds, and the noise in records."""

import dataclasses

import jax
import numpy as np
import pytest
from support import tiny

from sega_jax import Edit, Pipeline
from sega_jax.method.schedules import from_config
from sega_jax.systems.programs import INITIAL, LOW_RES, POSTERIOR

pytestmark = pytest.mark.usefixtures("one_by_default")

SEEDS, OTHERS, STEPS = [3, 8], [11, 12], 3
EDIT = Edit("hat", warmup=1, threshold=0.5)
DRAWN = {"steps": STEPS, "record": True, "record_noise": True, "progress": False}
ANCESTRAL = tiny.SCHEDULERS["Euler"] | {"_class_name": "EulerAncestralDiscreteScheduler"}
BYTES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)


def normal(tag, shape, *more):
    """Returns the normal noise that the rows draw from SEEDS."""
    keys = [jax.random.fold_in(jax.random.key(seed), tag) for seed in SEEDS]
    for number in more:
        keys = [jax.random.fold_in(key, number) for key in keys]
    return np.stack([np.asarray(jax.random.normal(key, shape)) for key in keys])


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def again(pipe, out, initial, **call):
    """Repeats a call with different seeds, but with the noise that the first call drew."""
    call = call | {"steps": STEPS, "seed": OTHERS, "noise": out.record.noise, "progress": False}
    return pipe(["cat", "dog"], EDIT, **call, **initial).images


def check(pipe, initial, **call):
    out = pipe(["cat", "dog"], EDIT, seed=SEEDS, **call, **DRAWN)
    assert out.record.noise.shape == (STEPS, 2, *out.record.cond.shape[2:])
    assert all(np.std(noise) > 0.3 for noise in out.record.noise[:-1])
    assert relative(again(pipe, out, initial, **call), out.images) < 1e-5
    shifted = dataclasses.replace(out, record=out.record._replace(noise=out.record.noise[::-1]))
    assert relative(again(pipe, shifted, initial, **call), out.images) > 1e-2


@pytest.mark.parametrize(
    ("config", "call"), [(tiny.DDIM, {"eta": [1.0, 0.5]}), (ANCESTRAL, {})], ids=["DDIM", "ancestral"]
)
def test_noise_of_stochastic_solvers(least, config, call):
    pipe = Pipeline(**least.components)
    pipe.scheduler = from_config(config)
    check(pipe, {"latents": normal(INITIAL, pipe.latent_shape())}, output="latent", **call)


@pytest.mark.slow
def test_noise_with_a_learned_variance(first):
    check(first, {"latents": normal(INITIAL, first.latent_shape())}, output="float")


@pytest.mark.slow
@pytest.mark.parametrize("anew", [False, True])
def test_noise_of_an_upscaling_stage(second, anew):
    size = second.latent_shape()[:2]
    small = [normal(LOW_RES, (*size, 3), call if anew else 0) for call in range(STEPS)]
    initial = {"latents": normal(INITIAL, (*size, 3)), "image_noise": np.stack(small) if anew else small[0]}
    pictures = np.random.default_rng(1).random((2, size[0] // 4, size[1] // 4, 3), np.float32)
    check(second, initial, output="float", image=pictures, noise_anew=anew)


def test_noise_of_a_picture_to_start_from(small):
    shape = small.latent_shape()
    call = {"image": BYTES, "strength": 0.5, "steps": 4, "output": "latent", "progress": False}
    latents, words = {"latents": normal(INITIAL, shape)}, ["cat", "dog"]
    expected = small(words, EDIT, seed=SEEDS, **call).images
    made = small(words, EDIT, seed=OTHERS, image_noise=normal(POSTERIOR, shape), **latents, **call).images
    assert relative(made, expected) < 1e-5
    assert relative(small(words, EDIT, seed=OTHERS, **latents, **call).images, expected) > 1e-3


@pytest.mark.slow
def test_noise_of_tokens(paella):
    pipe = paella
    grid = np.random.default_rng(0).integers(0, 20, (2, *pipe.latent_shape()[:2]))
    call = {"tokens": grid, "output": "tokens"}
    out = pipe(["cat", "dog"], EDIT, seed=SEEDS, **call, **DRAWN)
    gumbel, uniform = out.record.noise
    assert gumbel.shape == (STEPS, 2, *pipe.latent_shape())
    assert uniform.shape == gumbel.shape[:-1]
    # The seeds stay the same, because the prior also draws from them.
    seeds = {"seed": SEEDS, "steps": STEPS, "progress": False}
    np.testing.assert_array_equal(
        pipe(["cat", "dog"], EDIT, noise=out.record.noise, **seeds, **call).images, out.images
    )
    other = pipe(["cat", "dog"], EDIT, noise=(gumbel[::-1], uniform), **seeds, **call).images
    assert (other != out.images).any()


def test_different_numbers_of_calls_share_a_program(first, compilations):
    shape = first.latent_shape()
    rng = np.random.default_rng(0)
    for steps in (2, 5):
        noise = rng.standard_normal((steps, 1, *shape), np.float32)
        first("cat", steps=steps, noise=noise, output="latent", progress=False)
        compiled, compilations[:] = len(compilations), []
    assert not compiled


def test_invalid_noise(least, first, second):
    shape = least.latent_shape()
    noise = np.zeros((STEPS, 1, *shape), np.float32)
    with pytest.raises(ValueError, match="noise needs a solver that adds noise at model calls"):
        least("cat", steps=STEPS, noise=noise)
    with pytest.raises(ValueError, match="record_noise=True needs a solver that adds noise"):
        least("cat", steps=STEPS, record=True, record_noise=True)
    with pytest.warns(UserWarning, match="it is ignored"):
        least.prepare("cat", steps=STEPS, noise=noise, strict=False)
    with pytest.raises(ValueError, match="record_noise=True needs a record; give record=True as well"):
        least("cat", record_noise=True)
    with pytest.raises(ValueError, match=r"noise has shape \(3, 2, 8, 8, 4\), expected \(3, 1, 8, 8, 4\)"):
        least("cat", steps=STEPS, eta=1.0, noise=np.zeros((3, 2, 8, 8, 4)))
    with pytest.raises(ValueError, match="noise has NaN or infinite entries"):
        least("cat", steps=STEPS, eta=1.0, noise=noise * np.nan)
    with pytest.raises(ValueError, match="image_noise needs a picture to start from"):
        least("cat", image_noise=noise[0])
    with pytest.raises(ValueError, match=r"image_noise has shape .*expected \(1, 32, 32, 3\)"):
        second("cat", image=np.zeros((8, 8, 3)), image_noise=np.zeros((1, 8, 8, 3)))
    with pytest.raises(TypeError, match="image_noise is not an argument of a call of DeepFloyd-IF's first stage"):
        first("cat", image_noise=noise[0])
