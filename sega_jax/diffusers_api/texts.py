"""Words and embeddings in the forms that diffusers' pipelines take."""

from typing import Any

from sega_jax.method.checks import brief
from sega_jax.method.numerics import floating
from sega_jax.systems.conditioning import Text, check_rows


def prompt_pairs(prompt: Any, negative: Any) -> tuple[list[str], list[str]]:
    """Returns prompts and as many negative prompts.

    Raises:
        TypeError, ValueError: a prompt is not words, or their numbers differ.
    """
    lists = [[words] if isinstance(words, str) else words for words in (prompt, negative)]
    for name, words in zip(("prompt", "negative_prompt"), lists, strict=True):
        if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
            raise TypeError(f"{name}={brief(words)} should be words or a non-empty list of them")
    prompts, negatives = map(list, lists)
    negatives = negatives * len(prompts) if isinstance(negative, str) else negatives
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt has {len(negatives)} entries, expected {len(prompts)}, one for each prompt")
    return prompts, negatives


def split(embeddings: Any) -> list[Any]:
    """Returns the concepts of `editing_prompt_embeddings`; see `PipelineArguments.concepts`.

    Raises:
        TypeError, ValueError: the embeddings have another type or shape.
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
        raise ValueError(f"editing_prompt_embeddings have shape {array.shape}, expected {axes}")
    return [list(row) for row in array] if array.ndim == 4 else list(array)
