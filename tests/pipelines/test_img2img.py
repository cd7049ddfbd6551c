"""Calls that start from pictures: the first step, the noise, and invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from reference import oracle
from support import tiny

from sega_jax import Edit, Recommended, SemanticStableDiffusionPipeline
from sega_jax.method.schedules import from_config
from sega_jax.systems.latent_space import encode_image
from sega_jax.systems.programs import INITIAL, POSTERIOR

STEPS, STRENGTH, SEED = 5, 0.6, 3
BYTES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
EDITS = [Edit("a", scale=4, warmup=0, cooldown=2), Edit("b", scale=-3, warmup=1, threshold=0.5)]
BARS = np.cumprod(1 - np.linspace(tiny.DDIM["beta_start"] ** 0.5, tiny.DDIM["beta_end"] ** 0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def run(small):
    defaults = {"edits": EDITS, "image": BYTES, "strength": STRENGTH, "steps": STEPS, "seed": SEED}
    defaults |= {"output": "latent", "record": True}
    return lambda **options: small(["cat", "dog"], **defaults | options)


@pytest.fixture(scope="module")
def out(run):
    return run()


def close(found, wanted, tolerance=1e-5):
    assert np.linalg.norm(np.asarray(found) - wanted) <= tolerance * np.linalg.norm(wanted)


def test_a_plain_loop_gives_the_same_pictures(small, out):
    """The loop samples from the encoder's distribution with the rows' keys, adds the first step's noise, and runs
    DDIM."""
    keys = [jax.random.key(SEED + row) for row in range(2)]
    z = [[jax.random.normal(jax.random.fold_in(key, tag), (8, 8, 4)) for key in keys] for tag in (POSTERIOR, INITIAL)]
    mean, logvar = small.models.vae.encode(jnp.asarray(BYTES / np.float32(127.5) - 1))
    clean = (mean + np.exp(np.asarray(logvar) / 2) * z[0]) * small.models.vae.config.scaling_factor
    at = [401, 201, 1]
    assert out.record.cond.shape[1] == len(at)
    for row in range(2):
        x = np.sqrt(BARS[at[0]]) * clean[row] + np.sqrt(1 - BARS[at[0]]) * z[1][row]
        complete = [Recommended().edit(edit, len(at)) for edit in EDITS]
        settings = {name: [getattr(edit, name) for edit in complete] for name in vars(complete[0]) if name != "concept"}
        settings |= {"momentum_scale": [0.1] * 2, "momentum_beta": [0.4] * 2}
        uncond, cond, edits = (part[row].astype(float) for part in out.record[1:4])
        sem = oracle.guidance(uncond, edits, **settings, reverse=[False] * 2, semantics="diffusers")
        for t, guided in zip(at, uncond + 7.5 * (cond - uncond) + sem, strict=True):
            now, after = BARS[t], BARS[max(t - 200, 0)]
            x0 = (x - np.sqrt(1 - now) * guided) / np.sqrt(now)
            x = np.sqrt(after) * x0 + np.sqrt(1 - after) * guided
        close(out.images[row], x)


def test_all_forms_of_pictures(run, out, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, picture in zip(paths, BYTES, strict=True):
        Image.fromarray(picture).save(path)
    for image in ([Image.fromarray(picture) for picture in BYTES], list(BYTES), paths, list(map(str, paths))):
        assert np.array_equal(run(image=image).images, out.images)
    assert np.array_equal(run(image=BYTES[0]).images[0], out.images[0])
    assert not np.array_equal(run(image=BYTES[0]).images[1], out.images[1])


def test_latents_replace_the_noise(run, out):
    keys = [jax.random.key(SEED + row) for row in range(2)]
    latents = np.stack([jax.random.normal(jax.random.fold_in(key, INITIAL), (8, 8, 4)) for key in keys])
    close(run(latents=latents).images, out.images)


def test_the_diffusers_interface(small):
    call = {"image": BYTES[0], "strength": STRENGTH, "seed": SEED}
    face = SemanticStableDiffusionPipeline.from_pipe(small)("cat", num_inference_steps=STEPS, **call, output_type="np")
    assert np.array_equal(face.images, small("cat", steps=STEPS, **call, output="float").images)


def test_calls_after_compile_compile_nothing(small, compilations):
    call = {"image": BYTES[:1], "steps": STEPS, "output": "uint8"}
    assert "encode_image" in [program.name for program in small.compile("cat", Edit("hat", warmup=0), **call).programs]
    compilations.clear()
    small("dog", Edit("glasses", warmup=1), **call | {"strength": 0.4, "seed": 9})
    assert not compilations


@pytest.mark.slow
def test_the_distribution_of_latents(small):
    """Over many keys, the latents of one picture have the mean and standard deviation that the encoder predicts."""
    picture = jnp.asarray(BYTES[:1] / np.float32(127.5) - 1)
    mean, logvar = small.models.vae.encode(picture)
    scale = small.models.vae.config.scaling_factor
    keys = jax.random.split(jax.random.key(0), 40)
    drawn = encode_image(small.models.vae, keys, jnp.repeat(picture, 40, 0))
    assert drawn.dtype == np.float32
    off = (np.asarray(drawn) / scale - np.asarray(mean)) / np.exp(np.asarray(logvar) / 2)
    assert abs(off.mean()) < 0.02
    assert abs(off.std() - 1) < 0.02


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_strength_1_runs_the_complete_schedule(name):
    scheduler = from_config(tiny.SCHEDULERS[name])
    whole, again = scheduler.table(10), scheduler.table(10, 1.0)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_signal_and_noise_before_each_call(name):
    """The network's input has unit variance, and the noise decreases."""
    scheduler = from_config(tiny.SCHEDULERS[name])
    whole, late = scheduler.table(10), scheduler.table(10, 0.5)
    np.testing.assert_array_equal(late.call, np.arange(len(late.call)))
    np.testing.assert_allclose(late.timestep[-1], whole.timestep[-1])
    sigma = late.noise / late.signal
    assert (np.diff(sigma) <= 1e-12).all() or "Runge" in name
    scaled = late.input_scale * np.hypot(late.signal, late.noise)
    np.testing.assert_allclose(scaled, 1, rtol=1e-12)
    if name in ("DDIM", "PNDM", "PNDM, Runge-Kutta", "DDPM"):
        np.testing.assert_allclose((late.signal, late.noise), scheduler.shares(late.timestep.astype(int)))


