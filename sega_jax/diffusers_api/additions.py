"""LoRAs and textual inversions that are added to a checkpoint's networks and can be removed again."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sega_jax.pipelines.adapters import add_words, lora_changes
from sega_jax.weights.lora import Change, merged


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file and its weights.

    Attributes:
        path: the file.
        weight: a factor for the LoRA's changes, either one number for all networks or {network: number}.
        default_weight: the factor for networks that are missing from `weight`.
    """

    path: Path
    weight: float | Mapping[str, float] = 1.0
    default_weight: float = 1.0

    @property
    def is_active(self) -> bool:
        """Whether any weight differs from 0."""
        return any(self.weight.values()) if isinstance(self.weight, Mapping) else bool(self.weight)

    def scaled(self, scale: float) -> "Lora":
        """Returns this LoRA with all weights multiplied by `scale`."""
        if isinstance(self.weight, Mapping):
            return Lora(
                self.path,
                {network: weight * scale for network, weight in self.weight.items()},
                self.default_weight * scale,
            )
        return Lora(self.path, self.weight * scale)

    def without_networks(self, models: Any, excluded: Collection[str]) -> "Lora":
        """Returns this LoRA with weight 0 for the excluded networks."""
        if not isinstance(self.weight, Mapping):
            weights = dict.fromkeys(self.networks(models), self.weight)
        else:
            weights = {network: self.weight.get(network, self.default_weight) for network in self.networks(models)}
        return Lora(self.path, {network: 0.0 if network in excluded else weight for network, weight in weights.items()})

    def changes(self, models: Any) -> list[Change]:
        """Returns the changes that this LoRA makes to the networks.

        Raises:
            ValueError, CheckpointError: a weight is not a number, or the file is broken or does not fit the networks.
        """
        if not isinstance(self.weight, Mapping):
            return lora_changes(models, {self.path: self.weight}) if self.weight else []
        (change,) = lora_changes(models, {self.path: 1.0})
        return [
            change._replace(
                scale=float(self.weight.get(network, self.default_weight)),
                layers={other: layers if other == network else {} for other in change.layers},
            )
            for network, layers in change.layers.items()
            if self.weight.get(network, self.default_weight)
        ]

    def networks(self, models: Any) -> list[str]:
        """Returns the names of the networks that this LoRA changes."""
        (change,) = lora_changes(models, {self.path: 1.0})
        return [network for network, layers in change.layers.items() if layers]


@dataclasses.dataclass(frozen=True)
class Additions:
    """A checkpoint's networks and tokenizer, with the LoRAs and new words to add to them.

    Attributes:
        models, tokenizer: the networks and the tokenizer without the additions.
        words: (new word, its file) pairs, in the order in which they were added. The word is None if the file contains
            several words.
        loras: {name: loaded LoRA that is not fused}.
        fused: {name: (LoRA with its weight before fusing, LoRA with the fused weight)}.
        enabled: whether the LoRAs in `loras` are merged.
    """

    models: Any
    tokenizer: Any
    words: tuple[tuple[str | None, Path], ...] = ()
    loras: Mapping[str, Lora] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[Lora, Lora]] = dataclasses.field(default_factory=dict)
    enabled: bool = True

    def build(self, scale: float = 1.0) -> tuple[Any, Any]:
        """Returns the networks and the tokenizer with the additions.

        LoRAs that are not fused are summed in float32, and the sum is rounded once to the dtype of the weights.

        Args:
            scale: multiplies the weights of LoRAs that are not fused.

        Raises:
            TypeError, ValueError, CheckpointError: as for `sega_jax.merge_lora` and `sega_jax.add_words`.
        """
        models, tokenizer = self.models, self.tokenizer
        for word, path in self.words:
            models, tokenizer = add_words(models, tokenizer, path if word is None else {word: path})
        if self.fused:
            models = _merge_loras(models, [lora for _, lora in self.fused.values()])
        if self.enabled and self.loras and scale:
            models = _merge_loras(models, [lora.scaled(scale) for lora in self.loras.values()])
        return models, tokenizer

    @property
    def all_loras(self) -> dict[str, Lora]:
        """All LoRAs, as {name: LoRA}. Fused LoRAs have the weight that they had before fusing."""
        return {**{name: lora for name, (lora, _) in self.fused.items()}, **self.loras}

    def fuse(self, names: list[str], scale: float) -> "Additions":
        """Returns these additions with the named LoRAs fused and their weights multiplied by `scale`."""
        fused = {name: (self.loras[name], self.loras[name].scaled(scale)) for name in names if name in self.loras}
        unfused = {name: lora for name, lora in self.loras.items() if name not in fused}
        return dataclasses.replace(self, loras=unfused, fused={**self.fused, **fused})

    def unfuse(self) -> "Additions":
        """Returns these additions with all fused LoRAs unfused but still loaded."""
        return dataclasses.replace(self, loras=self.all_loras, fused={})

    def unload(self) -> "Additions":
        """Returns these additions without LoRAs. Fused LoRAs become a permanent part of `models`."""
        models = _merge_loras(self.models, [lora for _, lora in self.fused.values()]) if self.fused else self.models
        return dataclasses.replace(self, models=models, loras={}, fused={}, enabled=True)


def _merge_loras(models: Any, loras: list[Lora]) -> Any:
    return merged(models, [change for lora in loras for change in lora.changes(models)])
