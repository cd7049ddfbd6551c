"""Stable Diffusion XL with long texts and word weights: both text encoders, the pooled embedding, and padding."""

import warnings

import numpy as np
import pytest

import sega_jax
from sega_jax import Edit, SDXLText
from sega_jax.text.prompt_weights import Reading, chunks

LONG = "cow, black, on my mud"  # 17 tokens, one for each letter and comma; a chunk holds 10
WEIGHTED = "cow, (black:1.4), on [my] mud"  # the same words with weights
CALL = {"edits": [Edit("hat", warmup=0)], "steps": 2, "output": "latent", "seed": 4}
BOTH = {"long_prompts": True, "weighted": True}


@pytest.fixture(scope="module")
def pipe(least_xl):
    return least_xl


def by_hand(pipe, text, side, reading=BOTH):
    """Computes the states [chunks, 12, channels] of text encoder `side` (0 or 1) without the code that joins chunks.

    Returns:
        The states, and the second text encoder's pooled embeddings (None for the first text encoder).
    """
    tokenizer = (pipe.tokenizer.first, pipe.tokenizer.second)[side]
    part = chunks(tokenizer, text, Reading(*reading.values()))
    if side:
        plain, pooled = map(np.asarray, pipe.models.text_encoder_2.states(part.ids))
    else:
        plain, pooled = np.asarray(pipe.models.text_encoder.penultimate(part.ids)), None
    weighted = plain * part.weights[..., None]
    return weighted * (plain.mean((1, 2)) / weighted.mean((1, 2)))[:, None, None], pooled


def test_options_do_not_change_short_texts(pipe):
    plain = pipe("a (cat", **CALL).images
    for options in ({"long_prompts": True}, {"weighted": True}, BOTH):
        text = "a (cat" if "weighted" not in options else "a \\(cat"
        assert np.array_equal(pipe(text, **options, **CALL).images, plain)
        actual, expected = pipe.encode(["", text], **options), pipe.encode(["", "a (cat"])
        assert np.array_equal(actual.states, expected.states)
        assert np.array_equal(actual.pooled, expected.pooled)
    assert not np.array_equal(pipe("a (cat", weighted=True, **CALL).images, plain)


