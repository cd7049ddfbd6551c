"""Tests splitting long texts into chunks, and parsing and applying weights."""

import math
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.text.prompt_weights import Reading, chunks, parse_weights, weight_states
from sega_jax.text.tokenizers import Tokenizer

# 17 letters and commas, each of which is one token for the test tokenizer. A chunk has room for 10 tokens.
LONG = "a cat, black, on a mat"
# Examples from the web UI's documentation, and edge cases.
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
    """Returns every literal character with its weight, computed from the brackets that enclose it.

    This is an independent implementation of `parse_weights`.
    """
    tokens = re.findall(r"\\[()\[\]\\]|\\|:\s*[+-]?[.\d]+\s*\)|[()\[\]]|[^\\()\[\]:]|:", text)
    spans, literal, stacks = [], [], {"(": [], "[": []}
    for token in tokens:
        if token[0] == "\\":
            literal += list(token[1:])
        elif token in stacks:
            stacks[token].append(len(literal))
        elif token[0] == ":" and len(token) > 1 and stacks["("]:
            spans.append((stacks["("].pop(), len(literal), float(token[1:-1])))
        elif token in (")", "]") and stacks["(" if token == ")" else "["]:
            start = stacks["(" if token == ")" else "["].pop()
            spans.append((start, len(literal), 1.1 if token == ")" else 1 / 1.1))
        else:
            literal += list(token)
    spans += [(start, len(literal), 1.1) for start in stacks["("]] + [(s, len(literal), 1 / 1.1) for s in stacks["["]]
    return [(c, math.prod(factor for start, end, factor in spans if start <= i < end)) for i, c in enumerate(literal)]


@pytest.mark.parametrize("text", WEIGHTED)
def test_weights_follow_the_web_ui(text):
    fragments = parse_weights(text)
    assert [words for words, _ in fragments] == [words for words, _ in WEIGHTED[text]]
    np.testing.assert_allclose([weight for _, weight in fragments], [weight for _, weight in WEIGHTED[text]])


def test_weights_of_random_texts():
    rng = np.random.default_rng(0)
    parts = ["a", "b ", "(", ")", "[", "]", ":", ":1.2)", ": -3)", "\\", "\\(", "1", ".5"]
    for _ in range(500):
        text = "".join(rng.choice(parts, rng.integers(1, 14)))
        try:
            parsed = [(c, weight) for words, weight in parse_weights(text) for c in words]
        except ValueError:
            with pytest.raises(ValueError, match="could not convert"):
                by_characters(text)
            continue
        expected = by_characters(text)
        assert [c for c, _ in parsed] == [c for c, _ in expected], text
        np.testing.assert_allclose([w for _, w in parsed], [w for _, w in expected], err_msg=text)


def test_a_short_text_is_one_chunk(tokenizer):
    for text in ("", "cat", "a b c d e f g h i j"):
        chunk = chunks(tokenizer, text, Reading(long=True))
        np.testing.assert_array_equal(chunk.ids, tokenizer([text]))
        assert chunk.ids.dtype == np.int32
        assert (chunk.weights == 1).all()


def test_a_long_text_is_split_into_chunks(tokenizer):
    split, tokens = chunks(tokenizer, LONG, Reading(long=True)), tokenizer.tokens(LONG)
    assert split.ids.shape == (2, 12)
    assert split.ids[:, 0].tolist() == [56, 56]
    assert [*split.ids[0, 1:11], *split.ids[1, 1 : len(tokens) - 9]] == tokens
    assert (split.ids[0, 11], *split.ids[1, len(tokens) - 9 :]) == (57,) * (22 - len(tokens))
    assert len(chunks(tokenizer, "a " * 20, Reading(long=True)).ids) == 2


def test_weights_align_with_tokens(tokenizer):
    split = chunks(tokenizer, "ab (cd:2) [e]" + " f" * 6, Reading(long=True, weighted=True))
    np.testing.assert_allclose(split.weights[0], [1, 1, 1, 2, 2, 1 / 1.1, *[1] * 6], rtol=1e-6)
    assert (split.weights[1] == 1).all()
    with pytest.warns(UserWarning, match="the text encoder reads 12 tokens; cut from the end of .*: 'k'"):
        truncated = chunks(tokenizer, "(a b c d e f g h i j:2) k", Reading(weighted=True))
    assert truncated.weights.tolist() == [[1, *[2] * 10, 1]]


def test_weights_keep_the_mean_of_a_chunk():
    hidden = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32) + 1
    weights = np.float32([[1, 2, 0.5, 1, 1], [1] * 5])
    weighted = weight_states(hidden, weights)
    assert np.array_equal(weighted[1], hidden[1])
    np.testing.assert_allclose(weighted[0].mean(), hidden[0].mean(), rtol=1e-5)
    factor = weighted[0] / (hidden[0] * weights[0][:, None])
    np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-5)
    assert weight_states(hidden.astype(jnp.bfloat16), weights).dtype == jnp.bfloat16


def test_colons_without_a_number_are_literal():
    assert parse_weights("(a:b)") == [("a:b", pytest.approx(1.1))]
    assert parse_weights("(a:nan)") == [("a:nan", pytest.approx(1.1))]
    with pytest.raises(ValueError, match=r"the weight '1\.2\.3' in '\(a:1\.2\.3\)' is not a number"):
        parse_weights("(a:1.2.3)")


@pytest.mark.parametrize("text", ["(" * 3000 + "a" + ")" * 3000, "[" * 101, "([" * 51])
def test_deeply_nested_brackets_are_refused(text):
    with pytest.raises(ValueError, match="has more than 100 nested brackets"):
        parse_weights(text)


@pytest.mark.parametrize("text", ["(a) ", "(a:1.2) ", "[b]", "a)", ":", "a:1", "\\(", "(((a)))"])
def test_work_is_linear_in_the_length(text):
    """Parsing twice as many brackets takes about twice as many interpreter steps."""

    def steps(count):
        lines = 0

        def trace(*_):
            nonlocal lines
            lines += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            parse_weights(text * count)
        finally:
            sys.settrace(before)
        return lines

    assert steps(400) <= 2.1 * steps(200)
