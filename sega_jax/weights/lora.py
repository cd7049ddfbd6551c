"""Reads LoRAs and related adapters from files, and merges their weight differences into networks.

The tensors of a file are grouped by the layer that they change (`sega_jax.weights.lora_layers`, `lora_names`). The form
of an adapter determines how the tensors of a layer become a weight difference (`lora_forms`, `lora_products`). Names
and shapes are checked first. The arrays are read one layer at a time, once to check them and once to merge them.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sega_jax.method.naming import assignment, name_of
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
# {layer name with the network's prefix and underscores for dots: (out, in) of its weight, or () if unknown}.
LayerSizes = Mapping[str, tuple[int, ...]]

# The maximum number of problems that an error message lists. The rest are only counted.
_LISTED = 10


class Change(NamedTuple):
    """The weight differences from one file, and their scale."""

    path: Path
    scale: float
    layers: dict[str, dict[str, Layer]]  # {network: {key of the weight or bias in diffusers' layout: difference}}


class Families(NamedTuple):
    """Recognises the families of LoRAs and checkpoints by their layers, so that error messages can name them.

    Both fields are functions that return a family's display name, or None if they do not recognise the family.
    """

    of_file: Callable[[LayerSizes], str | None] = lambda sizes: None
    of_checkpoint: Callable[[LayerSizes], str | None] = lambda sizes: None


def read(
    networks: Mapping[str, Any],
    lora: Files,
    names: Mapping[str, LoraNames],
    checkpoints: Iterable[SingleFile] = (),
    families: Families | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Change]:
    """Reads LoRAs and related adapters for networks. Only the shapes of their parameters are needed.

    Args:
        networks: {folder in diffusers' layout, such as "unet": network}.
        lora: {file: scale}, or one file to use with scale 1. A folder or a name on the hub may replace the path of a
            file (see `lora_files.find`).
        names: how files name the layers of each network.
        checkpoints: descriptions of single-file checkpoints, to recognise a checkpoint that was passed as a LoRA by
            mistake.
        families: recognises LoRAs for other families of checkpoints; None means that none are recognised.
        warn: called with a message if parts of a file are not used or settings are missing.

    Returns:
        One change for each file, in the order of `lora`.

    Raises:
        TypeError: `lora` is neither a path nor {path: scale}.
        ValueError: a scale is not a finite number.
        CheckpointError: a file is missing or broken, contains tensors that do not belong to a LoRA, changes layers that
            are missing from the networks or have different shapes there, or uses an unsupported method. The error
            message lists the first few problems.
    """
    scales = list(lora.items()) if isinstance(lora, Mapping) else [(lora, 1.0)]
    for path, scale in scales:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"{assignment('lora', lora)} should be the path of a LoRA, or {{path: scale}} for several LoRAs"
            )
        if not is_number(scale):
            raise ValueError(f"lora: the scale {scale!r} of {path} should be a finite number like 0.8")
    files = [(lora_files.find(path), float(scale)) for path, scale in scales]
    families = families or Families()
    return [Change(path, scale, _layers(path, networks, names, checkpoints, families, warn)) for path, scale in files]


def merged(models: M, changes: Sequence[Change]) -> M:
    """Adds changes to the weights of loaded networks, and returns a new NamedTuple of networks.

    Each weight and its differences are summed in float32 or a wider dtype, and the sum is rounded once to the weight's
    dtype. Every difference is computed from the original weight, so the order of the changes does not matter. Networks
    that are None stay None.

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
        relevant = [change for change in changes if key in change.layers[part]]
        if not relevant:
            return leaf
        weight = np.asarray(leaf)
        wide = to_torch(flax_name(path), weight).astype(at_least_float32(weight.dtype))
        # Non-finite sums are reported below.
        with np.errstate(over="ignore", invalid="ignore"):
            differences = [np.float32(change.scale) * change.layers[part][key].difference(wide) for change in relevant]
            total = from_torch(path, sum(differences, wide)).astype(weight.dtype)
        if not is_finite(total):
            files = " and ".join(str(change.path) for change in relevant)
            raise CheckpointError(
                f"{files}: {key} overflows {total.dtype} when merged; use a different dtype or a smaller scale"
            )
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
    """Returns {network: {key of the weight or bias: difference}} for a file."""
    # The file stays open, because the arrays of the layers are read later.
    tensors = lora_files.opened(path)
    for file in checkpoints:
        if file.recognise(tensors.shapes):
            raise CheckpointError(
                f"{path} is not a LoRA but a checkpoint ({file.name}); give it as {name_of('source')}"
            )
    if method := unsupported(tensors.shapes):
        raise CheckpointError(f"{path} contains {method}, which is not supported; use a different kind of LoRA")
    if any(name.startswith(WORDS) for name in tensors.shapes):
        warn(f"{path} also contains words from textual inversion, which are ignored")
    if lacks_settings(path, tensors.shapes):
        warn(
            f"{path} was written by peft but has no adapter_config.json (which stores alpha) next to it; alpha is"
            " assumed to equal the rank"
        )
    factor = factors(path, networks, tensors.shapes)
    layers, problems = layers_of(path, tensors, networks, names, factor)
    if problems or not any(layers.values()):
        raise _misfit(path, networks, tensors, families, problems)
    return layers


def _misfit(
    path: Path, networks: Mapping[str, Any], tensors: Tensors, families: Families, problems: Sequence[str]
) -> CheckpointError:
    """Returns the error for a LoRA that does not fit. It names the LoRA's family if known, or else the problems."""
    lora_family, family = families.of_file(_sizes_in(tensors.shapes)), families.of_checkpoint(_sizes_of(networks))
    if lora_family and family and lora_family != family:
        return CheckpointError(
            f"{path} is a LoRA for {lora_family}, but this checkpoint is {family}; use a LoRA for {family}"
        )
    listed = sorted(problems)[:_LISTED] or ["  it has no tensors"]
    more = [f"  and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return CheckpointError(
        f"{path} does not fit this checkpoint's {' and '.join(networks)}:\n" + "\n".join([*listed, *more])
    )


def _sizes_in(tensors: Mapping[str, tuple[int, ...]]) -> LayerSizes:
    """Returns {layer: (out, in) of the weight that the layer's tensors fit, or () if unknown}."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        if parts := parsed(name):
            layers.setdefault(parts.layer, {})[parts.role] = shape
    return {layer: _size(shapes) for layer, shapes in layers.items()}


def _size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the size (out, in) of the weight that a layer's tensors fit, or () if they do not determine it."""
    for form in FORMS:
        if not form.of_bias and any(needed <= shapes.keys() for needed in form.needs):
            return form.sizes(shapes) or ()
    return ()


def _sizes_of(networks: Mapping[str, Any]) -> LayerSizes:
    """Returns the sizes of the networks' weights as {layer: (out, in)}, with layers named as in LoRA files."""
    return {
        f"{part}_{key.removesuffix('.weight').replace('.', '_')}": shape[:2]
        for part, network in networks.items()
        for key, shape in leaves(network).items()
    }