def test_both_encoders_read_every_chunk(pipe):
    """The mean of a weighted chunk is restored for each text encoder separately."""
    found = pipe.encode(WEIGHTED, **BOTH)
    assert (found.states.shape, found.pooled.shape) == ((1, 24, 36), (1, 12))
    states = found.states[0].reshape(2, 12, 36)
    first, _ = by_hand(pipe, WEIGHTED, 0)
    second, pooled = by_hand(pipe, WEIGHTED, 1)
    np.testing.assert_allclose(states[..., :16], first, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(states[..., 16:], second, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.pooled[0], pooled[0], atol=1e-5)
    assert not np.allclose(pooled[0], pooled[1], atol=1e-2)


def test_pooled_text_is_the_first_chunks_without_weights(pipe):
    with pytest.warns(UserWarning, match="cut from the end of"):
        cut = pipe.encode(LONG)
    for text in (LONG, f"{LONG} and more of it", WEIGHTED):
        assert np.array_equal(pipe.encode(text, **BOTH).pooled, cut.pooled)


def test_shorter_texts_are_padded_with_empty_chunks(pipe):
    found, short, blank = pipe.encode(["cat", LONG], long_prompts=True), pipe.encode("cat"), pipe.encode("")
    assert np.array_equal(found.states[0], np.concatenate([short.states[0], blank.states[0]]))
    assert np.array_equal(found.pooled[0], short.pooled[0])
    assert np.array_equal(found.states[1], pipe.encode(LONG, long_prompts=True).states[0])


@pytest.mark.parametrize(("text", "second"), [(WEIGHTED, "cat"), ("cat", WEIGHTED)])
def test_the_second_text_encoder_may_read_longer_or_shorter_texts(text, second, pipe):
    found = pipe.encode(["x", text], second=["x", second], **BOTH)[1]
    for side, words, part in ((0, text, np.s_[..., :16]), (1, second, np.s_[..., 16:])):
        states, pooled = by_hand(pipe, words, side)
        if len(states) == 1:
            states = np.concatenate([states, by_hand(pipe, "", side)[0]])
        np.testing.assert_allclose(found.states[0].reshape(2, 12, 36)[part], states, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.pooled[0], pooled[0], atol=1e-5)


def test_long_texts_equal_their_embeddings(pipe):
    """Prompts, negative prompts and concepts may have different lengths."""
    texts = {"prompt": ["cat", WEIGHTED], "negative_prompt": ["(bad:1.3)", ""]}
    call = CALL | {"edits": [Edit(LONG[::-1], warmup=0)]}
    found = pipe(**texts, **BOTH, **call).images
    read = {name: [pipe.encode(one, **BOTH) for one in words] for name, words in texts.items()}
    call["edits"] = [Edit(pipe.encode(LONG[::-1], long_prompts=True), warmup=0)]
    assert np.array_equal(pipe(**read, **call).images, found)


def test_missing_negative_prompt_stays_zeros(pipe):
    """The zeros are extended to the length of long texts, which does not change the UNet's prediction."""
    call = CALL | {"edits": [], "record": True}
    long, short = pipe(LONG, long_prompts=True, **call), pipe("cat", **call)
    pooled = np.zeros((1, 12), np.float32)
    for tokens in (12, 24):
        zeros = SDXLText(np.zeros((1, tokens, 36), np.float32), pooled)
        assert np.array_equal(pipe(LONG, negative_prompt=zeros, long_prompts=True, **call).images, long.images)
    np.testing.assert_allclose(long.record.uncond[:, 0], short.record.uncond[:, 0], rtol=1e-4, atol=1e-5)
    words = pipe(LONG, negative_prompt="", long_prompts=True, **call)
    assert not np.allclose(words.record.uncond[:, 0], short.record.uncond[:, 0], atol=1e-3)


def test_embeddings_of_long_texts_need_no_tokenizer(pipe):
    """Only padding needs a tokenizer, and only for texts that are not zeros."""
    unread = sega_jax.Pipeline(**pipe.components | {"tokenizer": None})
    long, short = pipe.encode(LONG, long_prompts=True), pipe.encode("cat")
    call = CALL | {"edits": []}
    assert np.array_equal(unread(long, **call).images, pipe(LONG, long_prompts=True, **call).images)
    with pytest.raises(ValueError, match=r"texts have different lengths: .* encode them in one call, or load"):
        unread(long, negative_prompt=short, **call)


@pytest.mark.parametrize("options", [{}, {"weighted": True}])
def test_truncation_warns_once(options, pipe):
    with pytest.warns(UserWarning, match=f"cut from the end of '{LONG}'") as caught:
        pipe.encode(LONG, **options)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="cut from the end of 'the second, which is long'"):
        pipe.encode("cat", second="the second, which is long", **options)
    with warnings.catch_warnings(action="error"):
        pipe.encode(LONG, second="the second, which is long", long_prompts=True)


def text(tokens, rows=1, pooled=1):
    return SDXLText(np.ones((rows, tokens, 36), np.float32), np.ones((pooled, 12), np.float32))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (text(18), ValueError, r"states have shape \(18, 36\), expected \(12, 36\) .*, or a multiple of 12 tokens"),
        (text(0), ValueError, r"states have shape \(0, 36\), expected \(12, 36\)"),
        (text(12, 2), ValueError, "prompt has 2 of states and 1 of pooled; give every array the same number of rows"),
        (text(12, 1, 2), ValueError, "prompt has 1 of states and 2 of pooled"),
        (text(12, 0, 0), ValueError, r"prompt=SDXLText\(states=float32\[0, .* holds no texts; give at least one"),
        (SDXLText(text(12).states, None), TypeError, "pooled=None should be a floating-point array"),
        (SDXLText(None, text(12).pooled), TypeError, "states=None should be a floating-point array"),
        (SDXLText(None, None), TypeError, r"prompt=SDXLText\(states=None, pooled=None\) should hold arrays with one"),
    ],
)
def test_rejected_texts(wrong, error, words, pipe):
    with pytest.raises(error, match=words):
        pipe(wrong, **CALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighted": "false"}, "weighted='false' should be True or False"),
        ({"long_prompts": 1}, "long_prompts=1 should be True or False"),
        ({"second": 5}, "second=5 should be a string or a non-empty list"),
        ({"second": ["cat", 5]}, r"second=\['cat', 5\] should be a string or a non-empty list"),
        ({"second": []}, r"second=\[\] should be a string or a non-empty list"),
    ],
)
def test_rejected_options(options, words, pipe):
    with pytest.raises(TypeError, match=words):
        pipe.encode(["a", "b"], **options)
