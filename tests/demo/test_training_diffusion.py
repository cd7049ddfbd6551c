"""Tests the recipe of the demo model: takes two training steps in each stage, stops, and resumes."""

import jax
import numpy as np
import pytest

import sega_jax
from sega_jax.demo.training.configs import DEMO
from sega_jax.demo.training.dataset import Dataset
from sega_jax.demo.training.diffusion import DiffusionTrainer, Plan, denoising
from sega_jax.method.schedules.spacing import cumulative

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNET = {
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "attention_head_dim": 1,
    "cross_attention_dim": 16,
}
VAE = {"block_out_channels": [4, 4, 4], "norm_num_groups": 2, "mid_block_add_attention": False}
SMALL = DEMO._replace(text_encoder=DEMO.text_encoder | TEXT, unet=DEMO.unet | UNET, vae=DEMO.vae | VAE)
PLAN = Plan(autoencoder_steps=2, autoencoder_batch=2, portraits=4, captions=2, steps=2, batch=2, chunk=1)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield


@pytest.mark.slow
def test_training_stops_and_resumes(tmp_path, one_device):
    lines = []
    # The time limit is reached at once, and the state is saved.
    assert not DiffusionTrainer(tmp_path, PLAN, configs=SMALL, minutes=0, say=lines.append).run()
    assert not (tmp_path / "model" / "unet").exists()
    assert DiffusionTrainer(tmp_path, PLAN, configs=SMALL, say=lines.append).run()
    assert lines[0] == "resuming from step 0"
    assert any("denoiser" in line for line in lines)
    pipe = sega_jax.load(tmp_path / "model", devices=one_device)
    assert pipe.models.vae.config.scaling_factor != 0.18215
    first = pipe("a portrait of a woman with glasses", [], steps=2, output="latent").images
    assert first.shape == (1, 32, 32, 4)
    # The training is finished. Nothing is trained again, and the model is the same.
    lines.clear()
    assert DiffusionTrainer(tmp_path, PLAN, configs=SMALL, say=lines.append).run()
    assert not any(line.startswith(("autoencoder", "denoiser")) for line in lines)
    again = sega_jax.load(tmp_path / "model", devices=one_device)
    for old, new in zip(jax.tree.leaves(pipe.models), jax.tree.leaves(again.models), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_loss_is_the_weighted_error_of_v():
    """A network that returns zeros has the weighted mean of v² as its loss, and v² has mean 1 for latents of variance
    1."""
    key = jax.random.key(3)
    latents = jax.random.normal(key, (1024, 8, 8, 4), np.float16)
    data = Dataset(np.zeros((1024, 10), np.int32), latents, np.zeros((1024, 2, 5), np.int16), np.zeros(5, np.int16))
    zeros = lambda x, timestep, text: 0 * x  # noqa: E731
    loss = denoising(4096, DEMO.scheduler)((lambda ids: ids, zeros), key, data)
    bars = cumulative(DEMO.scheduler)
    np.testing.assert_allclose(loss, np.minimum(1, 5 * (1 - bars)).mean(), rtol=0.01)
