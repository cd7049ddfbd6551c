"""Reads prompts and embeddings in the forms that diffusers' pipelines accept."""

from typing import Any

from sega_jax.method.checks import brief
from sega_jax.method.numerics import floating
from sega_jax.systems.conditioning import Text, check_rows


def prompt_pairs(prompt: Any, negative: Any) -> tuple[list[str], list[str]]:
    """Returns the prompts and the negative prompts as two lists of the same length.

    Args:
        prompt: a prompt or a list of prompts.
        negative: one negative prompt for all prompts, or a list with one for each.

    Raises:
        TypeError, ValueError: a prompt is not a string, a list is empty, or the lengths of the lists differ.
    """
    lists = [[texts] if isinstance(texts, str) else texts for texts in (prompt, negative)]
    for name, texts in zip(("prompt", "negative_prompt"), lists, strict=True):
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name}={brief(texts)} should be a string or a non-empty list of strings")
    prompts, negatives = map(list, lists)
    negatives = negatives * len(prompts) if isinstance(negative, str) else negatives
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt has {len(negatives)} entries, expected {len(prompts)}, one for each prompt")
    return prompts, negatives


def split(embeddings: Any) -> list[Any]:
    """Splits `editing_prompt_embeddings` into concepts; see `PipelineArguments.concepts`.

    Args:
        embeddings: an array [n, tokens, channels] or [prompts, n, tokens, channels], a `Text` with n rows, a list with
            one `Text` for each prompt, or None.

    Returns:
        A list of n concepts, or a list of such lists, one for each prompt. The list is empty if `embeddings` is None.

    Raises:
        TypeError, ValueError: the embeddings have the wrong type or shape.
    """
    if embeddings is None:
        return []
    if isinstance(embeddings, Text):
        check_rows("editing_prompt_embeddings", embeddings)
        return list(embeddings)
    if isinstance(embeddings, list) and all(isinstance(row, Text) for row in embeddings):
        return [list(row) for row in embeddings]
    axes = "(n, tokens, channels) or (prompts, n, tokens, channels)"
    array = floating("editing_prompt_embeddings", embeddings, axes)
    if array.ndim not in (3, 4):
        raise ValueError(f"editing_prompt_embeddings has shape {array.shape}, expected {axes}")
    return [list(row) for row in array] if array.ndim == 4 else list(array)
