"""The argument `clip_skip`; tests/parity/test_clip_skip.py compares it with diffusers."""

import numpy as np
import pytest

from sega_jax import ClipText, Edit, Pipeline
from sega_jax.pipelines.texts import joined_branches


def test_cached_embeddings_depend_on_the_layer(small, compilations):
    """All values of `clip_skip` share a program, but each has its own cached embeddings, whatever the order of the
    calls."""
    fresh = Pipeline(**small.components)
    layers = [fresh.encode("a hat", clip_skip=skip).states for skip in (1, 2)]
    programs = len(compilations)
    again = [fresh.encode("a hat", clip_skip=skip).states for skip in (2, 1)]
    assert len(compilations) == programs
    assert all(np.array_equal(one, other) for one, other in zip(layers, reversed(again), strict=True))
    states = [*layers, fresh.encode("a hat").states, small.encode("a hat", clip_skip=0).states]
    assert np.array_equal(states[2], states[3])
    assert all(np.abs(states[i] - states[k]).max() > 0.1 for i, k in ((0, 1), (0, 2), (1, 2)))
    encoder = small.models.text_encoder
    ids = small.tokenizer(["a hat"])
    np.testing.assert_allclose(states[1], encoder.final_layer_norm(encoder.embeddings(ids)), atol=1e-5)


def test_negative_prompts_keep_their_layer(small):
    """Prompts and concepts skip layers, but negative prompts do not."""
    batch = small.prepare("cat", Edit("hat"), negative_prompt="cat", clip_skip=1)
    text = joined_branches(small, batch, 1)
    skipped = small.encode(["cat", "hat"], clip_skip=1).states
    np.testing.assert_allclose(text.states[0], [small.encode("cat").states[0], *skipped], atol=1e-6)


def test_padding_skips_layers_like_the_prompt(small):
    long = "a b c d e f g h i j k l"
    states = small.encode([long, "cat"], clip_skip=1, long_prompts=True).states
    assert np.array_equal(states[1, 12:], small.encode("", clip_skip=1).states[0])


def test_invalid_numbers_of_layers(small, least_xl):
    """Stable Diffusion XL never reads the last layer, so its maximum `clip_skip` is lower by 1."""
    for pipe, most in ((small, 2), (least_xl, 1)):
        message = rf"clip_skip={most + 1} should be from 0 to {most} for this text encoder"
        with pytest.raises(ValueError, match=message):
            pipe.prepare("cat", clip_skip=most + 1)
        with pytest.raises(ValueError, match=message):
            pipe.encode("cat", clip_skip=most + 1)
        pipe.prepare("cat", clip_skip=most)
    embedding = ClipText(np.zeros((1, 12, 16), np.float32))
    with pytest.raises(ValueError, match="clip_skip=3 should be from 0 to 2"):
        small.prepare(embedding, negative_prompt=embedding, clip_skip=3)
    with pytest.raises(ValueError, match="clip_skip=-1 should be at least 0"):
        small.prepare("cat", clip_skip=-1)
    with pytest.raises(TypeError, match=r"clip_skip=1\.5 should be a whole number"):
        small.encode("cat", clip_skip=1.5)


@pytest.mark.parametrize("name", ["small", pytest.param("least_xl", marks=pytest.mark.slow)])
def test_padding_of_negative_prompts_skips_no_layers(name, request):
    """A short negative prompt is padded to the length of a long prompt."""
    pipe, long = request.getfixturevalue(name), " ".join("abcdefgh" * 3)
    seen = {}
    for skip in (0, 1):
        batch = pipe.prepare(long, long_prompts=True, clip_skip=skip, negative_prompt="a", steps=1)
        seen[skip] = np.asarray(joined_branches(pipe, batch, 0).states)
    np.testing.assert_allclose(seen[0][:, 0], seen[1][:, 0], atol=1e-5)
    assert np.abs(seen[0][:, 1] - seen[1][:, 1]).max() > 0.01