@pytest.mark.parametrize("name", ["DPM", "UniPC", "PNDM"])
def test_solver_memory_starts_at_the_first_call_that_runs(name):
    """At the first call that runs, the solver has no previous results; at the second call, it has one."""
    late = from_config(tiny.SCHEDULERS[name] | {"solver_order": 3}, strict=False).table(10, 0.5).solver
    assert not late.x_from_memory[0, 1:].any()
    assert not late.start_from_start[0]
    assert not late.start_from_memory[0].any()
    assert late.x_from_memory[1, 1]
    assert not late.x_from_memory[1, 2:].any()


REFUSED = [
    ({"image": BYTES[0], "strength": 1.5}, ValueError, r"strength=1.5 should be a number in \[0, 1\]"),
    ({"image": BYTES[0], "strength": "a"}, TypeError, "strength='a' should be a number"),
    ({"image": BYTES[0], "strength": 0}, ValueError, "leaves 0 of 50 steps to run; use a strength of at least 0.02"),
    ({"image": BYTES[0], "strength": 0.01}, ValueError, "strength=0.01 leaves 0 of 50 steps to run"),
    ({"strength": 0.5}, ValueError, "strength=0.5 needs a picture to start from; give one as image"),
    ({"image": BYTES[0, :8]}, ValueError, "image has 8x16 pixels .*expected 16x16, .*give height=8 and width=16"),
    ({"image": BYTES[0], "height": 24}, ValueError, "image has 16x16 pixels .*, expected 24x16"),
    ({"image": BYTES}, ValueError, "image has 2 entries, expected 1"),
    ({"image": "nowhere.png"}, FileNotFoundError, "image='nowhere.png' does not exist"),
    ({"image": __file__}, ValueError, "cannot be read as a picture"),
    ({"image": 3}, TypeError, "image=3 should be a Pillow image, the path of an image file, or an array"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_invalid_arguments_are_rejected_before_anything_runs(small, monkeypatch, options, error, words):
    monkeypatch.setattr(type(small.devices), "map", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(error, match=words):
        small("cat", **options)
