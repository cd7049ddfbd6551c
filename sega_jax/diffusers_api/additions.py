"""LoRAs and new words that pasted code adds to a checkpoint's networks. Each can be removed again."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sega_jax.pipelines.adapters import add_words, lora_changes
from sega_jax.weights.lora import Change, merged


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA in a file.

    Attributes:
        weight: what its differences are multiplied by, a number for all networks or numbers by the networks' names.
        rest: the number for networks that `weight` does not name.
    """

    path: Path
    weight: float | Mapping[str, float] = 1.0
    rest: float = 1.0

    @property
    def is_active(self) -> bool:
        return any(self.weight.values()) if isinstance(self.weight, Mapping) else bool(self.weight)

    def times(self, scale: float) -> "Lora":
        if isinstance(self.weight, Mapping):
            return Lora(self.path, {part: one * scale for part, one in self.weight.items()}, self.rest * scale)
        return Lora(self.path, self.weight * scale)

    def without(self, models: Any, parts: Collection[str]) -> "Lora":
        """Returns it with weight 0 in some networks."""
        if not isinstance(self.weight, Mapping):
            weights = dict.fromkeys(self.networks(models), self.weight)
        else:
            weights = {part: self.weight.get(part, self.rest) for part in self.networks(models)}
        return Lora(self.path, {part: 0.0 if part in parts else one for part, one in weights.items()})

    def changes(self, models: Any) -> list[Change]:
        """Returns what it adds to networks.

        Raises:
            ValueError, CheckpointError: a weight is no number, or the file is broken or does not fit.
        """
        if not isinstance(self.weight, Mapping):
            return lora_changes(models, {self.path: self.weight}) if self.weight else []
        (whole,) = lora_changes(models, {self.path: 1.0})
        return [
            whole._replace(
                scale=float(self.weight.get(part, self.rest)),
                layers={other: layers if other == part else {} for other in whole.layers},
            )
            for part, layers in whole.layers.items()
            if self.weight.get(part, self.rest)
        ]

    def networks(self, models: Any) -> list[str]:
        """Returns the names of the networks that it changes."""
        (whole,) = lora_changes(models, {self.path: 1.0})
        return [part for part, layers in whole.layers.items() if layers]


@dataclasses.dataclass(frozen=True)
class Additions:
    """A checkpoint's networks and tokenizer, with the LoRAs and new words that are added to them.

    Attributes:
        models, tokenizer: without the additions.
        words: new words and their files, in order; a word is None where the file names it.
        loras: the LoRAs that are loaded, by name.
        fused: those that are fused, each as it is loaded, and with its weight as it is fused.
        enabled: whether the loaded ones act.
    """

    models: Any
    tokenizer: Any
    words: tuple[tuple[str | None, Path], ...] = ()
    loras: Mapping[str, Lora] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[Lora, Lora]] = dataclasses.field(default_factory=dict)
    enabled: bool = True

    def build(self, scale: float = 1.0) -> tuple[Any, Any]:
        """Returns networks and tokenizer with the additions; `scale` multiplies the weights of LoRAs that are not
        fused. Those that are not fused are added in float32 and rounded to the dtype of the weights only once.

        Raises:
            TypeError, ValueError, CheckpointError: as `sega_jax.merge_lora` and `sega_jax.add_words`.
        """
        models, tokenizer = self.models, self.tokenizer
        for word, path in self.words:
            models, tokenizer = add_words(models, tokenizer, path if word is None else {word: path})
        if self.fused:
            models = _with(models, [lora for _, lora in self.fused.values()])
        if self.enabled and self.loras and scale:
            models = _with(models, [lora.times(scale) for lora in self.loras.values()])
        return models, tokenizer

    @property
    def known(self) -> dict[str, Lora]:
        """All LoRAs by name, fused ones with the weights that they have when they are not fused."""
        return {**{name: lora for name, (lora, _) in self.fused.items()}, **self.loras}

    def fuse(self, names: list[str], scale: float) -> "Additions":
        """Fuses loaded LoRAs."""
        fused = {name: (self.loras[name], self.loras[name].times(scale)) for name in names if name in self.loras}
        rest = {name: lora for name, lora in self.loras.items() if name not in fused}
        return dataclasses.replace(self, loras=rest, fused={**self.fused, **fused})

    def unfuse(self) -> "Additions":
        """Takes fused LoRAs out of the weights; they stay loaded."""
        return dataclasses.replace(self, loras=self.known, fused={})

    def unload(self) -> "Additions":
        """Takes all LoRAs away but for those that are fused, which stay in the networks for good."""
        models = _with(self.models, [lora for _, lora in self.fused.values()]) if self.fused else self.models
        return dataclasses.replace(self, models=models, loras={}, fused={}, enabled=True)


def _with(models: Any, loras: list[Lora]) -> Any:
    return merged(models, [change for lora in loras for change in lora.changes(models)])
