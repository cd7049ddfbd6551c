"""Groups the tensors of a LoRA file by the layers that they change, and finds each layer's form and factor."""

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
# Maps a network's name, the key of a layer's weight, alpha and the rank to the factor of the layer's difference.
Factor = Callable[[str, str, float | None, int | None], float]

# The roles of tensors that hold a single number, which may be an integer.
_NUMBERS = ("alpha", "scale", "on_input")
# The roles that are allowed if the layer's weight is a vector.
_NORM_ROLES = {"diff", "diff_b", "w_norm", "b_norm", "alpha", "scale"}


class Layer(NamedTuple):
    """The change to one weight or bias."""

    form: Form
    reads: Reads  # {role: function that reads the array from the file, in the file's dtype}
    factor: float  # the number that multiplies the difference

    def difference(self, weight: np.ndarray) -> np.ndarray:
        """Returns the difference for a weight in torch's layout, in float32 or a wider dtype.

        Args:
            weight: a weight [out, in] or [out, in, height, width], or a vector [out] (a bias, or the scale of a
                normalisation layer).
        """
        arrays = {role: read().astype(np.float32) for role, read in self.reads.items()}
        return decomposed(arrays, weight, self.form.difference(arrays, weight, self.factor))


class Group(NamedTuple):
    """The tensors of one layer in a file, keyed by role."""

    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    reads: Reads


def layers_of(
    path: Path, tensors: Tensors, networks: Mapping[str, Any], names: Mapping[str, LoraNames], factor: Factor
) -> tuple[dict[str, dict[str, Layer]], list[str]]:
    """Returns the layers that a file changes, and the problems with its tensors.

    Names and shapes are checked first. If there are no problems, all tensors are read once, one at a time, and checked.

    Args:
        path: the file, for error messages.
        tensors: the tensors of the file.
        networks, names: as for `sega_jax.weights.lora.read`.
        factor: returns the factor of a layer's difference.

    Returns:
        {network: {key of the weight or bias: layer}}, and a list with one line of text for each problem.

    Raises:
        CheckpointError: the file contains several adapters.
    """
    problems: list[str] = []
    groups = _grouped(path, tensors, networks, names, problems)
    shapes = {part: leaves(network) for part, network in networks.items()}
    layers: dict[str, dict[str, Layer]] = {part: {} for part in networks}
    for (part, key), group in groups.items():
        for form, target in _forms(part, key, group, shapes[part], problems):
            roles = (*form.needs, form.may_have)
            reads = {role: read for role, read in group.reads.items() if any(role in allowed for allowed in roles)}
            layers[part][target] = Layer(form, reads, _factor(factor, part, key, form, group))
    return layers, problems or _unusable(groups)


def _grouped(
    path: Path,
    tensors: Tensors,
    networks: Mapping[str, Any],
    names: Mapping[str, LoraNames],
    problems: list[str],
) -> dict[tuple[str, str], Group]:
    """Returns {(network, key of a layer's weight): the layer's tensors}. Adds unusable tensors to `problems`.

    Raises:
        CheckpointError: the file contains several adapters.
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
        listed = " and ".join(sorted("one without a name" if name is None else name for name in adapters))
        raise CheckpointError(f"{path} contains several adapters, {listed}; save each of them in its own file")
    for group in groups.values():
        _resolve_vector(group, problems)
    return {place: group for place, group in groups.items() if group.names}


def _resolve_vector(group: Group, problems: list[str]) -> None:
    """Renames the role of an (IA)^3 vector to show which axis of the weight it multiplies, according to `on_input`."""
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
    """Returns (form, key that it changes) for each form that fits a layer's tensors. Adds mismatches to `problems`."""
    roles = group.names.keys()
    if len(shapes[key]) < 2 and not roles <= _NORM_ROLES:
        problems += [f"  unexpected {name} {group.shapes[role]}" for role, name in group.names.items()]
        return []
    forms = [form for form in FORMS if any(needed <= roles for needed in form.needs)]
    weights = [form for form in forms if not form.of_bias]
    if len(weights) > 1:
        problems.append(f"  ambiguous  {' and '.join(form.name for form in weights)} of the {part}'s {key}")
        return []
    allowed = {role for form in forms for roles_of_form in (*form.needs, form.may_have) for role in roles_of_form}
    if not roles <= allowed:
        problems.append(f"  missing    {_missing(roles)} of the {part}'s {key}")
        return []
    sizes = ", ".join(f"{role} {shape}" for role, shape in group.shapes.items())
    fitting = []
    for form in forms:
        target = key.removesuffix("weight") + "bias" if form.of_bias else key
        shape = shapes.get(target)
        if shape is None and form.needs == ({"ia3_l"},):  # the vector also changes the bias, but this layer has none
            continue
        numbers = all(math.prod(group.shapes[role]) == 1 for role in _NUMBERS if role in roles)
        norms = form.of_bias or magnitude_fits(group.shapes, shape or ())
        if shape is None or not (numbers and norms and form.fits(group.shapes, shape)):
            expected = "which does not exist" if shape is None else f"which is {shape}"
            problems.append(f"  misshapen  {sizes} of the {part}'s {target}, {expected}")
            continue
        fitting.append((form, target))
    return fitting


def _missing(roles: Iterable[str]) -> str:
    """Describes the roles that are missing from a layer, compared with the most similar form."""
    present = set(roles)
    similar = [needed for form in FORMS for needed in form.needs if needed & present]
    if not similar:
        return "the matrices"
    nearest = max(similar, key=lambda needed: (len(needed & present), -len(needed - present)))
    return " and ".join(sorted(nearest - present)) or f"the matrices of {' and '.join(sorted(present - nearest))}"


def _factor(factor: Factor, part: str, key: str, form: Form, group: Group) -> float:
    """Returns the factor of a form's difference: the scale in the file, or alpha divided by the rank."""
    if "scale" in group.reads and "scale" in form.may_have:
        return float(group.reads["scale"]().reshape(-1)[0])
    if not form.scaled:
        return 1.0
    alpha = float(group.reads["alpha"]().reshape(-1)[0]) if "alpha" in group.reads else None
    return factor(part, key, alpha, form.rank(group.shapes))


def _unusable(groups: Mapping[tuple[str, str], Group]) -> list[str]:
    """Reads all tensors, one at a time, and returns a list of the problems with their values."""
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
