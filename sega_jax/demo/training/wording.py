"""Captions of portraits, and a tokenizer with one token for each word that occurs in them.

A caption's noun depends on the portrait's looks: "woman" never describes a portrait with facial hair, and "man"
describes only some portraits with long hair and no facial hair. The noun is not an attribute and does not change the
picture; "person" fits every portrait.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sega_jax.demo.attributes import ATTRIBUTES, COLUMN, visible

LENGTH = 48  # the number of tokens that the text encoder takes, including the start and end tokens

# Phrases that follow "with", for each attribute and value. A value without phrases is never mentioned.
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
# Adjectives that may be used before the noun in place of the phrases above, which follow it.
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
_OPENINGS = (
    *("a portrait of", "a cartoon portrait of", "a drawing of", "a picture of", "a cartoon of", "an avatar of"),
    *("portrait of", "a photo of", ""),
)
# Nouns for portraits with facial hair, for portraits with long hair but no facial hair, and for all others.
_NOUNS = (
    ("person", "man"),
    ("person", "woman", "woman", "person", "woman", "man"),
    ("person", "person", "man", "woman"),
)

# The model learns colours and mouths last, so captions mention them more often, especially short captions.
_WEIGHTS = {"mouth": 3.0, "hair colour": 2.5, "clothes colour": 2.5, "background": 2.0, "skin": 1.5}
_SIZES = (0.05, 0.25, 0.12)  # fractions of captions with no, one and two attributes; the others have three or more
_NUMBERS = 32  # how many random numbers each caption uses


def captions(attributes: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Writes a caption for each of n portraits, int [n, attributes]. A caption mentions some of the visible
    attributes."""
    attributes = np.asarray(attributes)
    mentioned = _mentioned(attributes, rng)
    numbers = rng.integers(0, 5040, (len(attributes), _NUMBERS))  # 5040 is divisible by 1 to 10
    rows = zip(attributes.tolist(), mentioned.tolist(), numbers.tolist(), strict=True)
    return [_caption(values, mentions, iter(chance)) for values, mentions, chance in rows]


def tokenizer(folder: Path) -> None:
    """Writes a CLIP tokenizer with one token for each word of the captions. It splits other words into bytes."""
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


