"""The layers that a file with a LoRA changes: its tensors by layer, and the form and factor of each."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sega_jax.method.numerics import is_finite, is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.weights.layout import leaves
from sega_jax.weights.lora_forms import Form
from sega_jax.weights.lora_names import WORDS, LoraNames, places
from sega_jax.weights.lora_products import FORMS, decomposed, magnitude_fits
from sega_jax.weights.tensors import Tensors

Reads = dict[str, Callable[[], np.ndarray]]
# From a network, the key of a layer's weight, its alpha and its rank to what its difference is multiplied by.
Factor = Callable[[str, str, float | None, int | None], float]

# The roles whose single number may be an integer.
_NUMBERS = ("alpha", "scale", "on_input")
# What a layer can have whose weight is no matrix.
_OF_NORMS = {"diff", "diff_b", "w_norm", "b_norm", "alpha", "scale"}


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


class Group(NamedTuple):
    """The tensors of one layer in a file, by role."""

    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    reads: Reads


def layers_of(
    path: Path, tensors: Tensors, networks: Mapping[str, Any], names: Mapping[str, LoraNames], factor: Factor
) -> tuple[dict[str, dict[str, Layer]], list[str]]:
    """Returns the layers of a file by network and by the key of the weight or bias, and the problems of its tensors.

    Names and shapes are checked before any values are read. If they have no problem, all values are read once, one
    tensor at a time, and checked.

    Args:
        path: the file, for errors.
        networks, names: as of `sega_jax.weights.lora.read`.

    Raises:
        CheckpointError: the file has several adapters.
    """
    problems: list[str] = []
    groups = _grouped(path, tensors, networks, names, problems)
    shapes = {part: leaves(network) for part, network in networks.items()}
    layers: dict[str, dict[str, Layer]] = {part: {} for part in networks}
    for (part, key), group in groups.items():
        for form, target in _forms(part, key, group, shapes[part], problems):
            roles = (*form.needs, form.may_have)
            reads = {role: one for role, one in group.reads.items() if any(role in some for some in roles)}
            layers[part][target] = Layer(form, reads, _factor(factor, part, key, form, group))
    return layers, problems or _unusable(groups)


def _grouped(
    path: Path,
    tensors: Tensors,
    networks: Mapping[str, Any],
    names: Mapping[str, LoraNames],
    problems: list[str],
) -> dict[tuple[str, str], Group]:
    """Returns a file's tensors by network and the key of the layer's weight. Unusable ones become problems.

    Raises:
        CheckpointError: the file has several adapters.
    """
    place = places(networks, names)
    groups: dict[tuple[str, str], Group] = {}
    adapters: set[str | None] = set()
    for name, shape in tensors.shapes.items():
        if name.startswith(WORDS):
            continue
        if (layer := place(name)) is None:
            problems.append(f"  unexpected {name} {shape}")
            continue
        part, key, role, adapter = layer
        if role not in _NUMBERS:
            adapters.add(adapter)
        group = groups.setdefault((part, key), Group({}, {}, {}))
        if role in group.names:
            problems.append(f"  twice      {name}, {role} of the {part}'s {key}")
            continue
        group.names[role], group.shapes[role], group.reads[role] = name, shape, tensors.entries[name].read
    if len(adapters) > 1 and any(adapters):
        listed = " and ".join(sorted("one without a name" if one is None else one for one in adapters))
        raise CheckpointError(f"{path} has several adapters, {listed}; save them in files of their own")
    for group in groups.values():
        _resolve_vector(group, problems)
    return {place: group for place, group in groups.items() if group.names}


def _resolve_vector(group: Group, problems: list[str]) -> None:
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
    part: str, key: str, group: Group, shapes: Mapping[str, tuple[int, ...]], problems: list[str]
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
    fitting = []
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
        fitting.append((form, target))
    return fitting


def _missing(roles: Iterable[str]) -> str:
    """Returns the roles that tensors lack of the form that they resemble most, in words."""
    own = set(roles)
    near = [needed for form in FORMS for needed in form.needs if needed & own]
    if not near:
        return "the matrices"
    nearest = max(near, key=lambda needed: (len(needed & own), -len(needed - own)))
    return " and ".join(sorted(nearest - own)) or f"the matrices of {' and '.join(sorted(own - nearest))}"


def _factor(factor: Factor, part: str, key: str, form: Form, group: Group) -> float:
    """Returns what a form's difference is multiplied by: the layer's own scale, or alpha over the rank."""
    if "scale" in group.reads and "scale" in form.may_have:
        return float(group.reads["scale"]().reshape(-1)[0])
    if not form.scaled:
        return 1.0
    alpha = float(group.reads["alpha"]().reshape(-1)[0]) if "alpha" in group.reads else None
    return factor(part, key, alpha, form.rank(group.shapes))


def _unusable(groups: Mapping[tuple[str, str], Group]) -> list[str]:
    """Reads all tensors, one at a time, and returns problems of their values."""
    problems = []
    for group in groups.values():
        for role, read in group.reads.items():
            array = read()
            if not is_floating(array.dtype) and not (role in _NUMBERS and array.dtype.kind in "iub"):
                problems.append(f"  {group.names[role]} is {array.dtype}, expected a floating type")
                continue
            with np.errstate(over="ignore"):
                finite = is_finite(array.astype(np.float32))
            if not finite:
                problems.append(f"  {group.names[role]} has NaN or infinite entries")
    return problems
