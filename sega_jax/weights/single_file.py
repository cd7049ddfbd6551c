"""Checkpoints in single files, whose tensors are named as in the repository that trained them.

A `SingleFile` describes the files of one family, and `OriginalWeights` reads a network by such a description. Files
also hold tensors that no network of ours has, for example of the training; the description names them.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from sega_jax.text.files import CheckpointError
from sega_jax.weights import tensors
from sega_jax.weights.fused import Forms, parameters
from sega_jax.weights.layout import Entry, Layout, from_torch, torch_name, torch_shape
from sega_jax.weights.tensors import ENDINGS, Tensors, looks_like

# What headers call predictions, in lower case, with underscores.
_PREDICTIONS = dict.fromkeys(("v", "v_prediction", "v_pred"), "v_prediction")
_PREDICTIONS |= dict.fromkeys(("epsilon", "eps", "epsilon_prediction", "noise"), "epsilon")
Shapes = Mapping[str, tuple[int, ...]]


class Original(NamedTuple):
    """How single files name and store the tensors of one network. Their names have a prefix, `start`. The other fields
    refer to the rest of a name, except the patterns of `forms`, which are searched in the whole name."""

    start: str
    names: Callable[[Any], Mapping[str, str]]  # from the network: {key in diffusers' layout: name}
    spelling: Callable[[str], str] = str  # from a name in any spelling to the one that `names` has
    others: str = r"$^"  # a pattern that matches the start of names of other tensors
    spare: Callable[[Any], str] | None = None  # from the network: the start of names of a layer that it does without
    forms: Forms = Forms()
    ema: str = ""  # the prefix of the moving average's names, which have no dots; "" if files have no average

    def full_names(self, network: Any) -> dict[str, str]:
        """Returns the whole names of a network's parameters, by their keys in diffusers' layout."""
        return {key: self.start + name for key, name in self.names(network).items()}

    def full_name(self, key: str, network: Any) -> str | None:
        """Returns the whole name, as in `full_names`, of a tensor that a file names `key`; None for other tensors."""
        if not key.startswith(self.start):
            return None
        name = key.removeprefix(self.start)
        if re.match(self.others, name) or (self.spare and name.startswith(self.spare(network))):
            return None
        return self.start + self.spelling(name)


class SingleFile(NamedTuple):
    """What a family says about its checkpoints in single files."""

    name: str  # of the family
    networks: Mapping[str, tuple[Original, ...]]  # how files may have each network, by its folder in diffusers' layout
    recognise: Callable[[Shapes], bool]  # whether a file with tensors of these shapes is of this family, or a relative
    refuse: Callable[[Path, Shapes], None]  # raises a CheckpointError for relatives that are not supported
    # From the file, its shapes and what the model predicts (None if unknown): a folder in diffusers' layout with the
    # configs of the published checkpoint that the file resembles. It raises a CheckpointError if there is none.
    published: Callable[[Path, Shapes, str | None], Path]
    vocabularies: Mapping[str, str] = MappingProxyType({})  # repositories with the tokenizer, by that folder's name


def has_ending(path: str) -> bool:
    """Tells whether a path ends as files of tensors do."""
    return path.endswith(ENDINGS)


def is_one(source: Any) -> bool:
    """Tells by its ending, or else by its content, whether `source` names a single file."""
    if not isinstance(source, str | os.PathLike) or os.path.isdir(source):
        return False
    path = Path(source)
    return has_ending(path.name) or looks_like(path) in ("a zip file", "a pickle", "a safetensors file")


def declared(path: Path, spare: Collection[str]) -> dict[str, Any]:
    """Returns what a file says of its schedule, as entries of a scheduler's config.

    The header of a safetensors file may hold `modelspec.prediction_type`, or `modelspec.predict_key` as ComfyUI writes
    it: "v" or "epsilon", in several spellings. Tensors that declare something (`sega_jax.weights.tensors.declared`) are
    believed first.

    Args:
        spare: the names of tensors in the file that no module needs.
    """
    found: dict[str, Any] = {}
    if looks_like(path) == "a safetensors file":
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
        said = header.get("modelspec.prediction_type", header.get("modelspec.predict_key", ""))
        said = _PREDICTIONS.get(said.lower().replace("-", "_"))
        found |= {"prediction_type": said} if said else {}
    return found | tensors.declared(spare)


def resemblance(keys: Iterable[str]) -> str:
    """Says in an error what a file of unknown tensors seems to be."""
    if any("lora" in key for key in keys):
        return "it is a LoRA, which goes with a checkpoint as lora="
    if any(key.startswith("model_ema.") for key in keys):
        return "it has the moving average of a UNet (model_ema.) without its last weights; fetch the whole checkpoint"
    if any(key.startswith(("down_blocks.", "encoder.", "text_model.")) for key in keys):
        return "it is one network in diffusers layout, give the folder of the whole checkpoint"
    return f"it has {', '.join(key[:80] for key in list(keys)[:3]) or 'nothing'}"


class OriginalWeights:
    """The weights of one network in a single file, under the original's names. Fused tensors are split, and
    convolutions of size 1 that stand for linear layers are matrices.

    Args:
        path: the path of the file.
        tensors: all tensors of the file, which this object closes.
        originals: how the family's files may have the network.
        part: the network's folder in diffusers' layout, such as "unet".
        module: the network, without values.
        ema: whether to read the moving average where files of the family have one of this network.

    Raises:
        CheckpointError: the file does not have the network, or its moving average.
    """

    def __init__(
        self, path: Path, tensors: Tensors, originals: Sequence[Original], part: str, module: Any, *, ema: bool = False
    ):
        self.folder, self._tensors = path, tensors
        try:
            original = _original(path, tensors.shapes, originals, part)
            self._entries = _entries(path, tensors, original, module, ema=ema)
        except BaseException:
            self.__exit__()
            raise
        names = original.full_names(module)
        self.layout = Layout(lambda path: names[torch_name(path)], torch_shape, from_torch)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.keys = {name: key for key, name in names.items()}
        self.spare: Collection[str] = [*tensors.spare]
        self.sizes = {name: entry.nbytes for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].read()

    def buffers(self) -> dict[str, np.ndarray]:
        return {}

    def __enter__(self) -> "OriginalWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.__exit__()


def _original(path: Path, keys: Iterable[str], originals: Sequence[Original], part: str) -> Original:
    """Returns how this file has a network."""
    for original in originals:
        if any(key.startswith(original.start) for key in keys):
            return original
    raise CheckpointError(
        f"{path} has no {part}, names that start with {' or '.join(original.start for original in originals)}; give"
        f" {part}=, its own file, folder or repository, or another pipeline's (pipe.models.{part})"
    )


def _entries(path: Path, tensors: Tensors, original: Original, module: Any, *, ema: bool) -> dict[str, Entry]:
    """Returns the tensors of one network by the original's names."""
    averages = {}
    if ema and original.ema:
        names = original.names(module).values()
        averages = {original.ema + name.replace(".", ""): original.start + name for name in names}
        if averages.keys().isdisjoint(tensors.entries):
            raise CheckpointError(f"{path} has no moving average, names that start with {original.ema}; leave ema out")
    entries: dict[str, Entry] = {}
    for key, entry in tensors.entries.items():
        name = averages.get(key) if averages else original.full_name(key, module)
        if name is None:
            continue
        for parameter, piece in parameters(name, entry, original.forms):
            if parameter in entries:
                both = f"{entry.key} and {entries[parameter].key}"
                raise CheckpointError(f"{path}: {both} are the same parameter; fetch it again")
            entries[parameter] = piece
    return entries
