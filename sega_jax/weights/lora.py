"""LoRA: low-rank differences of weights, which are added to a checkpoint's.

A layer's difference is a product of two matrices of rank r, up [out, r] and down [r, in], times alpha / r (Hu et al.
2022, section 4.1). For a convolution, down has its kernel, [r, in, height, width], or a third matrix between the two
has it, mid [r, r, height, width]. Files name layers by dotted paths, as diffusers and peft do, or by paths with
underscores, as kohya's scripts do. A family says what these names are (`LoraNames`).
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sega_jax.method.numerics import at_least_float32, is_finite, is_floating
from sega_jax.text.files import CheckpointError
from sega_jax.weights.layout import flax_name, from_torch, leaves, torch_name, torch_shape
from sega_jax.weights.lora_settings import factors, is_number
from sega_jax.weights.single_file import SingleFile
from sega_jax.weights.tensors import Tensors

M = TypeVar("M", bound=NamedTuple)

Files = str | Path | Mapping[str | Path, float]
# The ends of tensors' names, after the layer's name, by the tensor's role.
_ENDS = {
    "down": r"[._]lora[._](?:A|down)(?:\.default)?\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"[._]lora[._](?:B|up)(?:\.default)?\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.alpha",
}


class LoraNames(NamedTuple):
    """How LoRA files name the layers of one network."""

    starts: tuple[str, ...]  # prefixes of its tensors' names; "" claims names without a known prefix
    layers: Callable[[Any], Mapping[str, str]]  # from the network: {name, where dots equal underscores: weight's key}


class Layer(NamedTuple):
    """The difference of one layer's weight; the arrays are float32."""

    down: np.ndarray  # [r, in], or [r, in, height, width]
    up: np.ndarray  # [out, r], or [out, r, 1, 1]
    mid: np.ndarray | None  # [r, r, height, width]
    factor: float  # alpha / r

    def difference(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the difference, in float32, of a weight with this shape in torch's files: (out, in), or (out, in,
        height, width)."""
        rank = len(self.down)
        up, down = self.up.reshape(-1, rank), self.down.reshape(rank, -1)
        if self.mid is not None:
            # Every entry of the kernel is an [r, r] matrix.
            down = np.einsum("abhw,bi->aihw", self.mid, down).reshape(rank, -1)
        return np.float32(self.factor) * (up @ down).reshape(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tells whether the matrices fit a weight with this shape in torch's files."""
        if self.down.ndim < 2 or self.up.ndim < 2:
            return False
        rank, inputs, *kernel = self.down.shape
        if self.mid is not None:
            if kernel not in ([], [1, 1]) or self.mid.shape[:2] != (rank, rank):
                return False
            kernel = list(self.mid.shape[2:])
        # Files may store a convolution of size 1 as a linear layer, or the reverse.
        ours = [size for size in shape[2:] if shape[2:] != (1, 1)]
        theirs = [size for size in kernel if kernel != [1, 1]]
        return (
            rank > 0
            and self.up.shape[:2] == (shape[0], rank)
            and self.up.shape[2:] in ((), (1, 1))
            and (inputs, theirs) == (shape[1], ours)
        )


class Change(NamedTuple):
    """The differences in one file and their scale."""

    path: Path
    scale: float
    layers: dict[str, dict[str, Layer]]  # by network, then by the weight's key in diffusers' layout


def layer_keys(network: Any) -> dict[str, str]:
    """Returns {dotted path of a linear layer or convolution: key of its weight in diffusers' layout}."""
    return {
        torch_name(path).removesuffix(".weight"): torch_name(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(network)
        if flax_name(path).endswith("kernel")
    }


def read(
    networks: Mapping[str, Any], lora: Files, names: Mapping[str, LoraNames], checkpoints: Iterable[SingleFile] = ()
) -> list[Change]:
    """Reads LoRAs for networks, with or without values.

    Args:
        networks: by the names that diffusers' layout has for them, such as "unet".
        lora: a safetensors file, whose scale is 1, or {file: scale}.
        names: how files name the layers of each network.
        checkpoints: descriptions of checkpoints in single files, which people mistake for LoRAs.

    Raises:
        TypeError: `lora` is neither a path nor {path: scale}.
        ValueError: a scale is no finite number.
        CheckpointError: a file is missing or broken, has tensors of no LoRA or of no layer of these networks, or does
            not fit; the error lists all such tensors.
    """
    scales = list(lora.items()) if isinstance(lora, Mapping) else [(lora, 1.0)]
    for path, scale in scales:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"lora={lora!r} should be the path of a safetensors file, or {{path: scale}} of several")
        if not is_number(scale):
            raise ValueError(f"lora: the scale {scale!r} of {path} should be a finite number like 0.8")
    files = [(Path(os.path.expanduser(path)), float(scale)) for path, scale in scales]
    return [Change(path, scale, _layers(path, networks, names, checkpoints)) for path, scale in files]


