"""Finds and replaces the strings in the calls of a cascade's stages."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sega_jax.method.guidance import Edit


def are_words(value: Any) -> bool:
    """Returns whether a value is a string or a non-empty list of strings."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def with_words(call: Mapping[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """Applies `read` to all strings in a call's texts; a missing negative prompt counts as the empty text."""

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return read(value)
        if isinstance(value, Edit) and isinstance(value.concept, str):
            return dataclasses.replace(value, concept=read(value.concept))
        return [one(entry) for entry in value] if isinstance(value, list | tuple) else value

    negative = "" if call["negative_prompt"] is None else call["negative_prompt"]
    changed = {"prompt": call["prompt"], "negative_prompt": negative, "edits": call["edits"]}
    return {**call, **{name: one(value) for name, value in changed.items()}}


def words_of(call: Mapping[str, Any]) -> list[str]:
    """Returns all strings in a call's texts."""
    words: list[str] = []

    def keep(word: str) -> str:
        words.append(word)
        return word

    with_words(call, keep)
    return words


def cleaned(words: str) -> str:
    """Cleans a text in the same way as DeepFloyd-IF's training captions."""
    from sega_jax.text import caption_cleaning  # requires the libraries of the extra "if"

    return caption_cleaning.clean(words) if words else words
