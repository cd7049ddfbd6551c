"""The methods that an evaluation compares: semantic guidance and its alternatives. Each method changes a request."""

from collections.abc import Callable
from typing import Any

from sega_jax.demo.attributes import WORDS, kind
from sega_jax.demo.evaluate.pictures import Request
from sega_jax.demo.settings import RECOMMENDED
from sega_jax.method.guidance import Edit

ACTIONS = ("add", "remove")
METHODS = {"add": ("sega", "conjunction", "prompt"), "remove": ("sega", "conjunction", "negative")}

Change = Callable[[Request], Request]
# How a prompt introduces words. All other words follow "with".
_PHRASES = {"bald": "with a bald head", "sad": "with a sad face"}
_ARTICLES = {"neutral face", "smile", "open mouth", "beard", "moustache"}
_VERBS = {"hat": "wearing a", "clothes": "wearing a", "clothes colour": "wearing", "background": "on a"}


def phrase(word: str) -> str:
    """Returns the phrase to append to a prompt for a word, such as "with glasses" or "wearing a hat"."""
    verb = "wearing" if word == "overalls" else _VERBS.get(WORDS[word][0])
    article = "with an" if word == "open mouth" else "with a" if word in _ARTICLES else "with"
    return _PHRASES.get(word, f"{verb or article} {word}")


def change_by(method: str, word: str, action: str, strength: float | None = None, **options: Any) -> Change:
    """Returns a function that changes a request to add or remove a word with the given method.

    Args:
        method: one of `METHODS[action]`.
        word: the word to add or remove.
        action: "add" or "remove".
        strength: the scale of the edits, or, for "prompt" and "negative", the guidance scale; None uses the recommended
            value.
        options: settings of SEGA's edits that replace the recommended ones. The scale is positive for both actions.
    """
    sign = 1 if action == "add" else -1
    if method == "prompt":
        return lambda request: request._replace(prompt=f"{request.prompt} {phrase(word)}", guidance_scale=strength)
    words = (word,) if action == "add" else kind(word)
    if method == "negative":
        return lambda request: request._replace(negative=", ".join(words), guidance_scale=strength)
    if method == "conjunction":
        scale = sign * (RECOMMENDED.call["guidance_scale"] if strength is None else strength)
        edits = [Edit(one, scale=scale, threshold=0, warmup=0, momentum_scale=0) for one in words]
    else:
        scale = options.pop("scale", strength)
        options["scale"] = sign * (Edit("").scale if scale is None else scale)
        edits = [Edit(one, **options) for one in words]
    return change_to(*edits)


def change_to(*edits: Edit) -> Change:
    """Returns a function that replaces the edits of a request."""
    return lambda request: request._replace(edits=edits)
