"""Replaying recorded guidance in every family gives the edited pictures without the edits."""

import numpy as np
import pytest

from sega_jax import Edit, SemanticPaellaPipeline

EDITS = [Edit("glasses", warmup=0, threshold=0.5), Edit("hat", scale=-4, warmup=1, threshold=0.3)]
RNG = np.random.default_rng(0)
# {fixture: arguments of the call}
CALLS = {
    "paella": {"output": "tokens"},
    "least_xl": {"output": "latent", "original_size": (32, 16)},
    "first": {"output": "latent"},
    "second": {"output": "latent", "image": RNG.random((8, 8, 3)), "noise_level": 100},
    "upscaler": {"output": "latent", "image": RNG.random((32, 32, 3))},
}


@pytest.mark.parametrize(
    "name", [name if name == "paella" else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_replay_gives_the_edited_picture(name, request):
    """Paella's tokens are equal. The results of other families differ by rounding, because guidance is added in a
    different order. Replaying zeros gives the unedited picture, which differs from the edited one."""
    pipe, call = request.getfixturevalue(name), {"prompt": "cat", "steps": 4, "seed": 3} | CALLS[name]
    edited = pipe(edits=EDITS, record=True, **call)
    guidance = edited.record.sem_guidance
    again = pipe(replay=guidance, **call).images
    plain = pipe(replay=np.zeros_like(guidance), **call).images
    if name == "paella":
        assert again.dtype == np.int32
        np.testing.assert_array_equal(again, edited.images)
        assert (again != plain).any()
    else:
        assert np.linalg.norm(again - edited.images) < 1e-4 * np.linalg.norm(edited.images)
        assert np.linalg.norm(plain - edited.images) > 1e-2 * np.linalg.norm(edited.images)


@pytest.mark.slow
def test_replay_in_the_diffusers_interface_of_paella(paella):
    """In this interface, the first axis of a record counts the calls. A record may end with zeros."""
    face = SemanticPaellaPipeline.from_pipe(paella)
    call = {"prompt": "cat", "num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    concepts = {"editing_prompt": ["glasses"], "edit_warmup_steps": 0, "edit_threshold": 0.5}
    edited = face(**call, **concepts, return_guidance=True)
    guidance = np.asarray(edited.sem_guidance)
    assert guidance.shape == (4, 1, 4, 4, 20)
    for given in (guidance, np.concatenate([guidance, np.zeros_like(guidance[:1])])):
        np.testing.assert_array_equal(face(**call, sem_guidance=given).images, edited.images)
    assert (face(**call, sem_guidance=np.zeros_like(guidance)).images != edited.images).any()
