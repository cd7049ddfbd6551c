"""Attributes in words: the captions to train on, and a tokenizer that has every word of them.

A caption's noun follows the looks (nobody with a beard is called a woman, and only a few with long hair and no beard
are called a man) but is no attribute: it draws nothing of its own, and "person" fits all.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sega_jax.demo.attributes import ATTRIBUTES, COLUMN, visible

LENGTH = 48  # tokens that the text encoder reads, start and end among them

# What follows "with", attribute by attribute, value by value; a value without words is never mentioned.
_WITH = {
    "glasses": ((), ("glasses", "eyeglasses", "spectacles"), ("sunglasses", "shades")),
    "mouth": (
        ("a neutral face", "a neutral expression", "a straight face"),
        ("a smile", "a big smile", "a happy face"),
        ("a sad face", "a sad mouth", "a frown"),
        ("an open mouth", "a wide open mouth"),
    ),
    "facial hair": ((), ("a beard", "a full beard"), ("a moustache", "a mustache")),
    "hair": (("a bald head", "a shaved head"), ("short hair",), ("long hair",), ("curly hair", "an afro")),
    "hair colour": tuple((f"{value} hair",) for value in ATTRIBUTES["hair colour"]),
    "hat": ((), ("a hat", "a wide hat"), ("a beanie", "a knit cap")),
    "skin": (("pale skin", "fair skin"), ("tanned skin", "tan skin"), ("brown skin",), ("dark skin",)),
}
# What may stand before the noun instead.
_ADJECTIVES = {
    "mouth": (("serious",), ("smiling", "happy"), ("sad", "unhappy"), ("open-mouthed", "surprised")),
    "facial hair": ((), ("bearded",), ("moustached",)),
    "hair": (("bald",), ("short-haired",), ("long-haired",), ("curly-haired",)),
    "skin": (("pale", "fair-skinned"), ("tanned",), ("brown-skinned",), ("dark", "dark-skinned")),
}
_CLOTHES = (("shirt", "t-shirt", "tee"), ("hoodie", "hooded top"), ("jacket", "blazer"), ("overalls", "dungarees"))
_PLURAL = {"overalls", "dungarees"}
_SYNONYMS = {"blond": ("blond", "blonde"), "grey": ("grey", "gray"), "purple": ("purple", "violet")}
_RED_HAIR = {"red": ("red", "ginger")}
_BACKGROUND = ("on a {} background", "against a {} background", "in front of a {} wall", "with a {} background")
_OPENINGS = ("a portrait of", "a cartoon portrait of", "a drawing of", "a picture of", "a cartoon of", "an avatar of")
_OPENINGS += ("portrait of", "a photo of", "")
# Nouns by looks: with facial hair, with long hair and none, all others.
_NOUNS = (
    ("person", "man"),
    ("person", "woman", "woman", "person", "woman", "man"),
    ("person", "person", "man", "woman"),
)

# Colours and mouths are learned last: captions mention them more often, short ones most of all.
_WEIGHTS = {"mouth": 3.0, "hair colour": 2.5, "clothes colour": 2.5, "background": 2.0, "skin": 1.5}
_SIZES = (0.05, 0.25, 0.12)  # shares of captions of no, one and two attributes; the others have 3 to all
_NUMBERS = 32  # random numbers for a caption


def captions(attributes: np.ndarray, rng: np.random.Generator) -> list[str]:
    """A caption each: some of what is seen, in words of its own; int [n, attributes] -> n texts."""
    attributes = np.asarray(attributes)
    told = _told(attributes, rng)
    numbers = rng.integers(0, 5040, (len(attributes), _NUMBERS))  # 5040 is divisible by 1 to 10
    rows = zip(attributes.tolist(), told.tolist(), numbers.tolist(), strict=True)
    return [_caption(values, tells, iter(chance)) for values, tells, chance in rows]


def tokenizer(folder: Path) -> None:
    """Writes a CLIP tokenizer with a token for each word of the grammar, and all bytes for other words."""
    alphabet = list(_byte_letters())
    merges = _merges(sorted(_words()))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([*tokens, start, end])}
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in [("vocab", vocabulary), ("tokenizer_config", settings), ("special_tokens_map", special)]:
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _told(attributes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [n, attributes]: what each caption tells, all of it seen."""
    n = len(attributes)
    weights = np.array([_WEIGHTS.get(name, 1.0) for name in ATTRIBUTES])
    tellable = visible(attributes)
    for name, phrases in _WITH.items():
        tellable[:, COLUMN[name]] &= np.array([len(phrase) > 0 for phrase in phrases])[attributes[:, COLUMN[name]]]
    size = np.searchsorted(np.cumsum(_SIZES), rng.random(n), side="right")
    size = np.where(size == len(_SIZES), rng.integers(len(_SIZES), len(ATTRIBUTES) + 1, n), size)
    race = np.where(tellable, rng.exponential(size=attributes.shape) / weights, np.inf)  # the first are told
    return tellable & (race.argsort(1).argsort(1) < size[:, None])


