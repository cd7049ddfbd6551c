"""LoRAs and their relatives: differences of weights, which are read from files and added to a checkpoint's.

A file's tensors are grouped by the layers that they change (`sega_jax.weights.lora_layers`, `lora_names`). Each layer
has a form, which says how its tensors become a difference (`lora_forms`, `lora_products`). Names and shapes are checked
first. Values are read one layer at a time, once to check them and once to merge them.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sega_jax.method.numerics import at_least_float32, is_finite
from sega_jax.text.files import CheckpointError
from sega_jax.weights import lora_files
from sega_jax.weights.layout import flax_name, from_torch, leaves, to_torch, torch_name
from sega_jax.weights.lora_layers import Layer, layers_of
from sega_jax.weights.lora_names import WORDS, parsed, unsupported
from sega_jax.weights.lora_names import LoraNames as LoraNames
from sega_jax.weights.lora_names import layer_keys as layer_keys
from sega_jax.weights.lora_products import FORMS
from sega_jax.weights.lora_settings import factors, is_number, lacks_settings
from sega_jax.weights.single_file import SingleFile
from sega_jax.weights.tensors import Tensors

M = TypeVar("M", bound=NamedTuple)

Files = str | Path | Mapping[str | Path, float]
# {layer, with the network's prefix and underscores: (out, in) of its weight, or () where the tensors do not say}.
LayerSizes = Mapping[str, tuple[int, ...]]

# Problems that an error lists; it counts the others.
_LISTED = 10


class Change(NamedTuple):
    """The differences in one file and their scale."""

    path: Path
    scale: float
    layers: dict[str, dict[str, Layer]]  # by network, then by the key of the weight or bias in diffusers' layout


class Families(NamedTuple):
    """Which checkpoints LoRAs are made for, as far as it shows in them; for errors."""

    of_file: Callable[[LayerSizes], str | None] = lambda sizes: None  # returns the family's name for people
    of_checkpoint: Callable[[LayerSizes], str | None] = lambda sizes: None


def read(
    networks: Mapping[str, Any],
    lora: Files,
    names: Mapping[str, LoraNames],
    checkpoints: Iterable[SingleFile] = (),
    families: Families | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Change]:
    """Reads LoRAs and their relatives for networks, with or without values.

    Args:
        networks: by the names that diffusers' layout has for them, such as "unet".
        lora: a file, folder or name on the hub (`lora_files.find`), whose scale is 1, or {file: scale}.
        names: how files name the layers of each network.
        checkpoints: descriptions of checkpoints in single files, which people mistake for LoRAs.
        families: recognises LoRAs of other checkpoints; None does not.
        warn: gets a message about parts of a file that are not used.

    Raises:
        TypeError: `lora` is neither a path nor {path: scale}.
        ValueError: a scale is no finite number.
        CheckpointError: a file is missing or broken, has tensors of no LoRA or of no layer of these networks, does not
            fit, or is of a method that is not supported; the error lists the first such tensors.
    """
    scales = list(lora.items()) if isinstance(lora, Mapping) else [(lora, 1.0)]
    for path, scale in scales:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"lora={lora!r} should be the path of a LoRA, or {{path: scale}} of several")
        if not is_number(scale):
            raise ValueError(f"lora: the scale {scale!r} of {path} should be a finite number like 0.8")
    files = [(lora_files.find(path), float(scale)) for path, scale in scales]
    families = families or Families()
    return [Change(path, scale, _layers(path, networks, names, checkpoints, families, warn)) for path, scale in files]


def merged(models: M, changes: Sequence[Change]) -> M:
    """Returns a NamedTuple of networks with values, to whose weights the changes are added.

    Each weight and its differences are summed in float32 and rounded to the weight's dtype once. Every difference
    starts from the given weight, so that the order of the changes does not matter. Networks that are None stay so.

    Raises:
        CheckpointError: a sum overflows the dtype of the weights.
    """
    networks = models._asdict()
    parts = {
        part for change in changes for part, layers in change.layers.items() if layers and networks[part] is not None
    }
    return models._replace(**{part: _merged(networks[part], part, changes) for part in parts})


def _merged(network: Any, part: str, changes: Sequence[Change]) -> Any:
    def add(path: tuple, leaf: jax.Array) -> jax.Array:
        key = torch_name(path)
        own = [change for change in changes if key in change.layers[part]]
        if not own:
            return leaf
        weight = np.asarray(leaf)
        wide = to_torch(flax_name(path), weight).astype(at_least_float32(weight.dtype))
        # A result that is not finite is an error below.
        with np.errstate(over="ignore", invalid="ignore"):
            differences = [np.float32(change.scale) * change.layers[part][key].difference(wide) for change in own]
            total = from_torch(path, sum(differences, wide)).astype(weight.dtype)
        if not is_finite(total):
            files = " and ".join(str(change.path) for change in own)
            raise CheckpointError(f"{files}: {key} overflows {total.dtype} once merged; use another dtype or scale")
        return jax.device_put(np.ascontiguousarray(total), leaf.sharding)

    return jax.tree_util.tree_map_with_path(add, network)


def _layers(
    path: Path,
    networks: Mapping[str, Any],
    names: Mapping[str, LoraNames],
    checkpoints: Iterable[SingleFile],
    families: Families,
    warn: Callable[[str], None],
) -> dict[str, dict[str, Layer]]:
    """Reads the layers of a file, by network and by the key of the weight or bias."""
    # The file stays open as long as a layer can be read.
    tensors = lora_files.opened(path)
    for file in checkpoints:
        if file.recognise(tensors.shapes):
            raise CheckpointError(
                f"{path} is no LoRA, but a whole checkpoint: give it to load as its source ({file.name})"
            )
    if method := unsupported(tensors.shapes):
        raise CheckpointError(f"{path} has {method}, which is not supported; use a LoRA of another kind")
    if any(name.startswith(WORDS) for name in tensors.shapes):
        warn(f"{path} also has words of textual inversion, which are not added")
    if lacks_settings(path, tensors.shapes):
        warn(
            f"{path} is peft's and has no adapter_config.json next to it, which says how strong it is: alpha is taken"
            " to equal the rank"
        )
    factor = factors(path, networks, tensors.shapes)
    layers, problems = layers_of(path, tensors, networks, names, factor)
    if problems or not any(layers.values()):
        raise _misfit(path, networks, tensors, families, problems)
    return layers


def _misfit(
    path: Path, networks: Mapping[str, Any], tensors: Tensors, families: Families, problems: Sequence[str]
) -> CheckpointError:
    """Returns the error for a file that does not fit: which family it is of, or else its first problems."""
    theirs, ours = families.of_file(_sizes_in(tensors.shapes)), families.of_checkpoint(_sizes_of(networks))
    if theirs and ours and theirs != ours:
        return CheckpointError(
            f"{path} is a LoRA of {theirs}, and this checkpoint is {ours}; use a LoRA that was made for {ours}"
        )
    listed = sorted(problems)[:_LISTED] or ["  it has no tensors"]
    more = [f"  and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return CheckpointError(
        f"{path} is no LoRA of this checkpoint's {' and '.join(networks)}:\n" + "\n".join([*listed, *more])
    )


def _sizes_in(tensors: Mapping[str, tuple[int, ...]]) -> LayerSizes:
    """Returns the sizes of the weights that a file's tensors are made for."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        if parts := parsed(name):
            layers.setdefault(parts.layer, {})[parts.role] = shape
    return {layer: _size(shapes) for layer, shapes in layers.items()}


def _size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the size of the weight that a layer's tensors are made for, or () where they do not say."""
    for form in FORMS:
        if not form.of_bias and any(needed <= shapes.keys() for needed in form.needs):
            return form.sizes(shapes) or ()
    return ()


def _sizes_of(networks: Mapping[str, Any]) -> LayerSizes:
    """Returns the sizes of networks' weights, under such names as files have."""
    return {
        f"{part}_{key.removesuffix('.weight').replace('.', '_')}": shape[:2]
        for part, network in networks.items()
        for key, shape in leaves(network).items()
    }
