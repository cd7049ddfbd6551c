"""Concept vectors: guidance that is recorded, saved, added, scaled and replayed on other pictures."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sega_jax import Edit, SemanticStableDiffusionPipeline, load_guidance, save_guidance

DTYPES = [np.float32, np.float16, jnp.bfloat16, np.float64]
STEPS = 4


@pytest.fixture(scope="module")
def vectors(small):
    """Returns the recorded guidance for two concepts, each applied alone to the same picture."""
    made = [
        small("cat", Edit(word, warmup=0, threshold=0.5), steps=STEPS, output="latent", record=True).record.sem_guidance
        for word in ("a", "b")
    ]
    assert made[0].shape == (1, STEPS, 8, 8, 4)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_and_loading(vectors, tmp_path, dtype):
    array, path = vectors[0].astype(dtype), tmp_path / "a.safetensors"
    save_guidance(path, array, {"prompt": "cat", "edit": "ä"})
    found = load_guidance(str(path))
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"prompt": "cat", "edit": "ä"}
    save_guidance(path, jnp.asarray(vectors[1]))
    assert np.array_equal(load_guidance(path), vectors[1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_replay_in_any_dtype(small, vectors, dtype):
    """Replaying guidance on its original picture gives the edited picture, up to rounding in the record's dtype."""
    edited = small("cat", Edit("a", warmup=0, threshold=0.5), steps=STEPS, output="latent").images
    again = small("cat", replay=vectors[0].astype(dtype), steps=STEPS, output="latent").images
    precision = float(jnp.finfo(dtype).eps)
    assert np.linalg.norm(again - edited) / np.linalg.norm(edited) < 10 * max(precision, 1e-6)


@pytest.mark.slow
def test_arithmetic(small, vectors):
    """At the first call, where all runs see the same latents, the effect of guidance is linear."""

    def moved(replay):
        out = small("dog", replay=replay, steps=1, seed=3, output="latent").images
        return out - small("dog", steps=1, seed=3, output="latent").images

    a, b = vectors
    np.testing.assert_allclose(moved(a + b), moved(a) + moved(b), atol=1e-5)
    np.testing.assert_allclose(moved(-0.5 * a), -0.5 * moved(a), atol=1e-5)
    assert np.abs(moved(a)).max() > 0.01


def test_one_record_for_all_pictures_or_one_for_each(small, vectors):
    a, b = vectors
    one = small(["dog", "cow"], replay=a, steps=STEPS, seed=[3, 4], output="latent").images
    each = small(["dog", "cow"], replay=np.concatenate([a, a]), steps=STEPS, seed=[3, 4], output="latent").images
    other = small(["dog", "cow"], replay=np.concatenate([a, b]), steps=STEPS, seed=[3, 4], output="latent").images
    assert np.array_equal(one, each)
    assert np.array_equal(other[0], one[0])
    assert not np.allclose(other[1], one[1], atol=1e-3)


def test_other_dtypes_and_lengths_compile_nothing(small, vectors, compilations):
    small("dog", replay=vectors[0], steps=STEPS, output="latent")
    compilations.clear()
    for dtype in DTYPES:
        small("dog", replay=vectors[0][:, :2].astype(dtype), steps=STEPS, output="latent")
    assert not compilations


def test_replay_with_an_edit(small, vectors):
    """The new record contains only the edit's guidance."""
    edit = Edit("b", warmup=0, threshold=0)
    out = small("cat", edit, replay=vectors[0], steps=1, output="latent", record=True)
    alone = small("cat", edit, steps=1, output="latent", record=True)
    np.testing.assert_allclose(out.record.sem_guidance, alone.record.sem_guidance, atol=1e-5)
    assert not np.allclose(out.images, alone.images, atol=1e-3)


def test_the_diffusers_interface_takes_calls_first(small, vectors):
    face = SemanticStableDiffusionPipeline.from_pipe(small)
    calls = np.moveaxis(vectors[0], 1, 0)
    tail = np.concatenate([calls, np.zeros_like(calls[:1])])
    call = {"prompt": "cat", "num_inference_steps": STEPS, "output_type": "latent"}
    first, *others = (face(**call, sem_guidance=g).images for g in (calls, tail, list(calls), jnp.bfloat16(calls)))
    assert np.array_equal(first, others[0])
    assert np.array_equal(first, others[1])
    np.testing.assert_allclose(first, others[2], atol=0.05)


def test_the_diffusers_interface_rejects_native_axes(small, vectors):
    face = SemanticStableDiffusionPipeline.from_pipe(small)
    with pytest.raises(
        ValueError, match=r"sem_guidance has shape \(1, 4, 8, 8, 4\), expected \(calls, rows, .* 1 rows"
    ):
        face("cat", num_inference_steps=2, sem_guidance=vectors[0])


def test_byte_orders_and_values_beyond_float32(small, vectors):
    swapped = vectors[0].astype(vectors[0].dtype.newbyteorder())
    call = {"prompt": "cat", "steps": 2, "output": "latent"}
    assert np.array_equal(small(**call, replay=swapped).images, small(**call, replay=vectors[0]).images)
    with pytest.raises(ValueError, match="replay has entries outside the range of float32"):
        small(**call, replay=vectors[0].astype(np.float64) + 1e300)


def test_a_folder_with_the_files_name(tmp_path, vectors):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="x"):
        save_guidance(tmp_path / "x", vectors[0])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(ValueError, match="cannot be read as guidance"):
        load_guidance(tmp_path / "x")


@pytest.mark.parametrize(
    ("guidance", "error", "words"),
    [
        (np.zeros((4, 8, 8, 4), np.float32), ValueError, r"has shape \(4, 8, 8, 4\), expected \(pictures, calls"),
        (np.zeros((1, 2, 3, 4, 5), int), TypeError, "should be a floating-point array"),
        (np.full((1, 2, 3, 4, 5), np.nan), ValueError, "NaN or infinite"),
        ("vector", TypeError, "should be a floating-point array"),
    ],
)
def test_invalid_guidance(tmp_path, guidance, error, words):
    with pytest.raises(error, match=words):
        save_guidance(tmp_path / "x.safetensors", guidance)
    assert not list(tmp_path.iterdir())


def test_invalid_notes(tmp_path, vectors):
    for about in ({"steps": 3}, "a castle"):
        with pytest.raises(TypeError, match="should map strings to strings"):
            save_guidance(tmp_path / "x.safetensors", vectors[0], about)


def test_invalid_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        load_guidance(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read as guidance"):
        load_guidance(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="contains no guidance"):
        load_guidance(path)
    save_file({"sem_guidance": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"has shape \(3,\), expected"):
        load_guidance(path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 4, 8, 8), "expected"), ((3, 4, 8, 8, 4), "shared by all pictures"), ((1, 0, 8, 8, 4), "expected")],
)
def test_replay_of_invalid_shapes(small, shape, words):
    with pytest.raises(ValueError, match=words):
        small(["cat", "dog"], replay=np.zeros(shape, np.float32), steps=2)
