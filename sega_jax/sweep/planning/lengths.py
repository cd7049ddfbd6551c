"""How long the texts of pictures are, where a picture depends on what the longest text of its batch is padded to."""

from typing import Any

from sega_jax.method.arguments import arguments
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.adapters import extended_tokenizer, lora_changes
from sega_jax.sweep.description.facts import Facts, described
from sega_jax.sweep.description.fields import adapter_kinds
from sega_jax.sweep.description.points import Point
from sega_jax.systems.registry import check_adapters


class Lengths:
    """Tells to what length the texts of points are padded. Points of one batch should agree, so that each picture is
    that of a call of its own."""

    def __init__(self, facts: Facts):
        self._facts, self._tokenizers = facts, dict[Any, Any]()
        self._checked = set[Any]()
        self._reading = [name for name, one in arguments(facts.declaration).items() if one.of_text]

    def __call__(self, point: Point) -> Any:
        """Returns the length, in the family's own measure; None where no picture depends on it.

        Raises:
            CheckpointError, TypeError, ValueError: LoRAs or new words do not fit the checkpoint, or its text encoder
                cannot read texts so.
        """
        options = {name: point.call[name] for name in self._reading if name in point.call}
        read = any(options.values())
        if read and tuple(options.items()) not in self._checked:
            reader = self._facts.family.text
            reader.check_options(reader.networks(described(self._facts).models), options)
            self._checked.add(tuple(options.items()))
        if (read or point.adapters) and point.adapters not in self._tokenizers:
            self._tokenizers[point.adapters] = fitting(self._facts, point.adapters)
        if not read:
            return None
        words = [point.call["prompt"], point.call["negative_prompt"], *(edit.concept for edit in point.edits.values())]
        words = [word for word in words if word is not None]
        return self._facts.family.text.length(self._tokenizers[point.adapters], words, **options)


def fitting(facts: Facts, adapters: tuple[tuple[str, Pairs], ...]) -> Any:
    """Checks LoRAs and new words against a sweep's checkpoint, and returns its tokenizer with the new words.

    Raises:
        CheckpointError, TypeError, ValueError: they do not fit, or the family has no such adapters.
    """
    found, kinds = described(facts), adapter_kinds()
    given = {name: kinds[name].given(pairs) for name, pairs in adapters}
    check_adapters(found.system, given)
    if "lora" in given:
        lora_changes(found.models, given["lora"])
    if "textual_inversion" in given:
        return extended_tokenizer(found.models, found.tokenizer, given["textual_inversion"])
    return found.tokenizer
