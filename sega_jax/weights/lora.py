"""LoRA: small differences of weights, added to a checkpoint's.

A layer's difference is a product of two matrices of rank r, up [out, r] and down [r, in], times alpha / r (Hu et al.
2022, section 4.1). A convolution's down has its kernel, [r, in, height, width]; some have it between the two instead,
mid [r, r, height, width]. Files name layers as diffusers and peft do, by dotted paths, or as kohya's scripts, with
underscores, of diffusers' or the original repositories' names.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from safetensors import safe_open

from sega_jax.method.numerics import at_least_float32, is_finite, is_floating
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.weights.original_names import original_names
from sega_jax.weights.pull import CheckpointError, Tensors, flax_name, from_torch, leaves, torch_name, torch_shape

M = TypeVar("M")

# What the names of tensors end with, after the layer's.
_ENDS = {
    "down": r"[._]lora[._](?:A|down)(?:\.default)?\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"[._]lora[._](?:B|up)(?:\.default)?\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.alpha",
}
_STARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
# What diffusers called the projections of text encoders.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_METADATA = "lora_adapter_metadata"


class Layer(NamedTuple):
    """The difference of one layer; the arrays are float32."""

    down: np.ndarray  # [r, in], or [r, in, height, width]
    up: np.ndarray  # [out, r], or [out, r, 1, 1]
    mid: np.ndarray | None  # [r, r, height, width]
    factor: float  # alpha / r

    def difference(self, shape: tuple[int, ...]) -> np.ndarray:
        """Of the weight of this shape in torch's files, (out, in) or (out, in, height, width); float32."""
        rank = len(self.down)
        up, down = self.up.reshape(-1, rank), self.down.reshape(rank, -1)
        if self.mid is not None:
            # A kernel's entries are pairs of ranks.
            down = np.einsum("abhw,bi->aihw", self.mid, down).reshape(rank, -1)
        return np.float32(self.factor) * (up @ down).reshape(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `difference` is one of a weight of this shape."""
        if self.down.ndim < 2 or self.up.ndim < 2:
            return False
        rank, inputs, *kernel = self.down.shape
        if self.mid is not None:
            if kernel not in ([], [1, 1]) or self.mid.shape[:2] != (rank, rank):
                return False
            kernel = list(self.mid.shape[2:])
        # Linear layers and 1x1 convolutions are the same.
        ours = [size for size in shape[2:] if shape[2:] != (1, 1)]
        theirs = [size for size in kernel if kernel != [1, 1]]
        return (
            rank > 0
            and self.up.shape[:2] == (shape[0], rank)
            and self.up.shape[2:] in ((), (1, 1))
            and (inputs, theirs) == (shape[1], ours)
        )


class Change(NamedTuple):
    """A file's differences, by part and key of the weight in diffusers' layout, and their scale."""

    path: Path
    scale: float
    layers: dict[str, dict[str, Layer]]


def merge_lora(models: M, lora: str | Path | Mapping[str | Path, float]) -> M:
    """Networks with LoRAs merged: of each layer, weight + scale alpha / r up down, the sum in float32.

        pipe.models = merge_lora(pipe.models, {"style.safetensors": 0.8})

    The networks given stay as they are: `pipe.models = before` undoes it. It is what diffusers' `fuse_lora` makes, but
    for alphas that differ from layer to layer, of which diffusers 0.42.1 loses some.

    Args:
        models: of a pipeline of Stable Diffusion (`pipe.models`).
        lora: a safetensors file, of scale 1; or several, {file: scale}. Without an alpha in the file, it is r.

    Raises:
        TypeError: models or lora is none.
        ValueError: a scale that is no finite number.
        CheckpointError: a file is missing or broken, or has tensors of no layer of these networks, of no LoRA, or that
            do not fit, all of which are listed; or a sum overflows the weights' dtype.
    """
    return merged(models, read(models, lora))


def read(models: Any, lora: str | Path | Mapping[str | Path, float]) -> list[Change]:
    """What `merge_lora` adds to networks with or without values.

    Raises:
        TypeError, ValueError, CheckpointError: as `merge_lora`.
    """
    parts = getattr(models, "_asdict", dict)()
    networks = {part: network for part, network in parts.items() if part in _STARTS.values() and network is not None}
    if "unet" not in networks:
        raise TypeError(f"models={type(models).__name__} should be of a pipeline of Stable Diffusion (pipe.models)")
    given = list(lora.items()) if isinstance(lora, Mapping) else [(lora, 1.0)]
    for path, scale in given:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"lora={lora!r} should be the path of a safetensors file, or {{path: scale}} of several")
        if not _is_number(scale):
            raise ValueError(f"lora: the scale {scale!r} of {path} should be a finite number like 0.8")
    files = [(Path(os.path.expanduser(path)), float(scale)) for path, scale in given]
    return [Change(path, scale, _layers(path, networks)) for path, scale in files]


def merged(models: M, changes: Sequence[Change]) -> M:
    """Networks with values, changed.

    Raises:
        CheckpointError: a sum overflows the weights' dtype.
    """
    parts = {part for change in changes for part, layers in change.layers.items() if layers}
    return models._replace(**{part: _merged(getattr(models, part), part, changes) for part in parts})


def _merged(network: M, part: str, changes: Sequence[Change]) -> M:
    def add(path: tuple, leaf: jax.Array) -> jax.Array:
        key = torch_name(path)
        own = [change for change in changes if key in change.layers[part]]
        if not own:
            return leaf
        weight = np.asarray(leaf)
        shape = torch_shape(path, weight.shape)
        difference = sum(np.float32(change.scale) * change.layers[part][key].difference(shape) for change in own)
        with np.errstate(over="ignore"):
            made = (weight.astype(at_least_float32(weight.dtype)) + from_torch(path, difference)).astype(weight.dtype)
        if not is_finite(made):
            files = " and ".join(str(change.path) for change in own)
            raise CheckpointError(f"{files}: {key} overflows {made.dtype} once merged; use another dtype or scale")
        return jax.device_put(np.ascontiguousarray(made), leaf.sharding)

    return jax.tree_util.tree_map_with_path(add, network)


def _layers(path: Path, networks: Mapping[str, Any]) -> dict[str, dict[str, Layer]]:
    """The layers of a file, by part and key."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file, which alone are read; fetch the LoRA as one")
    names = {part: _names(network) for part, network in networks.items()}
    shapes = {part: leaves(network) for part, network in networks.items()}
    problems: list[str] = []
    roles: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    with Tensors(path.parent, path.stem, None, str) as tensors:
        if any(name.startswith("model.diffusion_model.") for name in tensors.shapes):
            raise CheckpointError(f"{path} is no LoRA, but a whole checkpoint: give it to load as its source")
        factor = _factors(path)
        for name, shape in tensors.shapes.items():
            place = _place(name, names)
            if place is None:
                problems.append(f"  unexpected {name} {shape}")
                continue
            part, key, role = place
            array = tensors[name]
            if role in roles.setdefault((part, key), {}):
                problems.append(f"  twice      {name}, {role} of the {part}'s {key}")
            elif role != "alpha" and not is_floating(array.dtype):
                problems.append(f"  {name} is {array.dtype}, expected a floating type")
            elif not np.isfinite(array.astype(np.float32)).all():
                problems.append(f"  {name} has NaN or infinite entries")
            roles[part, key][role] = array.astype(np.float32)
    found: dict[str, dict[str, Layer]] = {part: {} for part in networks}
    for (part, key), given in roles.items():
        if missing := [role for role in ("down", "up") if role not in given]:
            problems.append(f"  missing    {' and '.join(missing)} of the {part}'s {key}")
            continue
        layer = Layer(given["down"], given["up"], given.get("mid"), 1.0)
        if not layer.fits(shapes[part][key]) or given.get("alpha", layer.down[:1, :1]).size < 1:
            sizes = ", ".join(f"{role} {array.shape}" for role, array in given.items())
            problems.append(f"  misshapen  {sizes} of the {part}'s {key}, which is {shapes[part][key]}")
            continue
        alpha = float(given["alpha"].reshape(-1)[0]) if "alpha" in given else None
        found[part][key] = layer._replace(factor=factor(part, key, alpha, len(layer.down)))
    if problems or not roles:
        listed = "\n".join(sorted(problems)) or "  it has no tensors"
        raise CheckpointError(f"{path} is no LoRA of this checkpoint's {' and '.join(networks)}:\n{listed}")
    return found