def merged(models: M, changes: Sequence[Change]) -> M:
    """Returns a NamedTuple of networks with values, to whose weights the changes are added.

    Each weight and its differences are summed in float32 and rounded to the weight's dtype once. Networks that are
    None stay so.

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
        shape = torch_shape(path, weight.shape)
        difference = sum(np.float32(change.scale) * change.layers[part][key].difference(shape) for change in own)
        assert isinstance(difference, np.ndarray)
        with np.errstate(over="ignore"):
            total = (weight.astype(at_least_float32(weight.dtype)) + from_torch(path, difference)).astype(weight.dtype)
        if not is_finite(total):
            files = " and ".join(str(change.path) for change in own)
            raise CheckpointError(f"{files}: {key} overflows {total.dtype} once merged; use another dtype or scale")
        return jax.device_put(np.ascontiguousarray(total), leaf.sharding)

    return jax.tree_util.tree_map_with_path(add, network)


def _layers(
    path: Path, networks: Mapping[str, Any], names: Mapping[str, LoraNames], checkpoints: Iterable[SingleFile]
) -> dict[str, dict[str, Layer]]:
    """Reads the layers of a file, by network and by the weight's key."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file, the only kind of LoRA that is read; fetch it as one")
    problems: list[str] = []
    with Tensors(path.parent, path.stem, None, str) as tensors:
        for file in checkpoints:
            if file.recognise(tensors.shapes):
                raise CheckpointError(
                    f"{path} is no LoRA, but a whole checkpoint: give it to load as its source ({file.name})"
                )
        factor = factors(path, networks, tensors.shapes)
        roles = _roles(tensors, networks, names, problems)
    shapes = {part: leaves(network) for part, network in networks.items()}
    layers: dict[str, dict[str, Layer]] = {part: {} for part in networks}
    for (part, key), arrays in roles.items():
        if missing := [role for role in ("down", "up") if role not in arrays]:
            problems.append(f"  missing    {' and '.join(missing)} of the {part}'s {key}")
            continue
        layer = Layer(arrays["down"], arrays["up"], arrays.get("mid"), 1.0)
        if not layer.fits(shapes[part][key]) or arrays.get("alpha", layer.down[:1, :1]).size < 1:
            sizes = ", ".join(f"{role} {array.shape}" for role, array in arrays.items())
            problems.append(f"  misshapen  {sizes} of the {part}'s {key}, which is {shapes[part][key]}")
            continue
        alpha = float(arrays["alpha"].reshape(-1)[0]) if "alpha" in arrays else None
        layers[part][key] = layer._replace(factor=factor(part, key, alpha, len(layer.down)))
    if problems or not roles:
        listed = "\n".join(sorted(problems)) or "  it has no tensors"
        raise CheckpointError(f"{path} is no LoRA of this checkpoint's {' and '.join(networks)}:\n{listed}")
    return layers


def _roles(
    tensors: Tensors, networks: Mapping[str, Any], names: Mapping[str, LoraNames], problems: list[str]
) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Reads a file's arrays in float32, by network and weight's key, then by role. Unusable ones become problems."""
    place = _places(networks, names)
    roles: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, shape in tensors.shapes.items():
        known = place(name)
        if known is None:
            problems.append(f"  unexpected {name} {shape}")
            continue
        part, key, role = known
        array = tensors[name]
        if role in roles.setdefault((part, key), {}):
            problems.append(f"  twice      {name}, {role} of the {part}'s {key}")
        elif role != "alpha" and not is_floating(array.dtype):
            problems.append(f"  {name} is {array.dtype}, expected a floating type")
        elif not np.isfinite(array.astype(np.float32)).all():
            problems.append(f"  {name} has NaN or infinite entries")
        roles[part, key][role] = array.astype(np.float32)
    return roles


def _places(
    networks: Mapping[str, Any], names: Mapping[str, LoraNames]
) -> Callable[[str], tuple[str, str, str] | None]:
    """Returns a function from a tensor's name to its network, its weight's key and its role; to None for names that
    belong to no layer."""
    layers = {
        part: {name.replace(".", "_"): key for name, key in names[part].layers(network).items()}
        for part, network in networks.items()
    }
    starts = [(start, part) for part in networks for start in names[part].starts]
    starts.sort(key=lambda pair: -len(pair[0]))  # the empty one is last

    def place(name: str) -> tuple[str, str, str] | None:
        name = name.removeprefix("base_model.model.")
        for role, end in _ENDS.items():
            if match := re.search(rf"(?:{end})$", name):
                layer = name[: match.start()]
                start, part = next((pair for pair in starts if layer.startswith(pair[0])), ("", ""))
                layer = layer.removeprefix(start).replace(".processor", "").replace(".", "_")
                # A file of one network may name its layers without the network.
                own = [part, *layers] if not start else [part]
                return next(((one, layers[one][layer], role) for one in own if layer in layers.get(one, {})), None)
        return None

    return place
