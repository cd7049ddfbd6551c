"""Changing texts and settings after the first call compiles nothing."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.calls import CALL

from sega_jax import Edit, Pipeline
from sega_jax.pipelines.execution.devices import Devices

CHANGES = {
    "prompts": {"prompt": ["a bird", "fish"]},
    "negative prompts": {"negative_prompt": ["bad", "worse"]},
    "concepts": {"edits": [[Edit("x", warmup=1)], [Edit("y", warmup=1), Edit("z", warmup=1)]]},
    "bare embeddings": {"edits": [np.ones((12, 16), np.float32), "z"], "steps": 12},
    "embeddings": {"edits": [Edit(np.ones((12, 16), np.float32), warmup=1), Edit("z", warmup=1)]},
    "scales": {"edits": [Edit("a", scale=-7, warmup=1), Edit("b", scale=0, warmup=1)]},
    "thresholds": {"edits": [Edit("a", threshold=0, warmup=1), Edit("b", threshold=1, warmup=1)]},
    "warm-ups and cool-downs": {"edits": [Edit("a", warmup=0, cooldown=2), Edit("b", warmup=3, cooldown=None)]},
    "weights": {"edits": [Edit("a", weight=0.5, warmup=1), Edit("b", weight=0, warmup=1)]},
    "momentum of an edit": {"edits": [Edit("a", momentum_scale=0.5, momentum_beta=0, warmup=1), Edit("b", warmup=1)]},
    "momentum": {"momentum_scale": 0.9, "momentum_beta": 0.1},
    "seed": {"seed": 7},
    "seeds": {"seed": [8, 3]},
    "guidance scale": {"guidance_scale": 1},
    "guidance scales": {"guidance_scale": [1, 12]},
    "eta": {"eta": 1.0},
    "etas": {"eta": [0, 0.5]},
    "one step": {"steps": 1, "edits": [Edit("a", warmup=0), Edit("b", warmup=0)]},
    "many steps": {"steps": 130},
    "pictures of one prompt": {"prompt": "cat", "images_per_prompt": 2, "edits": [Edit("a"), Edit("b")], "steps": 12},
    "a callback": {"callback": lambda *_: None, "callback_steps": 3},
    "pictures": {"output": "pil"},
}


@pytest.fixture(scope="module")
def called(small):
    small(**CALL)
    return small


@pytest.mark.parametrize("change", CHANGES)
def test_changed_arguments_compile_nothing(called, compilations, change):
    called(**CALL | CHANGES[change])
    assert not compilations


def test_latents_of_another_dtype_compile_nothing(called, compilations):
    called(**CALL, latents=np.ones((2, 8, 8, 4), np.float32))
    compilations.clear()
    for dtype in (np.float16, np.float64):
        called(**CALL, latents=np.ones((2, 8, 8, 4), dtype))
    assert not compilations


def test_changed_arguments_change_the_pictures(called):
    first = called(**CALL).images
    for name in CHANGES.keys() - {"a callback", "pictures"}:
        assert not np.array_equal(called(**CALL | CHANGES[name]).images, first), name


def test_the_fixture_counts_compilations(compilations, small, one_device):
    program = jax.jit(lambda x: x * 2)
    program(np.ones(3))
    assert len(compilations) == 1
    program(np.zeros(3))
    assert len(compilations) == 1
    program(np.ones(4))
    assert len(compilations) == 2
    Pipeline(**small.components | {"devices": Devices(one_device)}).encode(["a"])
    assert len(compilations) == 3


SECOND = """
import sys, jax, sega_jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
sega_jax.load(sys.argv[1], devices=jax.local_devices()[:1]).compile("cat", ["hat"], steps=2)
print(*(events.count(f"cache_{found}") for found in ("hits", "misses")))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(small_folder, tmp_path):
    """JAX_COMPILATION_CACHE_DIR turns the cache on; JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 makes it include
    programs that compile in under a second."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run = [sys.executable, "-c", SECOND, str(small_folder)]
    first, second = (
        list(map(int, subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.split()))
        for _ in range(2)
    )
    assert first[1] > first[0] == 0
    assert second == [first[1], 0]
