"""LoRAs and their relatives: differences of weights, which are read from files and added to a checkpoint's.

A file's tensors are grouped by the layers that they change (`sega_jax.weights.lora_names`). The tensors of a layer are
of a form that says how they become a difference (`sega_jax.weights.lora_forms`, `lora_products`). Names and shapes are
checked first. Values are read one layer at a time, once to check them and once to merge them.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sega_jax.method.numerics import at_least_float32, is_finite, is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.weights import lora_files
from sega_jax.weights.lora_forms import Form
from sega_jax.weights.lora_names import LoraNames as LoraNames
from sega_jax.weights.lora_names import layer_keys as layer_keys
from sega_jax.weights.lora_names import parsed, places, unsupported
from sega_jax.weights.lora_products import FORMS, decomposed, magnitude_fits
from sega_jax.weights.lora_settings import factors, is_number
from sega_jax.weights.pull import Tensors, flax_name, from_torch, leaves, to_torch, torch_name
from sega_jax.weights.single_file import SingleFile

M = TypeVar("M", bound=NamedTuple)

Files = str | Path | Mapping[str | Path, float]
Reads = dict[str, Callable[[], np.ndarray]]
# {layer, with the network's prefix and underscores: (out, in) of its weight, or () where the tensors do not say}.
LayerSizes = Mapping[str, tuple[int, ...]]

# Problems that an error lists; it counts the others.
_LISTED = 10
# The roles whose single number may be an integer.
_NUMBERS = ("alpha", "scale", "on_input")
# What a layer can have whose weight is no matrix.
_OF_NORMS = {"diff", "diff_b", "w_norm", "b_norm", "alpha", "scale"}
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class Layer(NamedTuple):
    """The difference of one weight or bias."""

    form: Form
    reads: Reads  # by role; they read arrays from the file, in its dtype
    factor: float  # of the form

    def difference(self, weight: np.ndarray) -> np.ndarray:
        """Returns the difference, in float32 or wider, of a weight in torch's layout: [out, in], or [out, in, height,
        width]."""
        arrays = {role: read().astype(np.float32) for role, read in self.reads.items()}
        return decomposed(arrays, weight, self.form.difference(arrays, weight, self.factor))


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
) -> list[Change]:
    """Reads LoRAs and their relatives for networks, with or without values.

    Args:
        networks: by the names that diffusers' layout has for them, such as "unet".
        lora: a file, folder or name on the hub (`lora_files.find`), whose scale is 1, or {file: scale}.
        names: how files name the layers of each network.
        checkpoints: descriptions of checkpoints in single files, which people mistake for LoRAs.
        families: recognises LoRAs of other checkpoints; None does not.

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
    return [Change(path, scale, _layers(path, networks, names, checkpoints, families)) for path, scale in files]


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


class _Group(NamedTuple):
    """The tensors of one layer in a file, by role."""

    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    reads: Reads


