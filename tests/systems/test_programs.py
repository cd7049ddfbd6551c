"""`generate`, the complete sampling of every family as one pure function: equality with the pipeline, and lowering."""

import jax
import numpy as np
import pytest

from sega_jax import Edit
from sega_jax.systems.registry import systems

EDITS = [[Edit("glasses", warmup=0, threshold=0.5)], [Edit("hat", scale=-4, warmup=1, cooldown=2)]]
COMMON = {"prompt": ["cat", "a dog"], "edits": EDITS, "steps": 3, "seed": 5}
RNG = np.random.default_rng(0)
SMALL = [RNG.random((8, 8, 3)), RNG.random((8, 8, 3))]
LARGE = [RNG.random((32, 32, 3)), RNG.random((32, 32, 3))]
NOISE = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
# {family's name and a description of the call: the pipeline's fixture and the arguments of the call}.
CALLS = {
    "stable_diffusion": ("least", {"negative_prompt": "bad", "guidance_rescale": 0.5}),
    "stable_diffusion from a picture": ("least", {"image": SMALL, "strength": 0.8}),
    "stable_diffusion with weighted words": (
        "least",
        {"prompt": ["a (cat:1.3)", "dog"], "weighted": True, "tiled": 4, "latents": NOISE},
    ),
    "sdxl": ("least_xl", {"original_size": (32, 16)}),
    "sdxl from a picture": ("least_xl", {"image": SMALL, "negative_prompt": "bad", "strength": 0.8}),
    "deepfloyd_stage_1": ("first", {}),
    "deepfloyd_stage_2": ("second", {"image": SMALL, "noise_level": 100}),
    "x4_upscaler": ("upscaler", {"image": LARGE}),
    "paella": ("paella", {"influence": (1.2, 0.4)}),
    "paella with states": ("paella", {"negative_prompt": RNG.standard_normal((3, 18)).astype(np.float32)}),
}


def call(name, request):
    fixture, options = CALLS[name]
    return request.getfixturevalue(fixture), COMMON | options


def parametrised(quick):
    """Returns all calls, and marks those that are not in `quick` as slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CALLS]


def test_every_family_is_covered():
    assert {name.split(" ")[0] for name in CALLS} == set(systems())


@pytest.mark.parametrize("name", parametrised(["sdxl"]))
def test_generate_equals_the_pipeline(name, request):
    """The tolerance is 5e-5 of a picture's range, because different programs round sums differently."""
    pipe, arguments = call(name, request)
    assert pipe.system.name == name.split(" ")[0]
    function, inputs = pipe.as_function(**arguments)
    actual = jax.jit(function)(**inputs)
    expected = pipe(**arguments, output="float").images
    np.testing.assert_allclose(actual, expected, atol=5e-5)


@pytest.mark.parametrize(
    "name", parametrised(["stable_diffusion from a picture", "sdxl", "deepfloyd_stage_1", "paella"])
)
def test_generate_lowers_for_other_platforms(name, request):
    pipe, arguments = call(name, request)
    function, inputs = pipe.as_function(**arguments)
    traced = jax.jit(function).trace(**inputs)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text
        assert "f64" not in text


@pytest.mark.parametrize(
    ("options", "named"),
    [({"record": True}, "record=True"), ({"callback": print}, "callback"), ({"output": "latent"}, "output='latent'")],
)
def test_outputs_other_than_pictures_are_rejected(least, options, named):
    with pytest.raises(ValueError, match=f"returns only pictures and does not support {named}; leave it out"):
        least.as_function("cat", **options)
