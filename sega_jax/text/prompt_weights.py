"""Functions that split long prompts into chunks and parse the brackets of weighted prompts."""

import itertools
import operator
import re
import warnings
from typing import NamedTuple

import numpy as np

from sega_jax.text.tokenizers import Tokenizer, TokenizerPair, Warn, truncation

# Round brackets multiply the weight of the enclosed words by this factor; square brackets divide the weight by it.
_FACTOR = 1.1
_OPENING = {")": "(", "]": "["}
_WEIGHT = re.compile(r":\s*([+-]?[.0-9]+)\s*\)")
_DEPTH = 100  # the maximum number of nested brackets


class Reading(NamedTuple):
    """Options for tokenizing texts.

    Attributes:
        long: Whether to split long texts into chunks instead of truncating them.
        weighted: Whether brackets set word weights instead of being literal characters.
    """

    long: bool = False
    weighted: bool = False


class Chunks(NamedTuple):
    """The tokens of a text. Each chunk begins with a start token and ends with an end token.

    Attributes:
        ids: int32 [chunks, length], or [chunks, 2, length] for a pair of tokenizers.
        weights: The tokens' weights, float32 with the shape of `ids`; 1 for special tokens.
    """

    ids: np.ndarray
    weights: np.ndarray


def chunks(tokenizer: Tokenizer, text: str, reading: Reading, *, warn: Warn = warnings.warn) -> Chunks:
    """Splits the tokens of a text into chunks of `tokenizer.length` - 2 tokens. A chunk may end inside a word.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        reading: The options. Without `long`, there is only one chunk.
        warn: A function to call with a message if the text is truncated.

    Raises:
        ValueError: A weight is not a number.
    """
    ids, weights = [], []
    for words, weight in parse_weights(text) if reading.weighted else [(text, 1.0)]:
        tokens = tokenizer.tokens(words)
        ids += tokens
        weights += [weight] * len(tokens)
    room = tokenizer.length - 2
    if len(ids) > room and not reading.long:
        warn(truncation(tokenizer.length, text, tokenizer.words(ids[room:])))
        ids, weights = ids[:room], weights[:room]
    starts = range(0, max(len(ids), 1), room)
    padded_weights = np.ones((len(starts), tokenizer.length), np.float32)
    for row, start in zip(padded_weights, starts, strict=True):
        part = weights[start : start + room]
        row[1 : 1 + len(part)] = part
    return Chunks(np.stack([tokenizer.framed(ids[start : start + room]) for start in starts]), padded_weights)


def pair_chunks(
    tokenizers: TokenizerPair, text: str, second: str | None, reading: Reading, *, warn: Warn = warnings.warn
) -> Chunks:
    """Splits a text into chunks for both tokenizers of a pair; see `chunks`.

    If the two texts have different numbers of chunks, the shorter one is padded with empty chunks.

    Args:
        tokenizers: The pair.
        text: The text for the first tokenizer.
        second: The text for the second tokenizer; None means the same text.
        reading, warn: As for `chunks`.

    Raises:
        ValueError: A weight is not a number.
    """
    sides = [(tokenizers.first, chunks(tokenizers.first, text, reading, warn=warn))]
    if second is None:  # without a second text, the first tokenizer has already warned
        sides.append((tokenizers.second, chunks(tokenizers.second, text, reading, warn=lambda message: None)))
    else:
        sides.append((tokenizers.second, chunks(tokenizers.second, second, reading, warn=warn)))
    count = max(len(part.ids) for _, part in sides)
    padded = [_padded(tokenizer, part, count) for tokenizer, part in sides]
    return Chunks(*(np.stack(arrays, 1) for arrays in zip(*padded, strict=True)))


def _padded(tokenizer: Tokenizer, part: Chunks, count: int) -> Chunks:
    missing = count - len(part.ids)
    ids = np.concatenate([part.ids, np.tile(tokenizer.framed([]), (missing, 1))])
    return Chunks(ids, np.concatenate([part.weights, np.ones((missing, tokenizer.length), np.float32)]))


def weight_states(hidden: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiplies hidden states by their tokens' weights, then rescales each chunk to its original mean.

    Chunks whose weights are all 1 do not change. AUTOMATIC1111's web UI computes the mean over the corresponding chunks
    of all texts in a batch, whereas here the result for a text does not depend on the other texts.

    Args:
        hidden: Floats [chunks, length, channels].
        weights: float32 [chunks, length].

    Returns:
        An array with the shape and dtype of `hidden`.
    """
    result = np.array(hidden)
    for i in np.flatnonzero((weights != 1).any(1)):
        state = hidden[i].astype(np.promote_types(hidden.dtype, np.float32))
        weighted = state * weights[i][:, None]
        mean = weighted.mean()
        result[i] = (weighted * (state.mean() / mean if mean else 1)).astype(hidden.dtype)
    return result


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Splits a text into weighted fragments, following the rules of AUTOMATIC1111's web UI.

    `(word)` multiplies the weight by 1.1, `[word]` divides it by 1.1, and `(word:1.5)` multiplies it by 1.5. The
    factors of nested brackets are multiplied. A backslash makes the next bracket or backslash literal. An unclosed
    bracket extends to the end of the text. An unmatched closing bracket, a weight outside round brackets, and a colon
    without a number, as in `(a:b)`, are literal. `BREAK` is an ordinary word.

    Returns:
        The (fragment, weight) pairs in order; at least one.

    Raises:
        ValueError: A weight is not a number (such as 1.2.3), or brackets are nested more than 100 levels deep.
    """
    parts: list[str] = []
    weights = np.ones(len(text) + 1)  # of the parts
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        weights[start : len(parts)] *= factor

    position = 0
    while position < len(text):
        character, weight = text[position], _weight(text, position)
        size = 1
        if character == "\\":
            size = 2 if text[position + 1 : position + 2] in ("(", ")", "[", "]", "\\") else 1
            parts.append(text[position + 1 : position + size])
        elif character in opened:
            opened[character].append(len(parts))
            if sum(map(len, opened.values())) > _DEPTH:
                raise ValueError(
                    f"{text[:40]!r} has more than {_DEPTH} nested brackets; remove some, or put a backslash before"
                    " literal brackets"
                )
        elif weight and opened["("]:
            number, size = weight
            multiply(opened["("].pop(), _number(number, text))
        elif character in _OPENING and opened[_OPENING[character]]:
            multiply(opened[_OPENING[character]].pop(), _FACTOR if character == ")" else 1 / _FACTOR)
        else:
            size = weight[1] if weight else 1
            parts.append(text[position : position + size])
        position += size
    for start in opened["("]:
        multiply(start, _FACTOR)
    for start in opened["["]:
        multiply(start, 1 / _FACTOR)
    # Adjacent fragments with equal weights are joined, because a token may span a bracket.
    joined: list[tuple[str, float]] = []
    for weight, group in itertools.groupby(zip(parts, weights.tolist(), strict=False), key=operator.itemgetter(1)):
        joined.append(("".join(words for words, _ in group), weight))
    return joined or [("", 1.0)]


def _weight(text: str, position: int) -> tuple[str, int] | None:
    """Returns the weight at a position and the length of the match, such as "1.2" and 6 for ": 1.2)".

    Returns None if there is no weight at the position.
    """
    match = _WEIGHT.match(text, position)
    return None if match is None else (match[1], len(match[0]))


def _number(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(
            f"the weight {number!r} in {text[:40]!r} is not a number; write (word:1.2), or put a backslash before"
            " literal brackets"
        ) from None