def _layers(
    path: Path,
    networks: Mapping[str, Any],
    names: Mapping[str, LoraNames],
    checkpoints: Iterable[SingleFile],
    families: Families,
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
    factor = factors(path, networks, tensors.shapes)
    problems: list[str] = []
    groups = _grouped(path, tensors, networks, names, problems)
    shapes = {part: leaves(network) for part, network in networks.items()}
    layers: dict[str, dict[str, Layer]] = {part: {} for part in networks}
    for (part, key), group in groups.items():
        if not group.names:  # a problem already
            continue
        for form, target in _forms(part, key, group, shapes[part], problems):
            roles = (*form.needs, form.may_have)
            reads = {role: one for role, one in group.reads.items() if any(role in some for some in roles)}
            layers[part][target] = Layer(form, reads, _factor(factor, part, key, form, group))
    if not problems:
        problems = _unusable(groups)
    if problems or not groups:
        raise _misfit(path, networks, tensors, families, problems)
    return layers


def _grouped(
    path: Path,
    tensors: Tensors,
    networks: Mapping[str, Any],
    names: Mapping[str, LoraNames],
    problems: list[str],
) -> dict[tuple[str, str], _Group]:
    """Returns a file's tensors by network and the key of the layer's weight. Unusable ones become problems.

    Raises:
        CheckpointError: the file has several adapters.
    """
    place = places(networks, names)
    groups: dict[tuple[str, str], _Group] = {}
    adapters: set[str | None] = set()
    for name, shape in tensors.shapes.items():
        found = place(name)
        if found is None:
            problems.append(f"  unexpected {name} {shape}")
            continue
        if found.role not in _NUMBERS:
            adapters.add(found.adapter)
        group = groups.setdefault((found.part, found.key), _Group({}, {}, {}))
        if found.role in group.names:
            problems.append(f"  twice      {name}, {found.role} of the {found.part}'s {found.key}")
            continue
        group.names[found.role], group.shapes[found.role] = name, shape
        group.reads[found.role] = tensors.entries[name].read
    if len(adapters) > 1 and any(adapters):
        listed = " and ".join(sorted("one without a name" if one is None else one for one in adapters))
        raise CheckpointError(f"{path} has several adapters, {listed}; save them in files of their own")
    for (part, key), group in groups.items():
        _resolve_vector(part, key, group, problems)
    return groups


def _resolve_vector(part: str, key: str, group: _Group, problems: list[str]) -> None:
    """Names the vector of (IA)^3 by the axis of the weight that it multiplies, as `on_input` says."""
    if "vector" not in group.names:
        return
    name, shape = group.names.pop("vector"), group.shapes.pop("vector")
    read, axis = group.reads.pop("vector"), group.reads.pop("on_input", None)
    if axis is None or math.prod(group.shapes.pop("on_input")) != 1:
        group.names.clear()
        problems.append(f"  unexpected {name} {shape}")
        return
    del group.names["on_input"]
    role = "vector_1" if axis().reshape(-1)[0] else "vector_0"
    group.names[role], group.shapes[role], group.reads[role] = name, shape, read


def _forms(
    part: str, key: str, group: _Group, shapes: Mapping[str, tuple[int, ...]], problems: list[str]
) -> list[tuple[Form, str]]:
    """Returns the forms of a layer's tensors, each with the key of what it changes. Misfits become problems."""
    roles = group.names.keys()
    if len(shapes[key]) < 2 and not roles <= _OF_NORMS:
        problems += [f"  unexpected {name} {group.shapes[role]}" for role, name in group.names.items()]
        return []
    forms = [form for form in FORMS if any(needed <= roles for needed in form.needs)]
    weights = [form for form in forms if not form.of_bias]
    if len(weights) > 1:
        problems.append(f"  ambiguous  {' and '.join(form.name for form in weights)} of the {part}'s {key}")
        return []
    claimed = {role for form in forms for some in (*form.needs, form.may_have) for role in some}
    if not roles <= claimed:
        problems.append(f"  missing    {_missing(roles)} of the {part}'s {key}")
        return []
    sizes = ", ".join(f"{role} {shape}" for role, shape in group.shapes.items())
    found = []
    for form in forms:
        target = key.removesuffix("weight") + "bias" if form.of_bias else key
        shape = shapes.get(target)
        if shape is None and form.needs == ({"ia3_l"},):  # a layer without a bias
            continue
        numbers = all(math.prod(group.shapes[role]) == 1 for role in _NUMBERS if role in roles)
        norms = form.of_bias or magnitude_fits(group.shapes, shape or ())
        if shape is None or not (numbers and norms and form.fits(group.shapes, shape)):
            own = "which has none" if shape is None else f"which is {shape}"
            problems.append(f"  misshapen  {sizes} of the {part}'s {target}, {own}")
            continue
        found.append((form, target))
    return found


def _missing(roles: Iterable[str]) -> str:
    """Returns the roles that tensors lack of the form that they resemble most, in words; "" if no form is near."""
    own = set(roles)
    near = [needed for form in FORMS for needed in form.needs if needed & own]
    if not near:
        return "the matrices"
    nearest = max(near, key=lambda needed: (len(needed & own), -len(needed - own)))
    return " and ".join(sorted(nearest - own)) or f"the matrices of {' and '.join(sorted(own - nearest))}"


def _factor(
    factor: Callable[[str, str, float | None, int | None], float], part: str, key: str, form: Form, group: _Group
) -> float:
    """Returns what a form's difference is multiplied by: the layer's own scale, or alpha over the rank."""
    if "scale" in group.reads and "scale" in form.may_have:
        return float(group.reads["scale"]().reshape(-1)[0])
    if not form.scaled:
        return 1.0
    alpha = float(group.reads["alpha"]().reshape(-1)[0]) if "alpha" in group.reads else None
    return factor(part, key, alpha, form.rank(group.shapes))


def _unusable(groups: Mapping[tuple[str, str], _Group]) -> list[str]:
    """Reads all tensors, one at a time, and returns problems of their values."""
    problems = []
    for group in groups.values():
        for role, read in group.reads.items():
            array = read()
            usual = is_floating(array.dtype) or array.dtype.name in _FLOAT8
            if not usual and not (role in _NUMBERS and array.dtype.kind in "iub"):
                problems.append(f"  {group.names[role]} is {array.dtype}, expected a floating type")
                continue
            with np.errstate(over="ignore"):
                finite = is_finite(array.astype(np.float32))
            if not finite:
                problems.append(f"  {group.names[role]} has NaN or infinite entries")
    return problems


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
        if found := parsed(name):
            layers.setdefault(found.layer, {})[found.role] = shape
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
