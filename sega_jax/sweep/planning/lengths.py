"""The padded lengths of prompts, for models whose pictures depend on the longest prompt in their batch."""

from typing import Any

from sega_jax.method.arguments import arguments
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.adapters import extended_tokenizer, lora_changes
from sega_jax.sweep.description.facts import Facts, described
from sega_jax.sweep.description.fields import adapter_kinds
from sega_jax.sweep.description.points import Point
from sega_jax.systems.registry import check_adapters


class Lengths:
    """Computes the length that a point's texts are padded to.

    Batches contain only points of equal length, so that each picture is the same as if it were made in a separate call.
    """

    def __init__(self, facts: Facts):
        self._facts, self._tokenizers = facts, dict[Any, Any]()
        self._checked = set[Any]()
        self._reading = [name for name, one in arguments(facts.declaration).items() if one.of_text]

    def __call__(self, point: Point) -> Any:
        """Returns the length in the family's unit, or None if the picture does not depend on the length.

        Raises:
            CheckpointError, TypeError, ValueError: an adapter does not fit the checkpoint, or the text encoder does not
                support the point's text options.
        """
        options = {name: point.call[name] for name in self._reading if name in point.call}
        has_text_options = any(options.values())
        if has_text_options and tuple(options.items()) not in self._checked:
            reader = self._facts.family.text
            reader.check_options(reader.networks(described(self._facts).models), options)
            self._checked.add(tuple(options.items()))
        if (has_text_options or point.adapters) and point.adapters not in self._tokenizers:
            self._tokenizers[point.adapters] = tokenizer_with(self._facts, point.adapters)
        if not has_text_options:
            return None
        texts = [point.call["prompt"], point.call["negative_prompt"], *(edit.concept for edit in point.edits.values())]
        texts = [text for text in texts if text is not None]
        return self._facts.family.text.length(self._tokenizers[point.adapters], texts, **options)


def tokenizer_with(facts: Facts, adapters: tuple[tuple[str, Pairs], ...]) -> Any:
    """Checks adapters against a sweep's checkpoint, and returns the checkpoint's tokenizer with the textual inversions
    added.

    Raises:
        CheckpointError, TypeError, ValueError: an adapter does not fit, or the family does not support it.
    """
    description, kinds = described(facts), adapter_kinds()
    given = {name: kinds[name].given(pairs) for name, pairs in adapters}
    check_adapters(description.system, given)
    if "lora" in given:
        lora_changes(description.models, given["lora"])
    if "textual_inversion" in given:
        return extended_tokenizer(description.models, description.tokenizer, given["textual_inversion"])
    return description.tokenizer
