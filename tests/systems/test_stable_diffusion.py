"""Stable Diffusion: gradients through `generate`, and lowering at full size for other platforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.published import SD_1

from sega_jax import Edit, Edits
from sega_jax.method.schedules import from_config
from sega_jax.systems.base import Settings, Static
from sega_jax.systems.diffusion import DiffusionSettings, DiffusionStatic
from sega_jax.systems.programs import generate
from sega_jax.systems.stable_diffusion import SYSTEM, Models

# Compiling with optimisation would take longer.
QUICK = {"xla_backend_optimization_level": 0}
MULTISTEP = Static(own=DiffusionStatic("multistep"))


def settings(keys, edits):
    """Returns the settings for rows with guidance scale 7.5 and the given edits."""
    rows = len(keys)
    return Settings(keys, np.full(rows, 7.5), edits, own=DiffusionSettings(np.zeros(rows)))


def picture(models, ids, edits, table, shape):
    """Returns a function that maps the scales of a row's edits to a loss on the row's picture."""
    keys = jax.vmap(jax.random.key)(jnp.arange(1, dtype=jnp.uint32))

    def loss(scale):
        numbers = settings(keys, edits._replace(scale=scale))
        return jnp.square(generate(SYSTEM, models, ids, table, numbers, shape=shape, static=MULTISTEP)).mean()

    return loss


@pytest.mark.slow
def test_gradient_with_respect_to_an_edits_scale(least):
    """The gradient of a loss on the picture, through the decoder, loop and networks, equals central differences."""
    ids = least.tokenizer(["", "cat", "glasses", "hat"]).reshape(1, 4, -1)
    # With a threshold of 0, no value lies at the threshold, where the picture would jump.
    edits = Edits.stack([[Edit("glasses", threshold=0, warmup=0), Edit("hat", threshold=0, warmup=1)]])
    table = from_config(tiny.SCHEDULERS["DPM"]).table(3)
    with jax.enable_x64(True):
        models = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), least.models)
        loss, scale, step = picture(models, ids, edits, table, (6, 6, 4)), jnp.array([[4.0, -3.0]]), 1e-4
        value = jax.jit(loss, compiler_options=QUICK)
        slope = jax.jit(jax.grad(loss), compiler_options=QUICK)(scale)[0]
        shifts = step * jnp.eye(2)[:, None]
        differences = jnp.array([(value(scale + shift) - value(scale - shift)) / (2 * step) for shift in shifts])
    assert np.abs(slope).min() > 1e-6
    np.testing.assert_allclose(slope, differences, rtol=1e-5)


@pytest.mark.slow
def test_gradients_store_no_network_activations(least):
    """For each additional call, a gradient stores the loop's carry, but no network weights or activations."""
    ids, edits = least.tokenizer(["", "cat", "glasses"]).reshape(1, 3, -1), Edits.stack([[Edit("glasses")]])

    def memory(steps):
        table = from_config(tiny.SCHEDULERS["DPM"]).table(steps)
        gradient = jax.jit(jax.grad(picture(least.models, ids, edits, table, (8, 8, 4))), compiler_options=QUICK)
        return gradient.lower(jnp.ones((1, 1))).compile().memory_analysis().temp_size_in_bytes

    # The carry holds x, a momentum, and the solver's initial state and three previous outputs; each needs 1 KiB.
    assert memory(64) - memory(4) < 60 * 2 * 6 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "attention"), [("tpu", "pallas"), ("cuda", "xla")])
def test_stable_diffusion_lowers_for_other_platforms(platform, attention):
    half = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16))
    rows, edits = 2, Edits.stack([[Edit("a"), Edit("b")]] * 2)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    program = jax.jit(partial(generate, SYSTEM, shape=(64, 64, 4), static=MULTISTEP))
    traced = program.trace(
        half(Models.build(**SD_1, attention=attention)),
        jax.ShapeDtypeStruct((rows, 4, 77), jnp.int32),
        from_config(tiny.PNDM).table(50),
        settings(keys, edits),
    )
    assert traced.out_info.shape == (rows, 512, 512, 3)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "bf16" in text
    assert "f64" not in text
    assert ("tpu_custom_call" in text, "stablehlo.sort" in text) == (platform == "tpu", platform != "tpu")
