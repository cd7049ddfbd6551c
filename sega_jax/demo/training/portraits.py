"""Cartoon portraits with labelled attributes: an unlimited supply of pictures, captions and labels.

A portrait is defined by its attribute values. `render` draws it on the device from the layers of `parts.npz`
(LICENSE.md has their licences), `captions` describes some of its attributes, and `labels` returns the words that apply
to it.
"""

import functools
import importlib.resources
import re

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.demo.attributes import ATTRIBUTES as ATTRIBUTES
from sega_jax.demo.attributes import COLUMN as COLUMN
from sega_jax.demo.attributes import SIDE as SIDE
from sega_jax.demo.attributes import WORDS as WORDS
from sega_jax.demo.attributes import labels as labels
from sega_jax.demo.attributes import sample as sample
from sega_jax.demo.attributes import visible as visible
from sega_jax.demo.training.wording import captions as captions
from sega_jax.demo.training.wording import tokenizer as tokenizer

_COLOURS = {
    "hair colour": ("#171312", "#874820", "#EDBE4A", "#D8400F", "#8E9099", "#3A6BE0"),
    "skin": ("#FFE6D6", "#F0B587", "#BE7F47", "#5C3B2D"),
    "clothes colour": ("#DE2B2B", "#2F6FE0", "#2E9E4F", "#F7CF2C", "#26262B", "#F7F7F7", "#F56FB4"),
    "background": ("#8CC8FF", "#9FDF9F", "#FFF1A0", "#FFBFDA", "#C2C6CC", "#B89CF0"),
    "hat": ("#000000", "#3E4A61", "#3E4A61"),
}
# From bottom to top: the slot, the attribute that chooses the slot's part, and the attribute that determines its tint.
_SLOTS = (
    ("body", None, "skin"),
    ("clothes", "clothes", "clothes colour"),
    ("beard", "facial hair", "hair colour"),
    ("mouth", "mouth", "skin"),
    ("moustache", "facial hair", "hair colour"),
    ("nose", None, None),
    ("eyes", None, None),
    ("brows", None, None),
    ("hair", "hair", "hair colour"),
    ("glasses", "glasses", None),
    ("hat", "hat", "hat"),
)


def render(attributes: jax.Array, key: jax.Array) -> jax.Array:
    """Draws portraits. Call it inside `jax.jit`; otherwise the layers of all portraits may not fit into memory.

    Args:
        attributes: int32 [n, attributes].
        key: the random key for choosing a variant of each drawing. The attributes do not determine the variant.

    Returns:
        float32 [n, 128, 128, 3] in [-1, 1].
    """
    return 2 * compose(*layers(attributes, key), _tint("background", attributes)) - 1


def layers(attributes: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the parts' indices, int32 [n, slots], and tints, float32 [n, slots, 3] in [0, 1], from bottom to top."""
    tables, counts = (jnp.asarray(table) for table in _tables())
    slots = range(len(_SLOTS))
    choices = jnp.stack([_choice(slot, attribute, attributes) for slot, attribute, _ in _SLOTS], -1)
    chance = jax.random.uniform(key, choices.shape)
    count = counts[jnp.arange(len(_SLOTS)), choices]
    variants = jnp.minimum((chance * count.astype(jnp.float32)).astype(jnp.int32), count - 1)
    rows = jnp.stack([tables[i, choices[:, i], variants[:, i]] for i in slots], -1)
    return rows, jnp.stack([_tint(colour, attributes) for _, _, colour in _SLOTS], 1)


def compose(rows: jax.Array, tints: jax.Array, background: jax.Array) -> jax.Array:
    """Draws each part over the previous parts, and returns float32 [n, 128, 128, 3] in [0, 1].

    Args:
        rows: the parts' indices, int32 [n, slots].
        tints: the parts' colours, float32 [n, slots, 3] in [0, 1].
        background: the background's colour, float32 [n, 3] in [0, 1].
    """
    parts = jnp.asarray(_parts()[1])
    picture = jnp.broadcast_to(background[:, None, None], (len(rows), SIDE, SIDE, 3))
    for i in range(len(_SLOTS)):
        part = parts[rows[:, i]].astype(jnp.float32) / 255
        fixed, alpha, mask = part[..., :3], part[..., 3:4], part[..., 4:]
        picture = picture * (1 - alpha) + fixed + mask * tints[:, i, None, None]
    return picture.clip(0, 1)


@functools.cache
def _parts() -> tuple[list[str], np.ndarray]:
    """Reads the parts' names, and their layers uint8 [parts, 128, 128, 5]: fixed rgb (premultiplied), alpha, mask.

    Part 0 is empty.
    """
    file = importlib.resources.files("sega_jax.demo.training").joinpath("parts.npz")
    with file.open("rb") as opened, np.load(opened) as arrays:
        empty = np.zeros((1, SIDE, SIDE, 5), np.uint8)
        return ["", *arrays["names"].tolist()], np.concatenate([empty, arrays["layers"]])


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns part indices int32 [slots, choices, variants], padded, and variant counts int32 [slots, choices]."""
    names = _parts()[0]
    parts = [[_variants(names, name) for name in _choices(slot, attribute)] for slot, attribute, _ in _SLOTS]
    shape = len(parts), max(map(len, parts)), max(len(variants) for slot in parts for variants in slot)
    tables, counts = np.zeros(shape, np.int32), np.ones(shape[:2], np.int32)
    for i, slot in enumerate(parts):
        for k, variants in enumerate(slot):
            tables[i, k, : len(variants)] = variants
            counts[i, k] = len(variants)
    return tables, counts


def _choices(slot: str, attribute: str | None) -> list[str]:
    """Returns patterns that match part names, in the order of `_choice`, with * in place of the variant."""
    if attribute is None:
        return [f"{slot}/*"]
    names = [f"{slot}/{value}/*" for value in ATTRIBUTES[attribute]]
    if slot == "hair":  # each hat has its own hair parts, clipped at its brim
        return [name + (f"/{hat}" if hat != "none" else "") for name in names for hat in ATTRIBUTES["hat"]]
    return names


def _choice(slot: str, attribute: str | None, attributes: jax.Array) -> jax.Array:
    """Returns the index of each portrait's choice among the slot's `_choices`, int32 [n]."""
    if attribute is None:
        return jnp.zeros(len(attributes), jnp.int32)
    value = attributes[:, COLUMN[attribute]]
    return value * len(ATTRIBUTES["hat"]) + attributes[:, COLUMN["hat"]] if slot == "hair" else value


def _variants(names: list[str], pattern: str) -> list[int]:
    """Returns the indices of the parts that match a pattern; if none match, only the empty part's index 0."""
    shape = re.compile(pattern.replace("*", r"\d"))
    return [i for i, name in enumerate(names) if shape.fullmatch(name)] or [0]


def _tint(attribute: str | None, attributes: jax.Array) -> jax.Array:
    """Returns the colour for each portrait's attribute value, float32 [n, 3] in [0, 1]; black if `attribute` is
    None."""
    if attribute is None:
        return jnp.zeros((len(attributes), 3))
    table = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in _COLOURS[attribute]]
    return jnp.asarray(table, jnp.float32)[attributes[:, COLUMN[attribute]]]
