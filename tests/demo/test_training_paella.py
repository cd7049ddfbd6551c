"""Tests the recipe of the small Paella model: takes two training steps in each stage, and checks the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sega_jax
from sega_jax.demo.training.dataset import Dataset
from sega_jax.demo.training.paella import BYTES, SMALL, VALUES, PaellaTrainer, Plan, lattice, naming
from sega_jax.nn.vqgan import VectorQuantize

TINY = SMALL._replace(
    byt5=SMALL.byt5 | {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    denoiser=SMALL.denoiser
    | {"c_in": 4, "c_out": 4, "c_cond": 8, "c_hidden": (8,), "nhead": (2,), "blocks": (1,), "level_config": ("CTA",)}
    | {"byt5_embd": 8},
    vqgan=SMALL.vqgan | {"bottleneck_blocks": 1, "c_hidden": 8},
)
PLAN = Plan(
    autoencoder_steps=2, autoencoder_batch=2, portraits=4, captions=2, reading_steps=2, steps=2, batch=2, chunk=2
)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield


@pytest.mark.slow
def test_training_writes_a_loadable_model(tmp_path, one_device):
    lines = []
    trainer = PaellaTrainer(tmp_path, PLAN, configs=TINY, say=lines.append)
    assert trainer.run()
    assert [line.split()[0] for line in lines] == ["vqgan", "4", "tokens", "byt5", "denoiser"]
    pipe = sega_jax.load(tmp_path / "model", devices=one_device)
    np.testing.assert_array_equal(pipe.models.vqgan.vquantizer.codebook.embedding[...], lattice())
    normal = pipe.models.vqgan.down_blocks[-1][1]
    assert (normal.running_mean[...] == 0).all()
    assert (normal.running_var[...] == 1).all()
    out = pipe("a portrait of a woman with glasses", [], steps=1, output="uint8")
    assert out.images.shape == (1, 128, 128, 3)


def test_the_lattice_is_a_codebook():
    """All entries are distinct, and each entry is the nearest one to its own vector."""
    codes = lattice()
    assert len(np.unique(codes, axis=0)) == VALUES**4
    net = jax.tree.map(lambda _: jnp.asarray(codes), VectorQuantize(*codes.shape))
    np.testing.assert_array_equal(net(codes * np.float32(1.1)), np.arange(VALUES**4))


def test_the_loss_compares_with_the_clean_tokens():
    """A network that repeats its noisy input is right where a token was kept, and at chance level where the token was
    replaced. The mean probability of replacement is the mean of 1 - u⁴, which is 4 / 5."""
    labels, confidence = 7, 50.0

    class Net:
        condition = staticmethod(lambda states, mask: None)

        def __call__(self, noisy, level, text):
            return confidence * jax.nn.one_hot(noisy, labels)

    jax.tree_util.register_static(Net)
    tokens = jax.random.randint(jax.random.key(1), (64, 8, 8), 0, labels).astype(np.int16)
    data = Dataset(np.zeros((64, 10), np.int32), tokens, np.ones((64, 2, BYTES), np.int16), np.ones(BYTES, np.int16))
    loss = naming(4096, labels)((jax.tree_util.Partial(lambda ids, mask: ids), Net()), jax.random.key(3), data)
    np.testing.assert_allclose(loss, confidence * 4 / 5 * (1 - 1 / labels), rtol=0.02)
