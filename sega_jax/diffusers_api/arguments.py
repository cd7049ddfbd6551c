"""diffusers' words for semantic guidance, as all of its faces have them: arguments to edits."""

import dataclasses
import math
import warnings
from typing import Any

import jax
import numpy as np

from sega_jax.method.guidance import Edit
from sega_jax.method.numerics import floating
from sega_jax.pipelines.batch import number, whole
from sega_jax.systems.base import Record


def either(name: str, words: Any, embeddings: Any, needed: bool = True) -> Any:
    """Words, or in their place embeddings [prompts, tokens, channels]."""
    if words is not None and embeddings is not None:
        raise ValueError(f"{name} and {name}_embeds were both given; they say the same thing, give one")
    if embeddings is None:
        if words is None and needed:
            raise TypeError(f"{name}=None should be words, or give {name}_embeds")
        return words
    axes = "(prompts, tokens, channels)"
    embeddings = floating(f"{name}_embeds", embeddings, axes)
    if embeddings.ndim != 3:
        raise ValueError(f"{name}_embeds has shape {embeddings.shape}, expected {axes}")
    return embeddings


def guidance_scale(value: Any) -> Any:
    """One or several; up to 1, diffusers takes the plain conditional estimate, which is a scale of 1."""
    several = isinstance(value, list | tuple | np.ndarray)
    scales = [max(number("guidance_scale", scale), 1.0) for scale in (value if several else [value])]
    return scales if several else scales[0]


def no_generator(value: None) -> None:
    if value is not None:
        raise TypeError("generator is torch's; give seed=, one number or one a picture, or a JAX key=")


def count(given: Any) -> int:
    """Of prompts, as words or embeddings [prompts, tokens, channels]."""
    return 1 if isinstance(given, str) or not hasattr(given, "__len__") else len(given)


def replayed(recorded: Any, prompts: int, pictures: int) -> np.ndarray | None:
    if recorded is None:
        return None
    rows = prompts * whole("num_images_per_prompt", pictures, 1)
    axes = "(calls, rows, height, width, channels)"
    recorded = floating("sem_guidance", recorded, axes)
    if recorded.ndim != 5 or recorded.shape[1] not in (1, rows):
        raise ValueError(f"sem_guidance has shape {recorded.shape}, expected {axes}, {rows} rows or one for all")
    return np.moveaxis(recorded, 0, 1)


def recorded(record: Record | None) -> dict[str, np.ndarray | None]:
    """What was recorded, calls first."""
    if record is None:
        return {}
    return {
        "sem_guidance": np.moveaxis(record.sem_guidance, 0, 1),
        "uncond_estimates": np.moveaxis(record.uncond, 0, 1),
        "text_estimates": np.moveaxis(record.cond, 0, 1),
        "edit_estimates": None if record.edits is None else np.moveaxis(record.edits, 0, 2),
    }


def concepts(words: Any, embeddings: Any) -> list:
    """Concepts for all rows, or a list of concepts for each prompt."""
    words = [words] if isinstance(words, str) and words else words
    if words:
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"editing_prompt={words!r} should be words or a list of them")
        return list(words)
    if embeddings is None:
        return []
    axes = "(n, tokens, channels) or (prompts, n, tokens, channels)"
    embeddings = floating("editing_prompt_embeddings", embeddings, axes)
    if embeddings.ndim not in (3, 4):
        raise ValueError(f"editing_prompt_embeddings have shape {embeddings.shape}, expected {axes}")
    return [list(row) for row in embeddings] if embeddings.ndim == 4 else list(embeddings)


_DEFAULTS = {"scale": 5.0, "reverse": False, "threshold": 0.9, "warmup": 10, "cooldown": None, "weight": 1.0}
_NAMES = {
    "scale": "edit_guidance_scale",
    "reverse": "reverse_editing_direction",
    "threshold": "edit_threshold",
    "warmup": "edit_warmup_steps",
    "cooldown": "edit_cooldown_steps",
    "weight": "edit_weights",
}


def edits(concepts: list, **settings: Any) -> list:
    rows = concepts if concepts and isinstance(concepts[0], list) else [concepts]
    n = len(rows[0])
    columns = {name: _broadcast(name, value, n) for name, value in settings.items()}
    edits = []
    for row in rows:
        edits.append([])
        for k, concept in enumerate(row):
            one = {name: column[k] for name, column in columns.items()}
            reverse = one.pop("reverse")
            edit = Edit(concept, **one)
            edits[-1].append(dataclasses.replace(edit, scale=-edit.scale) if reverse else edit)
    return edits if rows is concepts else edits[0]


def _broadcast(name: str, value: Any, n: int) -> list:
    """One entry a concept, from a scalar, list, tuple or array."""
    if isinstance(value, np.ndarray | jax.Array):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        value = [value] * n
    elif name == "weight" and not value:
        value = [None] * n
    if len(value) < n:
        raise ValueError(f"{_NAMES[name]} has {len(value)} entries for {n} concepts; give one each, or one for all")
    if len(value) > n > 0:
        warnings.warn(f"{_NAMES[name]} has {len(value)} entries for {n} concepts; the last are ignored", stacklevel=5)
    value = [_DEFAULTS[name] if v is None else v for v in value[:n]]
    if name == "reverse" and not all(isinstance(v, bool | np.bool_) for v in value):
        raise TypeError(f"{_NAMES[name]}={value!r} should be True or False, or one each")
    if name in ("warmup", "cooldown"):
        # i >= 10.5 begins at call 11.
        value = [math.ceil(v) if isinstance(v, float) and math.isfinite(v) else v for v in value]
    return value
