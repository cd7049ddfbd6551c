"""Texts beyond what CLIP reads by itself: longer ones in chunks, and weights of words in brackets."""

import warnings
from typing import NamedTuple

import numpy as np

from sega_jax.text.tokenizers import Tokenizer, TokenizerPair, Warn, truncation

# What a pair of brackets multiplies the weight by, or divides it.
_STEP = 1.1
_CLOSES = {")": "(", "]": "["}


class Reading(NamedTuple):
    """How texts are read."""

    long: bool = False  # in as many chunks as they take, or cut
    weighted: bool = False  # brackets as weights, or as they stand


class Chunks(NamedTuple):
    """A text, each chunk of which is between a start and an end token.

    Arrays are [chunks, length] for one tokenizer, [chunks, 2, length] for a pair.
    """

    ids: np.ndarray  # int32
    weights: np.ndarray  # float32, 1 for tokens of no word


def chunks(tokenizer: Tokenizer, text: str, reading: Reading, *, warn: Warn = warnings.warn) -> Chunks:
    """Cuts the text's tokens at every `tokenizer.length` - 2 of them, wherever that is. Without `reading.long` there
    is one chunk, and `warn` is told the rest.

    Raises:
        ValueError: a weight that is no number.
    """
    ids, weights = [], []
    for words, weight in fragments(text) if reading.weighted else [(text, 1.0)]:
        tokens = tokenizer.tokens(words)
        ids += tokens
        weights += [weight] * len(tokens)
    room = tokenizer.length - 2
    if len(ids) > room and not reading.long:
        warn(truncation(tokenizer.length, text, tokenizer.words(ids[room:])))
        ids, weights = ids[:room], weights[:room]
    starts = range(0, max(len(ids), 1), room)
    heavy = np.ones((len(starts), tokenizer.length), np.float32)
    for row, start in zip(heavy, starts, strict=True):
        part = weights[start : start + room]
        row[1 : 1 + len(part)] = part
    return Chunks(np.stack([tokenizer.framed(ids[start : start + room]) for start in starts]), heavy)


def pair_chunks(
    tokenizers: TokenizerPair, text: str, second: str | None, reading: Reading, *, warn: Warn = warnings.warn
) -> Chunks:
    """Cuts a text for both tokenizers of a pair as `chunks` does for one; `second` is the text of the second tokenizer
    where that differs. The side with fewer chunks is padded with chunks of no words.

    Raises:
        ValueError: a weight that is no number.
    """
    sides = [(tokenizers.first, chunks(tokenizers.first, text, reading, warn=warn))]
    if second is None:  # the first tokenizer has already warned about the same text
        sides.append((tokenizers.second, chunks(tokenizers.second, text, reading, warn=lambda message: None)))
    else:
        sides.append((tokenizers.second, chunks(tokenizers.second, second, reading, warn=warn)))
    count = max(len(part.ids) for _, part in sides)
    padded = [_padded(tokenizer, part, count) for tokenizer, part in sides]
    return Chunks(*(np.stack(arrays, 1) for arrays in zip(*padded, strict=True)))


def _padded(tokenizer: Tokenizer, part: Chunks, count: int) -> Chunks:
    rest = count - len(part.ids)
    ids = np.concatenate([part.ids, np.tile(tokenizer.framed([]), (rest, 1))])
    return Chunks(ids, np.concatenate([part.weights, np.ones((rest, tokenizer.length), np.float32)]))


def weighed(hidden: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Hidden states [chunks, length, channels] times the weights [chunks, length], and that times what restores the
    mean of each chunk, in the states' dtype. Chunks all of whose weights are 1 stay as they are.

    The web UI takes the mean over the same chunk of all texts of a batch; here a text does not depend on others.
    """
    found = np.array(hidden)
    for i in np.flatnonzero((weights != 1).any(1)):
        state = hidden[i].astype(np.promote_types(hidden.dtype, np.float32))
        heavy = state * weights[i][:, None]
        mean = heavy.mean()
        found[i] = (heavy * (state.mean() / mean if mean else 1)).astype(hidden.dtype)
    return found


def fragments(text: str) -> list[tuple[str, float]]:
    """The words of a text and their weights, by the rules of the widely used web UI.

    `(word)` weighs 1.1 times as much, `[word]` as much less, `(word:1.5)` 1.5 times, and brackets within brackets
    multiply. After a backslash a bracket or backslash is itself. A bracket that nothing closes lasts to the end; one
    that closes nothing, or a weight outside of round brackets, is itself. `BREAK` is a word like others.

    Raises:
        ValueError: a weight that is no number.
    """
    found: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        for fragment in found[start:]:
            fragment[1] *= by

    at = 0
    while at < len(text):
        here, weight = text[at], _weight(text, at)
        size = 1
        if here == "\\":
            size = 2 if text[at + 1 : at + 2] in ("(", ")", "[", "]", "\\") else 1
            found.append([text[at + 1 : at + size], 1.0])
        elif here in opened:
            opened[here].append(len(found))
        elif weight and opened["("]:
            written, size = weight
            multiply(opened["("].pop(), _number(written, text))
        elif here in _CLOSES and opened[_CLOSES[here]]:
            multiply(opened[_CLOSES[here]].pop(), _STEP if here == ")" else 1 / _STEP)
        else:
            size = weight[1] if weight else 1
            found.append([text[at : at + size], 1.0])
        at += size
    for start in opened["("]:
        multiply(start, _STEP)
    for start in opened["["]:
        multiply(start, 1 / _STEP)
    # Side by side and of one weight they are one text, whose tokens may reach over a bracket.
    joined: list[tuple[str, float]] = []
    for words, weight in found:
        if joined and joined[-1][1] == weight:
            words = joined.pop()[0] + words
        joined.append((words, weight))
    return joined or [("", 1.0)]


def _weight(text: str, at: int) -> tuple[str, int] | None:
    """What stands as a weight here, as in ": 1.2)", and how long it is with colon and bracket."""
    end = text.find(")", at)
    if text[at] != ":" or end < 0:
        return None
    written = text[at + 1 : end].strip()
    digits = written[1:] if written[:1] in ("+", "-") else written
    return (written, end + 1 - at) if digits and set(digits) <= set(".0123456789") else None


def _number(written: str, text: str) -> float:
    try:
        return float(written)
    except ValueError:
        raise ValueError(
            f"the weight {written!r} in {text[:40]!r} is no number; write (word:1.2), or a backslash before brackets"
            " that are meant"
        ) from None
