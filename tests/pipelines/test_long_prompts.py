"""Calls with long prompts and weighted words."""

import numpy as np
import pytest

from sega_jax import ClipText, Edit
from sega_jax.method.naming import Option, as_options
from sega_jax.text.prompt_weights import Reading, chunks

LONG = "a cat, black, on a mat"  # 17 letters and commas, each of which is one token; a chunk has room for 10


def test_weights_that_are_not_numbers(small):
    with pytest.raises(ValueError, match=r"the weight '1\.2\.3' in 'a \(b:1\.2\.3\)' is not a number; write"):
        small("a (b:1.2.3)", weighted=True, steps=1)


def test_short_texts_do_not_change(small):
    call = {"edits": [Edit("c", warmup=0)], "steps": 2, "output": "latent", "seed": 4}
    expected = small("a (cat)", **call).images
    assert np.array_equal(small("a (cat)", long_prompts=True, **call).images, expected)
    weighted = small("a (cat)", weighted=True, **call).images
    assert not np.array_equal(weighted, expected)
    assert np.array_equal(small("a \\(cat\\)", weighted=True, **call).images, expected)


@pytest.mark.slow
def test_embeddings_of_long_texts(small):
    found = small.encode([LONG, "a (b:1.5)"], long_prompts=True, weighted=True).states
    assert found.shape == (2, 24, 16)
    read = chunks(small.tokenizer, LONG, Reading(long=True))
    np.testing.assert_allclose(found[0].reshape(2, 12, 16), small.models.text_encoder(read.ids), atol=1e-5)
    one = chunks(small.tokenizer, "a (b:1.5)", Reading(weighted=True))
    state = np.asarray(small.models.text_encoder(one.ids))[0] * one.weights[0][:, None]
    plain = np.asarray(small.models.text_encoder(one.ids))[0]
    np.testing.assert_allclose(found[1, :12], state * plain.mean() / state.mean(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1, 12:], small.encode("").states[0], atol=1e-6)


@pytest.mark.slow
def test_a_call_with_long_texts_equals_a_call_with_their_embeddings(small):
    """Prompts, negative prompts and concepts have different lengths."""
    call = {"steps": 2, "output": "latent", "seed": 4}
    texts = {"prompt": ["cat", LONG], "negative_prompt": ["(bad:1.3)", ""]}
    found = small(**texts, edits=[Edit(LONG[::-1], warmup=0)], long_prompts=True, weighted=True, **call).images
    read = {name: list(small.encode(words, long_prompts=True, weighted=True)) for name, words in texts.items()}
    read["negative_prompt"] = [ClipText(one.states[:, :12]) for one in read["negative_prompt"]]  # without padding
    concept = small.encode(LONG[::-1], long_prompts=True)[0]
    assert np.array_equal(small(**read, edits=[Edit(concept, warmup=0)], **call).images, found)
    rest = small("cat", [Edit(concept, warmup=0)], **call).images
    assert np.isfinite(rest).all()


def test_truncation_warns_at_the_callers_line(small):
    with pytest.warns(UserWarning, match="cut from the end of 'a cat, black, on a mat'") as caught:
        small(LONG, weighted=True, steps=1, output="latent")
    assert caught[0].filename == __file__
    assert str(caught[0].message).endswith("; give long_prompts=True to read all of it, or shorten it")


def test_truncation_names_the_option_in_the_shell(small):
    options = {"long_prompts": Option("--long-prompts")}
    with as_options(options), pytest.warns(UserWarning, match="; give --long-prompts to read all of it, or shorten it"):
        small.encode(LONG)


def test_invalid_arguments(small, first):
    for options, error, words in (
        ({"long_prompts": 1}, TypeError, "long_prompts=1 should be True or False"),
        ({"weighted": "yes"}, TypeError, "weighted='yes' should be True or False"),
        ({"edits": np.zeros((13, 16), np.float32)}, ValueError, r"embedding has shape \(13, 16\), expected \(12, 16\)"),
    ):
        with pytest.raises(error, match=words):
            small("cat", **options)
    with pytest.raises(TypeError, match="weighted is not an argument of a call of DeepFloyd-IF's first stage"):
        first("cat", weighted=True)
    for options, words in (
        ({"long_prompts": 1}, "long_prompts=1 should be True or False"),
        ({"weighted": "false"}, "weighted='false' should be True or False"),
    ):
        with pytest.raises(TypeError, match=words):
            small.encode("cat", **options)


STATES = np.zeros((1, 12, 16), np.float32)
NO_TEXTS = [
    (ClipText(None), TypeError, r"=ClipText\(states=None\) should hold arrays with one row for each text"),
    (ClipText([1.0]), TypeError, r"=ClipText\(states=list\) should hold arrays with one row for each text"),
    (ClipText(np.float32(1)), TypeError, r"=ClipText\(states=float32\[\]\) should hold arrays with one row"),
    (ClipText(STATES[:0]), ValueError, r"=ClipText\(states=float32\[0, 12, 16\]\) holds no texts"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), NO_TEXTS)
def test_texts_without_rows(wrong, error, words, small):
    for name, call in (
        ("prompt", {"prompt": wrong}),
        ("prompt", {"prompt": [wrong]}),
        ("negative_prompt", {"prompt": "cat", "negative_prompt": wrong}),
    ):
        with pytest.raises(error, match=f"{name}{words}"):
            small(**call, steps=1)
    with pytest.raises(error, match=rf"edits{words}|Edit: concept=ClipText\(.*\) should be a floating-point array"):
        small("cat", [wrong], steps=1)


def test_an_array_without_texts(small):
    with pytest.raises(ValueError, match=r"prompt has shape \(0, 12, 16\) and holds no texts; give at least one"):
        small(STATES[:0], steps=1)