def _caption(values: list[int], tells: list[bool], chance: Iterator[int]) -> str:
    """One caption of the attributes that it tells."""

    def pick(options):
        return options[next(chance) % len(options)]

    told = {name: value for name, value, tell in zip(ATTRIBUTES, values, tells, strict=True) if tell}
    short = len(told) <= 2
    worn, background = _worn(told, pick), _background(told, pick)
    adjectives, others = _looks(told, pick)
    if told and next(chance) % 20 < (6 if short else 2):  # bare words, as edits are written
        return _bare(adjectives + others + worn + background, pick)
    opening, noun = pick(_OPENINGS), pick(_NOUNS[_kind(values)])
    subject = _article(" ".join([*adjectives, noun]))
    groups = [f"{verb} {_join(things, pick)}" for verb, things in _verbs(others, worn, pick) if things]
    if next(chance) % 2:
        groups.reverse()
    if background and next(chance) % 6 == 0:
        return " ".join([background[0] + ",", *([opening] if opening else []), subject, *groups])
    return " ".join([*([opening] if opening else []), subject, *groups, *background])


def _looks(told: dict[str, int], pick) -> tuple[list[str], list[str]]:
    """Adjectives, and what follows "with"; shuffled."""
    adjectives, others = [], []
    for name, phrases in _WITH.items():
        if name not in told or (name == "hair colour" and told.get("hair")):
            continue
        value = told[name]
        if name == "hair" and "hair colour" in told:
            others.append(_hair(value, told["hair colour"], pick))
        elif name == "hair colour":
            others.append(f"{_colour(name, value, pick)} hair")
        elif name in _ADJECTIVES and len(adjectives) < 2 and pick((True, False)) and _ADJECTIVES[name][value]:
            adjectives.append(pick(_ADJECTIVES[name][value]))
        elif name != "hat":
            others.append(pick(phrases[value]))
    turn = pick(range(len(others))) if others else 0
    return adjectives[:: pick((1, -1))], others[turn:] + others[:turn]


def _hair(value: int, colour: int, pick) -> str:
    """Form and colour of hair in one phrase."""
    word, phrase = _colour("hair colour", colour, pick), pick(_WITH["hair"][value])
    return f"a {word} afro" if phrase == "an afro" else phrase.replace("hair", f"{word} hair")


def _worn(told: dict[str, int], pick) -> list[str]:
    """Clothes and hat, which follow "wearing"."""
    worn = []
    colour = _colour("clothes colour", told["clothes colour"], pick) if "clothes colour" in told else ""
    if "clothes" in told:
        garment = pick(_CLOTHES[told["clothes"]])
        phrase = f"{colour} {garment}".strip()
        worn.append(phrase if garment in _PLURAL else _article(phrase))
    elif colour:
        worn.append(f"{colour} {pick(('clothes', 'clothing'))}")
    if "hat" in told:
        worn.append(pick(_WITH["hat"][told["hat"]]))
    return worn[:: pick((1, -1))]


def _background(told: dict[str, int], pick) -> list[str]:
    if "background" not in told:
        return []
    return [pick(_BACKGROUND).format(_colour("background", told["background"], pick))]


def _verbs(others: list[str], worn: list[str], pick) -> list[tuple[str, list[str]]]:
    """with ... and wearing ...; glasses may be either."""
    glasses = [thing for thing in others if thing in _WITH["glasses"][1] + _WITH["glasses"][2]]
    if glasses and pick((True, False)):
        others, worn = [thing for thing in others if thing not in glasses], glasses + worn
    return [("with", others), (pick(("wearing", "wearing", "in")), worn)]


def _bare(phrases: list[str], pick) -> str:
    """Words without a sentence, their articles dropped half the time."""
    phrases = [re.sub(r"^(on|against|in front of|with) ", "", phrase) for phrase in phrases]
    if pick((True, False)):
        phrases = [re.sub(r"^an? ", "", phrase) for phrase in phrases]
    return ", ".join(phrases)


def _colour(attribute: str, value: int, pick) -> str:
    word = ATTRIBUTES[attribute][value]
    options = (_RED_HAIR if attribute == "hair colour" else {}).get(word) or _SYNONYMS.get(word)
    return pick(options) if options else word


def _kind(values: list[int]) -> int:
    """Which of the nouns fit the looks."""
    if values[COLUMN["facial hair"]]:
        return 0
    return 1 if ATTRIBUTES["hair"][values[COLUMN["hair"]]] == "long" else 2


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _join(things: list[str], pick) -> str:
    return ", ".join(things[:-1]) + (" and " if things[:-1] else "") + things[-1]


def _words() -> set[str]:
    """Every word of the grammar, as CLIP's tokenizer splits them."""
    phrases = [
        text for table in (*_WITH.values(), *_ADJECTIVES.values(), _CLOTHES, _NOUNS) for row in table for text in row
    ]
    phrases += [*_OPENINGS, *_BACKGROUND, *(word for words in _SYNONYMS.values() for word in words), *_RED_HAIR["red"]]
    phrases += [value for values in ATTRIBUTES.values() for value in values]
    phrases += ["wearing in and clothes clothing an a"]
    return set(re.findall(r"[a-z]+|[,-]", " ".join(phrases)))


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Pairs to merge, the most frequent first, until every word is one token."""
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in spelt for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(word, best) for word in spelt]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_letters() -> Iterator[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: what is printable stands for itself."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    yield from map(chr, plain)
    yield from map(chr, range(256, 256 + 256 - len(plain)))