def _mentioned(attributes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the visible attributes that each caption mentions, bool [n, attributes]."""
    n = len(attributes)
    weights = np.array([_WEIGHTS.get(name, 1.0) for name in ATTRIBUTES])
    tellable = visible(attributes)
    for name, phrases in _WITH.items():
        tellable[:, COLUMN[name]] &= np.array([len(phrase) > 0 for phrase in phrases])[attributes[:, COLUMN[name]]]
    size = np.searchsorted(np.cumsum(_SIZES), rng.random(n), side="right")
    size = np.where(size == len(_SIZES), rng.integers(len(_SIZES), len(ATTRIBUTES) + 1, n), size)
    # Weighted sampling without replacement: a waiting time is drawn for each attribute, and the first `size` attributes
    # are mentioned.
    race = np.where(tellable, rng.exponential(size=attributes.shape) / weights, np.inf)
    return tellable & (race.argsort(1).argsort(1) < size[:, None])


def _caption(values: list[int], mentions: list[bool], chance: Iterator[int]) -> str:
    """Writes a caption.

    Args:
        values: the portrait's attribute values.
        mentions: whether the caption mentions each attribute.
        chance: random integers that choose among alternatives.
    """

    def pick(options):
        return options[next(chance) % len(options)]

    mentioned = {name: value for name, value, mention in zip(ATTRIBUTES, values, mentions, strict=True) if mention}
    short = len(mentioned) <= 2
    worn, background = _worn(mentioned, pick), _background(mentioned, pick)
    adjectives, others = _looks(mentioned, pick)
    if mentioned and next(chance) % 20 < (6 if short else 2):  # a list of phrases, like the concepts of edits
        return _bare(adjectives + others + worn + background, pick)
    opening, noun = pick(_OPENINGS), pick(_NOUNS[_kind(values)])
    subject = _article(" ".join([*adjectives, noun]))
    groups = [f"{verb} {_join(things, pick)}" for verb, things in _verbs(others, worn, pick) if things]
    if next(chance) % 2:
        groups.reverse()
    if background and next(chance) % 6 == 0:
        return " ".join([background[0] + ",", *([opening] if opening else []), subject, *groups])
    return " ".join([*([opening] if opening else []), subject, *groups, *background])


def _looks(mentioned: dict[str, int], pick) -> tuple[list[str], list[str]]:
    """Returns adjectives, and phrases that follow "with", both in random order."""
    adjectives: list[str] = []
    others: list[str] = []
    for name, phrases in _WITH.items():
        if name not in mentioned or (name == "hair colour" and mentioned.get("hair")):
            continue
        value = mentioned[name]
        if name == "hair" and "hair colour" in mentioned:
            others.append(_hair(value, mentioned["hair colour"], pick))
        elif name == "hair colour":
            others.append(f"{_colour(name, value, pick)} hair")
        elif name in _ADJECTIVES and len(adjectives) < 2 and pick((True, False)) and _ADJECTIVES[name][value]:
            adjectives.append(pick(_ADJECTIVES[name][value]))
        elif name != "hat":
            others.append(pick(phrases[value]))
    turn = pick(range(len(others))) if others else 0
    return adjectives[:: pick((1, -1))], others[turn:] + others[:turn]


def _hair(value: int, colour: int, pick) -> str:
    """Describes the shape and the colour of hair in one phrase."""
    word, phrase = _colour("hair colour", colour, pick), pick(_WITH["hair"][value])
    return f"a {word} afro" if phrase == "an afro" else phrase.replace("hair", f"{word} hair")


def _worn(mentioned: dict[str, int], pick) -> list[str]:
    """Returns phrases for the clothes and the hat. They follow "wearing"."""
    worn = []
    colour = _colour("clothes colour", mentioned["clothes colour"], pick) if "clothes colour" in mentioned else ""
    if "clothes" in mentioned:
        garment = pick(_CLOTHES[mentioned["clothes"]])
        phrase = f"{colour} {garment}".strip()
        worn.append(phrase if garment in _PLURAL else _article(phrase))
    elif colour:
        worn.append(f"{colour} {pick(('clothes', 'clothing'))}")
    if "hat" in mentioned:
        worn.append(pick(_WITH["hat"][mentioned["hat"]]))
    return worn[:: pick((1, -1))]


def _background(mentioned: dict[str, int], pick) -> list[str]:
    """Returns a list that contains one phrase for the background, or an empty list."""
    if "background" not in mentioned:
        return []
    return [pick(_BACKGROUND).format(_colour("background", mentioned["background"], pick))]


def _verbs(others: list[str], worn: list[str], pick) -> list[tuple[str, list[str]]]:
    """Returns "with" and "wearing" (or "in"), each with the phrases that follow it. Glasses may follow either word."""
    glasses = [thing for thing in others if thing in _WITH["glasses"][1] + _WITH["glasses"][2]]
    if glasses and pick((True, False)):
        others, worn = [thing for thing in others if thing not in glasses], glasses + worn
    return [("with", others), (pick(("wearing", "wearing", "in")), worn)]


def _bare(phrases: list[str], pick) -> str:
    """Lists the phrases, separated by commas. Half of the time, the articles are left out."""
    phrases = [re.sub(r"^(on|against|in front of|with) ", "", phrase) for phrase in phrases]
    if pick((True, False)):
        phrases = [re.sub(r"^an? ", "", phrase) for phrase in phrases]
    return ", ".join(phrases)


def _colour(attribute: str, value: int, pick) -> str:
    """Returns a word for a colour."""
    word = ATTRIBUTES[attribute][value]
    options = (_RED_HAIR if attribute == "hair colour" else {}).get(word) or _SYNONYMS.get(word)
    return pick(options) if options else word


def _kind(values: list[int]) -> int:
    """Returns the index of the entry in `_NOUNS` that fits the looks."""
    if values[COLUMN["facial hair"]]:
        return 0
    return 1 if ATTRIBUTES["hair"][values[COLUMN["hair"]]] == "long" else 2


def _article(phrase: str) -> str:
    """Puts "a" or "an" before a phrase."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _join(things: list[str], pick) -> str:
    """Joins phrases with commas and "and"."""
    return ", ".join(things[:-1]) + (" and " if things[:-1] else "") + things[-1]


def known_words() -> set[str]:
    """Returns the words of the captions that describe a portrait's looks, without articles."""
    tables = (*_WITH.values(), *_ADJECTIVES.values(), _CLOTHES, _SYNONYMS.values(), _RED_HAIR.values())
    phrases = [text for table in tables for row in table for text in row]
    phrases += [value for values in ATTRIBUTES.values() for value in values if value != "none"]
    return set(re.findall(r"[a-z]+", " ".join([*phrases, "clothes background"]))) - {"a", "an"}


def _words() -> set[str]:
    """Returns every word of the captions, split as CLIP's tokenizer splits them."""
    phrases = [
        text for table in (*_WITH.values(), *_ADJECTIVES.values(), _CLOTHES, _NOUNS) for row in table for text in row
    ]
    phrases += [*_OPENINGS, *_BACKGROUND, *(word for words in _SYNONYMS.values() for word in words), *_RED_HAIR["red"]]
    phrases += [value for values in ATTRIBUTES.values() for value in values]
    phrases += ["wearing in and clothes clothing an a"]
    return set(re.findall(r"[a-z]+|[,-]", " ".join(phrases)))


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Returns the pairs that must be merged to make every word one token, most frequent first."""
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in spelt for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(word, best) for word in spelt]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Merges every occurrence of a pair in a word."""
    merged: list[str] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_letters() -> Iterator[str]:
    """Yields a printable letter for each byte, in the order of CLIP's vocabulary. Printable bytes map to themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    yield from map(chr, plain)
    yield from map(chr, range(256, 256 + 256 - len(plain)))
