"""The attributes of a cartoon portrait, their random values, and the words that the judge knows.

The attributes are independent, so an edit can change one attribute and keep the others.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Numbers = TypeVar("Numbers", jax.Array, np.ndarray)

ATTRIBUTES = {
    "glasses": ("none", "glasses", "sunglasses"),
    "mouth": ("neutral", "smile", "sad", "open"),
    "facial hair": ("none", "beard", "moustache"),
    "hair": ("bald", "short", "long", "curly"),
    "hair colour": ("black", "brown", "blond", "red", "grey", "blue"),
    "hat": ("none", "hat", "beanie"),
    "skin": ("pale", "tanned", "brown", "dark"),
    "clothes": ("shirt", "hoodie", "jacket", "overalls"),
    "clothes colour": ("red", "blue", "green", "yellow", "black", "white", "pink"),
    "background": ("blue", "green", "yellow", "pink", "grey", "purple"),
}
COLUMN = {name: i for i, name in enumerate(ATTRIBUTES)}
SIDE = 128  # the width and height of a portrait, in pixels


# The attribute and value of each word that the judge knows. The words are also used as concepts in edits.
WORDS = {
    "glasses": ("glasses", "glasses"),
    "sunglasses": ("glasses", "sunglasses"),
    "neutral face": ("mouth", "neutral"),
    "smile": ("mouth", "smile"),
    "sad": ("mouth", "sad"),
    "open mouth": ("mouth", "open"),
    "beard": ("facial hair", "beard"),
    "moustache": ("facial hair", "moustache"),
    "bald": ("hair", "bald"),
    **{f"{value} hair": ("hair", value) for value in ATTRIBUTES["hair"][1:]},
    **{f"{value} hair": ("hair colour", value) for value in ATTRIBUTES["hair colour"]},
    "hat": ("hat", "hat"),
    "beanie": ("hat", "beanie"),
    **{f"{value} skin": ("skin", value) for value in ATTRIBUTES["skin"]},
    **{value: ("clothes", value) for value in ATTRIBUTES["clothes"]},
    **{f"{value} clothes": ("clothes colour", value) for value in ATTRIBUTES["clothes colour"]},
    **{f"{value} background": ("background", value) for value in ATTRIBUTES["background"]},
}


def kind(word: str) -> tuple[str, ...]:
    """Returns all words that must be removed so that neither the given word nor an alternative remains.

    They are the word itself and, if its attribute may be absent, the attribute's other words. For example, if only
    glasses are removed, the model draws sunglasses instead.
    """
    name = WORDS[word][0]
    rest = [other for other, (attribute, _) in WORDS.items() if attribute == name and other != word]
    return (word, *rest) if ATTRIBUTES[name][0] == "none" else (word,)


# Relative frequencies of the values. The values of all other attributes are equally frequent.
_SHARES = {"glasses": (2, 1, 1), "facial hair": (2, 1, 1), "hair": (2, 3, 3, 2), "hat": (4, 1, 1)}


def sample(key: jax.Array, n: int) -> jax.Array:
    """Draws independent attribute values, int32 [n, attributes]. Under `jax.jit`, n must be static."""
    logits = np.full((len(ATTRIBUTES), max(map(len, ATTRIBUTES.values()))), -np.inf, np.float32)
    for i, (name, values) in enumerate(ATTRIBUTES.items()):
        logits[i, : len(values)] = np.log(_SHARES.get(name, (1,) * len(values)))
    return jax.random.categorical(key, jnp.asarray(logits), axis=-1, shape=(n, len(ATTRIBUTES))).astype(jnp.int32)


def visible(attributes: Numbers) -> Numbers:
    """Returns bool [n, attributes]: whether each attribute is visible.

    A hat hides short hair and baldness, and hidden hair or a bald head has no visible hair colour.
    """
    xp = jnp if isinstance(attributes, jax.Array) else np
    hair, hat = (attributes[:, COLUMN[name]] for name in ("hair", "hat"))
    hidden = (hat > 0) & (hair < ATTRIBUTES["hair"].index("long"))
    seen = {"hair": ~hidden, "hair colour": ~hidden & (hair > 0)}
    return xp.stack([seen.get(name, xp.ones_like(hidden)) for name in ATTRIBUTES], -1)


def labels(attributes: jax.Array | np.ndarray) -> np.ndarray:
    """Returns bool [n, words]: whether each of `WORDS` is visible in each portrait."""
    attributes = np.asarray(attributes)
    seen = visible(attributes)
    columns = [COLUMN[name] for name, _ in WORDS.values()]
    values = [ATTRIBUTES[name].index(value) for name, value in WORDS.values()]
    return (attributes[:, columns] == np.array(values)) & seen[:, columns]
