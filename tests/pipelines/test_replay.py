"""Replayed guidance of every family: what an edited run recorded makes its pictures again, without the edits."""

import numpy as np
import pytest

from sega_jax import Edit, SemanticPaellaPipeline

EDITS = [Edit("glasses", warmup=0, threshold=0.5), Edit("hat", scale=-4, warmup=1, threshold=0.3)]
RNG = np.random.default_rng(0)
# By the fixture: the arguments of the call.
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
def test_a_record_makes_the_edited_picture_again(name, request):
    """All tokens of Paella; other states up to rounding, since each call adds the guidance in another order. Guidance
    of zeros is the picture without edits, which is another one."""
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
def test_the_face_of_paella_replays_its_own_record(paella):
    """Its record has calls first, and a tail of zeros is as good."""
    face = SemanticPaellaPipeline.from_pipe(paella)
    call = {"prompt": "cat", "num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    concepts = {"editing_prompt": ["glasses"], "edit_warmup_steps": 0, "edit_threshold": 0.5}
    edited = face(**call, **concepts, return_guidance=True)
    guidance = np.asarray(edited.sem_guidance)
    assert guidance.shape == (4, 1, 4, 4, 20)
    for given in (guidance, np.concatenate([guidance, np.zeros_like(guidance[:1])])):
        np.testing.assert_array_equal(face(**call, sem_guidance=given).images, edited.images)
    assert (face(**call, sem_guidance=np.zeros_like(guidance)).images != edited.images).any()
