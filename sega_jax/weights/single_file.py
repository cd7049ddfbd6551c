"""Reads single-file checkpoints, whose tensors are named as in the original training code.

A `SingleFile` describes the files of one family, and `OriginalWeights` uses it to read one network. Files may also
contain tensors that this library's networks do not use, for example from training; the `SingleFile` names them.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from sega_jax.method.naming import in_python, name_of
from sega_jax.text.files import CheckpointError
from sega_jax.weights import tensors
from sega_jax.weights.fused import Forms, parameters
from sega_jax.weights.layout import Entry, Layout, from_torch, torch_name, torch_shape
from sega_jax.weights.tensors import ENDINGS, Tensors, looks_like

# Names of prediction types in headers, in lower case and with underscores.
_PREDICTIONS = dict.fromkeys(("v", "v_prediction", "v_pred"), "v_prediction")
_PREDICTIONS |= dict.fromkeys(("epsilon", "eps", "epsilon_prediction", "noise"), "epsilon")
Shapes = Mapping[str, tuple[int, ...]]


class Original(NamedTuple):
    """Describes how single files name and store the tensors of one network.

    All names start with the prefix `start`. The other fields refer to the rest of a name, but the patterns of `forms`
    may match any part of the full name.
    """

    start: str
    names: Callable[[Any], Mapping[str, str]]  # returns {key in diffusers' layout: name} for a network
    spelling: Callable[[str], str] = str  # translates alternative names to the names in `names`
    others: str = r"$^"  # a pattern for the beginnings of names that do not belong to the network
    spare: Callable[[Any], str] | None = None  # returns the prefix of a layer that the network does not use
    forms: Forms = Forms()
    ema: str = ""  # the prefix of the moving average's names, which have no dots; "" if there is none

    def full_names(self, network: Any) -> dict[str, str]:
        """Returns {key in diffusers' layout: full name} for a network's parameters."""
        return {key: self.start + name for key, name in self.names(network).items()}

    def full_name(self, key: str, network: Any) -> str | None:
        """Returns the full name (see `full_names`) of the tensor `key` in a file, or None if it is not a parameter."""
        if not key.startswith(self.start):
            return None
        name = key.removeprefix(self.start)
        if re.match(self.others, name) or (self.spare and name.startswith(self.spare(network))):
            return None
        return self.start + self.spelling(name)


class SingleFile(NamedTuple):
    """Describes the single-file checkpoints of one family."""

    name: str  # the display name of the family
    networks: Mapping[str, tuple[Original, ...]]  # {folder in diffusers' layout: alternative descriptions}
    recognise: Callable[[Shapes], bool]  # whether a file with the given shapes belongs to this family or a variant
    refuse: Callable[[Path, Shapes], None]  # raises a CheckpointError for unsupported variants
    # Takes the file, its shapes and its prediction type (None if unknown). Returns a folder in diffusers' layout with
    # the configs of the published checkpoint that the file resembles. Raises CheckpointError if there is none.
    published: Callable[[Path, Shapes, str | None], Path]
    vocabularies: Mapping[str, str] = MappingProxyType({})  # {name of that folder: repository with the tokenizer}


def has_ending(path: str) -> bool:
    """Returns whether a path has the extension of a weight file."""
    return path.endswith(ENDINGS)


def is_weight_file(source: Any) -> bool:
    """Returns whether `source` is a single weight file, judged by its extension or, failing that, its content."""
    if not isinstance(source, str | os.PathLike) or os.path.isdir(source):
        return False
    path = Path(source)
    return has_ending(path.name) or looks_like(path) in ("a zip file", "a pickle", "a safetensors file")


def declared(path: Path, spare: Collection[str]) -> dict[str, Any]:
    """Returns the scheduler settings that a file declares, as entries of a scheduler's config.

    The header of a safetensors file may contain `modelspec.prediction_type` or ComfyUI's `modelspec.predict_key`. The
    value is "v" or "epsilon", in several spellings. Tensors that declare settings (see
    `sega_jax.weights.tensors.declared`) take precedence.

    Args:
        path: the file.
        spare: the names of tensors in the file that no module needs.
    """
    entries: dict[str, Any] = {}
    if looks_like(path) == "a safetensors file":
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
        prediction = header.get("modelspec.prediction_type", header.get("modelspec.predict_key", ""))
        prediction = _PREDICTIONS.get(prediction.lower().replace("-", "_"))
        entries |= {"prediction_type": prediction} if prediction else {}
    return entries | tensors.declared(spare)


def resemblance(keys: Iterable[str]) -> str:
    """Describes the likely kind of a file with unknown tensors, for an error message."""
    if any("lora" in key for key in keys):
        return "it is a LoRA; load a checkpoint and pass the LoRA as lora="
    if any(key.startswith("model_ema.") for key in keys):
        return "it has only the moving average of a UNet (model_ema.), not its weights; fetch the full checkpoint"
    if any(key.startswith(("down_blocks.", "encoder.", "text_model.")) for key in keys):
        return "it is one network in diffusers' layout; give the folder of the complete checkpoint"
    return f"it contains {', '.join(key[:80] for key in list(keys)[:3]) or 'nothing'}"


class OriginalWeights:
    """Reads the weights of one network from a single file. Weights keep their original names.

    Fused tensors are split. 1 x 1 convolutions become matrices if the corresponding layer of the network is linear.

    Args:
        path: the path of the file.
        tensors: all tensors of the file. This object closes them.
        originals: alternative descriptions of the network in the family's files.
        part: the network's folder in diffusers' layout, such as "unet".
        module: the network, whose parameters have shapes but no values (`jax.ShapeDtypeStruct`).
        ema: whether to read the moving average, if the family's files may have one for this network.

    Raises:
        CheckpointError: the file lacks the network or its moving average.
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
    """Returns the description in `originals` that fits a file."""
    for original in originals:
        if any(key.startswith(original.start) for key in keys):
            return original
    raise CheckpointError(
        f"{path} has no {part} (no names that start with {' or '.join(original.start for original in originals)}); give"
        f" a file, folder or repository that contains this network as {name_of(part)}"
        + in_python(f", or another pipeline's network (pipe.models.{part})")
    )


def _entries(path: Path, tensors: Tensors, original: Original, module: Any, *, ema: bool) -> dict[str, Entry]:
    """Returns {original name: tensor} for one network."""
    averages = {}
    if ema and original.ema:
        names = original.names(module).values()
        averages = {original.ema + name.replace(".", ""): original.start + name for name in names}
        if averages.keys().isdisjoint(tensors.entries):
            raise CheckpointError(
                f"{path} has no moving average (no names that start with {original.ema}); leave out {name_of('ema')}"
            )
    entries: dict[str, Entry] = {}
    for key, entry in tensors.entries.items():
        name = averages.get(key) if averages else original.full_name(key, module)
        if name is None:
            continue
        for parameter, piece in parameters(name, entry, original.forms):
            if parameter in entries:
                keys = f"{entry.key} and {entries[parameter].key}"
                raise CheckpointError(f"{path}: {keys} are the same parameter; fetch the file again")
            entries[parameter] = piece
    return entries
