"""Guidance-distilled networks, such as LCM's, which take the guidance scale as an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from sega_jax import Edit, load
from sega_jax.diffusers_api import StableDiffusionPipeline
from sega_jax.nn.unet import guidance_embedding

STEP = {"steps": 1, "output": "latent", "progress": False}


@pytest.fixture(scope="module")
def lcm(tmp_path_factory, one_device):
    unet = tiny.UNET_1 | {"time_cond_proj_dim": 18}
    folder = tiny.checkpoint(tmp_path_factory.mktemp("lcm") / "tiny", unet=unet, scheduler=tiny.FURTHER["LCM"])
    return load(folder, devices=one_device)


@pytest.mark.slow
def test_edits_start_from_the_empty_text_at_the_same_scale(lcm):
    """At every guidance scale, the base is the prompt's prediction, because the scale is an input of the network."""
    x = np.random.default_rng(0).standard_normal((2, *lcm.latent_shape())).astype(np.float32)
    scales, edit = [2.0, 8.0], Edit("glasses", scale=5.0, threshold=0.8, warmup=0)
    out = lcm("a cat", edit, images_per_prompt=2, guidance_scale=scales, latents=x, record=True, **STEP)
    (row,) = (jax.tree.map(lambda column: column[0], lcm.scheduler.table(1)),)
    guidance = jnp.asarray(guidance_embedding(np.array(scales, np.float32), 18))
    states = jnp.asarray(lcm.encode(["", "a cat", "glasses"]).states)
    expected = lcm.models.unet(
        jnp.asarray(x), jnp.full(2, row.timestep, jnp.float32), jnp.concatenate([states] * 2), guidance=guidance
    ).reshape(2, 3, *x.shape[1:])
    for i, array in enumerate((out.record.uncond[:, 0], out.record.cond[:, 0], out.record.edits[:, 0, 0])):
        np.testing.assert_allclose(array, expected[:, i], atol=1e-5)
    assert out.record.sem_guidance.any()
    estimate = out.record.cond[:, 0] + out.record.sem_guidance[:, 0]
    x0 = row.solver.m_from_x * x + row.solver.m_from_output * estimate
    np.testing.assert_allclose(out.images, row.solver.x_from_memory[0] * x0 + row.solver.x_from_start * x, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"negative_prompt": "bad"}, "negative_prompt does not change the pictures: this network was distilled from"),
        ({"guidance_rescale": 0.7}, "guidance_rescale does not change the pictures: this network was distilled"),
        ({"guidance_scale": -2.0}, "guidance_scale=-2.0 is too low: this network was distilled .* give at least 1"),
    ],
)
def test_arguments_of_classifier_free_guidance_are_rejected(lcm, arguments, why):
    with pytest.raises(ValueError, match=why):
        lcm.prepare("a cat", **arguments)


def test_arguments_without_effect_warn_if_not_strict(lcm):
    with pytest.warns(UserWarning, match="negative_prompt does not change the pictures"):
        assert lcm.prepare("a cat", negative_prompt="bad", strict=False).negatives == [""]


def test_the_diffusers_api_raises_low_guidance_scales_to_1_with_a_warning(lcm):
    pipe = StableDiffusionPipeline.from_pipe(lcm)
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    with pytest.warns(UserWarning, match="guidance_scale=0.0 is raised to 1"):
        low = pipe("a cat", guidance_scale=0.0, generator=0, **settings)
    one = pipe("a cat", guidance_scale=1.0, generator=0, **settings)
    np.testing.assert_array_equal(low.images, one.images)


def test_empty_list_of_guidance_scales(lcm):
    with pytest.raises(ValueError, match="guidance_scale has 0 entries"):
        StableDiffusionPipeline.from_pipe(lcm)("a cat", guidance_scale=[], num_inference_steps=1)


def test_guidance_scale_is_an_input_of_the_network(lcm):
    batch = lcm.prepare(["a cat", "dog"], guidance_scale=[1.0, 8.0], negative_prompt=["", ""])
    np.testing.assert_array_equal(batch.settings.guidance_scale, 1)
    assert batch.settings.own.guidance.shape == (2, 18)
    np.testing.assert_array_equal(batch.settings.own.guidance[0], np.repeat([0, 1], 9))