def _names(network: Any) -> dict[str, str]:
    """The keys of layers' weights by every name that files have for the layers, dots as underscores."""
    paths = {
        torch_name(path).removesuffix(".weight"): torch_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(network)
        if flax_name(path).endswith("kernel")
    }
    found = dict(paths)
    if isinstance(network, UNet2DConditionModel):
        if not network.config.adds_keys:  # DeepFloyd-IF's, which has no other names here
            originals = original_names(network, "")
            found |= {originals[key].removesuffix(".weight"): key for key in paths.values()}
        found |= {path.removesuffix(".0"): key for path, key in paths.items() if path.endswith("to_out.0")}
    else:
        for new, old in _OLD_TEXT.items():
            found |= {path.replace(new, old): key for path, key in paths.items()}
        bare = {path.removeprefix("text_model."): key for path, key in found.items()}
        found |= bare | {f"text_model.{path}": key for path, key in bare.items()}
    return {path.replace(".", "_"): key for path, key in found.items()}


def _place(name: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """The part, the weight's key and the role of a tensor; None for what is of no layer."""
    name = name.removeprefix("base_model.model.")
    for role, end in _ENDS.items():
        if match := re.search(rf"(?:{end})$", name):
            layer = name[: match.start()]
            start = next((start for start in _STARTS if layer.startswith(start)), "")
            part = _STARTS.get(start, "unet")
            layer = layer.removeprefix(start).replace(".processor", "").replace(".", "_")
            key = names.get(part, {}).get(layer)
            return None if key is None else (part, key, role)
    return None


def _factors(path: Path) -> Callable[[str, str, float | None, int], float]:
    """The factor of a layer, from its part, key, alpha and rank: alpha / rank, where alpha is the file's own or
    peft's settings in its header, else the rank.

    Raises:
        CheckpointError: the header has settings that are not readable.
    """
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(_METADATA, "{}")
    try:
        settings = json.loads(text)
        patterns = {part: settings.get(f"{part}.alpha_pattern") or {} for part in _STARTS.values()}
        numbers = [value for name, value in settings.items() if name.endswith("lora_alpha")]
        for pattern in patterns.values():
            numbers += pattern.values()
        if not all(map(_is_number, numbers)):
            raise ValueError("an alpha is no number")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_METADATA} in its header is not readable ({error}); fetch it again") from None

    def factor(part: str, key: str, alpha: float | None, rank: int) -> float:
        if alpha is None:
            own = [value for end, value in patterns[part].items() if f".{key}".endswith(f".{end}.weight")]
            alpha = own[0] if own else settings.get(f"{part}.lora_alpha", rank)
        return alpha / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)

    return factor


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
