"""Longer texts and weights of words: how they are cut and parsed."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.text.prompt_weights import Reading, chunks, parse_weights, weight_states
from sega_jax.text.tokenizers import Tokenizer

LONG = "a cat, black, on a mat"  # 17 letters and commas, which are tokens here; a chunk has room for 10
# What the web UI documents of itself, and its edges.
WEIGHTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "[a]": [("a", 1 / 1.1)],
    "a) b] c:1.5)": [("a) b] c:1.5)", 1.0)],
    "(a : b)": [("a : b", 1.1)],
    "(a: -.5 ) b": [("a", -0.5), (" b", 1.0)],
    "\\\\(a\\x)": [("\\", 1.0), ("ax", 1.1)],
    "[a:1.2)": [("a:1.2)", 1 / 1.1)],
}


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / "tokenizer", 12, 60)


def by_characters(text):
    """Every character that is left and its weight, from the brackets' spans."""
    tokens = re.findall(r"\\[()\[\]\\]|\\|:\s*[+-]?[.\d]+\s*\)|[()\[\]]|[^\\()\[\]:]|:", text)
    spans, left, stacks = [], [], {"(": [], "[": []}
    for token in tokens:
        if token[0] == "\\":
            left += list(token[1:])
        elif token in stacks:
            stacks[token].append(len(left))
        elif token[0] == ":" and len(token) > 1 and stacks["("]:
            spans.append((stacks["("].pop(), len(left), float(token[1:-1])))
        elif token in (")", "]") and stacks["(" if token == ")" else "["]:
            start = stacks["(" if token == ")" else "["].pop()
            spans.append((start, len(left), 1.1 if token == ")" else 1 / 1.1))
        else:
            left += list(token)
    spans += [(start, len(left), 1.1) for start in stacks["("]] + [(s, len(left), 1 / 1.1) for s in stacks["["]]
    return [(c, math.prod(by for start, end, by in spans if start <= i < end)) for i, c in enumerate(left)]


@pytest.mark.parametrize("text", WEIGHTED)
def test_weights_are_the_web_uis(text):
    found = parse_weights(text)
    assert [words for words, _ in found] == [words for words, _ in WEIGHTED[text]]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in WEIGHTED[text]])


def test_weights_of_any_text():
    rng = np.random.default_rng(0)
    parts = ["a", "b ", "(", ")", "[", "]", ":", ":1.2)", ": -3)", "\\", "\\(", "1", ".5"]
    for _ in range(500):
        text = "".join(rng.choice(parts, rng.integers(1, 14)))
        try:
            found = [(c, weight) for words, weight in parse_weights(text) for c in words]
        except ValueError:
            with pytest.raises(ValueError, match="could not convert"):
                by_characters(text)
            continue
        wanted = by_characters(text)
        assert [c for c, _ in found] == [c for c, _ in wanted], text
        np.testing.assert_allclose([w for _, w in found], [w for _, w in wanted], err_msg=text)


def test_one_chunk_is_what_the_tokenizer_makes(tokenizer):
    for text in ("", "cat", "a b c d e f g h i j"):
        found = chunks(tokenizer, text, Reading(long=True))
        np.testing.assert_array_equal(found.ids, tokenizer([text]))
        assert found.ids.dtype == np.int32
        assert (found.weights == 1).all()


def test_longer_texts_are_cut_into_chunks(tokenizer):
    found, tokens = chunks(tokenizer, LONG, Reading(long=True)), tokenizer.tokens(LONG)
    assert found.ids.shape == (2, 12)
    assert found.ids[:, 0].tolist() == [56, 56]
    assert [*found.ids[0, 1:11], *found.ids[1, 1 : len(tokens) - 9]] == tokens
    assert (found.ids[0, 11], *found.ids[1, len(tokens) - 9 :]) == (57,) * (22 - len(tokens))
    assert len(chunks(tokenizer, "a " * 20, Reading(long=True)).ids) == 2


def test_weights_stand_at_their_tokens(tokenizer):
    found = chunks(tokenizer, "ab (cd:2) [e]" + " f" * 6, Reading(long=True, weighted=True))
    np.testing.assert_allclose(found.weights[0], [1, 1, 1, 2, 2, 1 / 1.1, *[1] * 6], rtol=1e-6)
    assert (found.weights[1] == 1).all()
    with pytest.warns(UserWarning, match="the text encoder reads 12 tokens; cut from the end of .*: 'k'"):
        cut = chunks(tokenizer, "(a b c d e f g h i j:2) k", Reading(weighted=True))
    assert cut.weights.tolist() == [[1, *[2] * 10, 1]]


def test_the_mean_of_a_chunk_is_restored():
    hidden = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32) + 1
    weights = np.float32([[1, 2, 0.5, 1, 1], [1] * 5])
    found = weight_states(hidden, weights)
    assert np.array_equal(found[1], hidden[1])
    np.testing.assert_allclose(found[0].mean(), hidden[0].mean(), rtol=1e-5)
    by = found[0] / (hidden[0] * weights[0][:, None])
    np.testing.assert_allclose(by, by[0, 0], rtol=1e-5)
    assert weight_states(hidden.astype(jnp.bfloat16), weights).dtype == jnp.bfloat16
