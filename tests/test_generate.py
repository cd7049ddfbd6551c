"""`generate`, the whole way as one pure function: equal to the pipeline, and lowered for other platforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from published import SD_1

from sega_jax import Edit, Edits
from sega_jax.schedules import from_config
from sega_jax.systems.stable_diffusion import Method, Models, Settings, generate


def test_equals_the_pipeline(pipe):
    edits = [[Edit("glasses", warmup=1)], [Edit("hat", scale=-4, warmup=2, cooldown=3)]]
    expected = pipe(["cat", "dog"], edits, steps=4, seed=5, output="float").images
    ids = pipe.tokenizer(["", "cat", "glasses", "", "dog", "hat"]).reshape(2, 3, -1)
    keys = jax.vmap(jax.random.key)(jnp.arange(5, 7, dtype=jnp.uint32))
    settings = Settings(keys, np.full(2, 7.5), np.zeros(2), Edits.stack(edits))
    whole = jax.jit(partial(generate, shape=pipe.latent_shape(), method=Method("ddim")))
    np.testing.assert_allclose(whole(pipe.models, ids, pipe.scheduler.table(4), settings), expected, atol=2e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_stable_diffusion_lowers_for_other_platforms(platform):
    half = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16))
    rows, edits = 2, Edits.stack([[Edit("a"), Edit("b")]] * 2)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    program = jax.jit(partial(generate, shape=(64, 64, 4), method=Method("multistep")))
    traced = program.trace(
        half(Models.build(**SD_1)),
        jax.ShapeDtypeStruct((rows, 4, 77), jnp.int32),
        from_config(tiny.PNDM).table(50),
        Settings(keys, np.full(rows, 7.5), np.zeros(rows), edits),
    )
    assert traced.out_info.shape == (rows, 512, 512, 3)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "bf16" in text
    assert "f64" not in text
