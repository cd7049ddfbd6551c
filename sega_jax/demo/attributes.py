"""The attributes of a cartoon portrait, how they are drawn at random, and the words that are judged.

The attributes are independent, so that an edit may change one and leave the others.
"""

import jax
import jax.numpy as jnp
import numpy as np

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


# The words that a portrait is judged by, each an edit concept as well -> the attribute and the value that it is about.
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
    """What must go for nothing of a word's kind to stay: itself, and the others of an attribute that may be none
    (sunglasses, or they come in place of glasses)."""
    name = WORDS[word][0]
    rest = [other for other, (attribute, _) in WORDS.items() if attribute == name and other != word]
    return (word, *rest) if ATTRIBUTES[name][0] == "none" else (word,)


# How often each value is drawn, where not all are equal.
_SHARES = {"glasses": (2, 1, 1), "facial hair": (2, 1, 1), "hair": (2, 3, 3, 2), "hat": (4, 1, 1)}


def sample(key: jax.Array, n: int) -> jax.Array:
    """int32 [n, attributes]: independent values, the rarer ones boosted (n is static)."""
    logits = np.full((len(ATTRIBUTES), max(map(len, ATTRIBUTES.values()))), -np.inf, np.float32)
    for i, (name, values) in enumerate(ATTRIBUTES.items()):
        logits[i, : len(values)] = np.log(_SHARES.get(name, (1,) * len(values)))
    return jax.random.categorical(key, jnp.asarray(logits), axis=-1, shape=(n, len(ATTRIBUTES))).astype(jnp.int32)


def visible(attributes: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """bool [n, attributes]: false for the hair below a hat where it is short or none, and the colour of no hair."""
    xp = jnp if isinstance(attributes, jax.Array) else np
    hair, hat = (attributes[:, COLUMN[name]] for name in ("hair", "hat"))
    hidden = (hat > 0) & (hair < ATTRIBUTES["hair"].index("long"))
    seen = {"hair": ~hidden, "hair colour": ~hidden & (hair > 0)}
    return xp.stack([seen.get(name, xp.ones_like(hidden)) for name in ATTRIBUTES], -1)


def labels(attributes: jax.Array | np.ndarray) -> np.ndarray:
    """bool [n, words]: whether each of `WORDS` is seen in each portrait."""
    attributes = np.asarray(attributes)
    seen = visible(attributes)
    columns = [COLUMN[name] for name, _ in WORDS.values()]
    values = [ATTRIBUTES[name].index(value) for name, value in WORDS.values()]
    return (attributes[:, columns] == np.array(values)) & seen[:, columns]
