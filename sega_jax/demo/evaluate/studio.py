"""Pictures in batches of one size, judged, and what an edit did to them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sega_jax.demo import settings
from sega_jax.demo.attributes import ATTRIBUTES, COLUMN, WORDS
from sega_jax.demo.judge import Judge, Verdict, look
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.pipeline import Pipeline

NAMES = list(WORDS)
# How a prompt tells a word; where nothing is said, "with" it.
_PHRASES = {"bald": "with a bald head", "sad": "with a sad face"}
_ARTICLES = {"neutral face", "smile", "open mouth", "beard", "moustache"}
_VERBS = {"hat": "wearing a", "clothes": "wearing a", "clothes colour": "wearing", "background": "on a"}


def phrase(word: str) -> str:
    """A word as the end of a prompt: "with glasses", "wearing a hat"."""
    verb = "wearing" if word == "overalls" else _VERBS.get(WORDS[word][0])
    article = "with an" if word == "open mouth" else "with a" if word in _ARTICLES else "with"
    return _PHRASES.get(word, f"{verb or article} {word}")


class Shot(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int
    edits: tuple[Edit, ...] = ()
    negative: str = ""
    guidance_scale: float | None = None  # the studio's


class Prints(NamedTuple):
    """Pictures uint8 [n, 128, 128, 3], and what the judge sees in them."""

    pictures: np.ndarray
    verdict: Verdict

    def __getitem__(self, index: Any) -> "Prints":
        """Some of them, by numbers or a mask."""
        return Prints(self.pictures[index], Verdict(*(values[index] for values in self.verdict)))


@dataclasses.dataclass(frozen=True)
class Studio:
    """Makes and judges pictures.

    Attributes:
        batch: pictures in one call of the pipeline; the last call of a series is filled up by copies.
        call: the pipeline's other arguments; a shot may name its own guidance scale.
    """

    pipe: Pipeline
    judge: Judge
    batch: int = 256
    call: Mapping[str, Any] = dataclasses.field(default_factory=lambda: settings.CALL)

    def __call__(self, shots: Sequence[Shot], **options: Any) -> Prints:
        """Pictures of the shots; options are those of the pipeline (semantics, support, replay)."""
        if not shots:
            raise ValueError("there are no shots to make")
        parts = []
        for i in range(0, len(shots), self.batch):
            block = list(shots[i : i + self.batch])
            parts.append(self._develop(block + block[-1:] * (self.batch - len(block)), options)[: len(block)])
        pictures = np.concatenate(parts)
        return Prints(pictures, look(self.judge, pictures, self.batch))

    def _develop(self, shots: list[Shot], options: dict[str, Any]) -> np.ndarray:
        usual = self.call["guidance_scale"]
        own = {
            "seed": [shot.seed for shot in shots],
            "negative_prompt": [shot.negative for shot in shots],
            "guidance_scale": [usual if shot.guidance_scale is None else shot.guidance_scale for shot in shots],
        }
        edits = [list(shot.edits) for shot in shots]
        prompts = [shot.prompt for shot in shots]
        return self.pipe(prompts, edits, **self.call | own | options, output="uint8", progress=False).images


class Effect(NamedTuple):
    """What edits did, one entry a picture."""

    success: np.ndarray  # bool: the words are true, or what they name is gone
    kept: np.ndarray  # float in [0, 1]: the share of all other attributes, seen before and after, that stay
    distance: np.ndarray  # float in [0, 1]: the mean absolute difference of pixels


def effect(before: Prints, after: Prints, words: Sequence[Sequence[str]], *, removed: bool = False) -> Effect:
    """Compares pictures; words[i] are those that picture i was edited by."""
    success = np.ones(len(words), bool)
    others = before.verdict.seen & after.verdict.seen
    for i, row in enumerate(words):
        one = after[[i]]
        success[i] = all((gone if removed else having)(one, word).item() for word in row)
        others[i, [COLUMN[WORDS[word][0]] for word in row]] = False
    same = before.verdict.attributes == after.verdict.attributes
    difference = np.abs(before.pictures.astype(np.int16) - after.pictures)
    return Effect(
        success,
        (same & others).sum(1) / np.maximum(others.sum(1), 1),
        difference.mean((1, 2, 3)) / 255,
    )


def lacking(prints: Prints, word: str) -> np.ndarray:
    """bool [n]: which pictures show the word's attribute, and show it otherwise."""
    return prints.verdict.seen[:, COLUMN[WORDS[word][0]]] & ~having(prints, word)


def having(prints: Prints, word: str) -> np.ndarray:
    """bool [n]: of which pictures the word is true."""
    return prints.verdict.words[:, NAMES.index(word)]


def gone(prints: Prints, word: str) -> np.ndarray:
    """bool [n]: in which pictures nothing of the word's kind is left, where there may be none of it (no sunglasses in
    place of glasses, no moustache in place of a beard); else where its attribute shows something else."""
    name, value = WORDS[word]
    values, column = prints.verdict.attributes[:, COLUMN[name]], COLUMN[name]
    if ATTRIBUTES[name][0] == "none":
        return values == 0
    return prints.verdict.seen[:, column] & (values != ATTRIBUTES[name].index(value))


def interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence of a share (Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    z, share = 1.959964, successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    low, high = ((centre + sign * spread) / (1 + z * z / trials) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)
