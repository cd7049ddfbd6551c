"""Parses tensor names in the files of LoRAs and related adapters into layer, role and adapter.

diffusers and peft name layers by dotted paths; kohya's scripts use paths with underscores. Dots and underscores are
treated as equivalent. A prefix identifies the layer's network. Each family defines its prefixes and layers
(`LoraNames`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sega_jax.weights.layout import torch_name

# A pattern for an adapter's user-defined name. In peft's files, this name follows the role of the tensor.
_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
# {role: pattern for the end of a tensor's name, which follows the layer's name}.
_ENDS = {
    "down": rf"[._]lora[._](?:A|down){_ADAPTER}\.weight|\.lora_linear_layer\.down\.weight",
    "up": rf"[._]lora[._](?:B|up){_ADAPTER}\.weight|\.lora_linear_layer\.up\.weight",
    "up_bias": rf"[._]lora[._](?:B|up){_ADAPTER}\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.alpha",
    "scale": r"\.scale",
    "dora_scale": r"\.dora_scale",
    "magnitude": rf"[._]lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    **{f"hada_w{n}_{side}": rf"\.hada_w{n}_{side}{_ADAPTER}" for n in (1, 2) for side in "ab"},
    **{f"hada_t{n}": rf"\.hada_t{n}{_ADAPTER}" for n in (1, 2)},
    **{f"lokr_w{n}": rf"\.lokr_w{n}{_ADAPTER}" for n in (1, 2)},
    **{f"lokr_w{n}_{side}": rf"\.lokr_w{n}_{side}{_ADAPTER}" for n in (1, 2) for side in "ab"},
    "lokr_t2": rf"\.lokr_t2{_ADAPTER}",
    **{f"glora_{name}": rf"\.{name}\.weight" for name in ("a1", "a2", "b1", "b2")},
    "oft_blocks": r"\.oft_blocks",
    "rescale": r"\.rescale",
    **{name: rf"\.{name}" for name in ("diff", "diff_b", "w_norm", "b_norm", "on_input")},
    "ia3_l": rf"\.ia3_l{_ADAPTER}",
    "vector": r"\.weight",  # LyCORIS's (IA)^3; must be last, because other roles also end in .weight
}
_COMPILED = {role: re.compile(rf"(?:{end})$") for role, end in _ENDS.items()}
# Wrapper modules that peft and torch put around a network or a layer.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:base_model\.model|module|_orig_mod|_fsdp_wrapped_module)\.")
# {pattern of tensor names: name of the unsupported method, for error messages}.
_UNSUPPORTED = {
    r"\.oft_[rR]\b": "peft's OFT",
    r"\.boft_[RsPm]\b": "peft's BOFT",
    r"\.lora_E\b|\.ranknum\b": "AdaLoRA",
    r"\.vera_lambda_": "VeRA",
    r"\.randlora_": "RandLoRA",
    r"\.fourierft_": "FourierFT",
    r"\.hra_u\b": "HRA",
    r"\.lora_embedding_[AB]\b": "a LoRA of word vectors",
    r"\.bm\.weight$": "GLoRA with a kernel in the middle",
    r"\.lokr_t1\b": "LoKr with a kernel in the first factor",
    r"\.set_weight$|\.reshape_weight$": "a replaced weight",
    r"\.bias_(indices|values|size)$": "a sparse remainder",
    r"_custom_diffusion\.": "Custom Diffusion",
    r"^lllite_": "ControlNet-LLLite",
    r"\.to_[kv]_ip\.|^ip_adapter\.": "an IP-Adapter",
}

# The name prefix of textual-inversion embeddings, which OneTrainer may store in a LoRA file.
WORDS = "bundle_emb."


class LoraNames(NamedTuple):
    """Describes how LoRA files name the layers of one network."""

    starts: tuple[str, ...]  # the prefixes of the network's tensors; "" matches names without a known prefix
    layers: Callable[[Any], Mapping[str, str]]  # returns {layer name in files: key of the layer's weight} for a network


class Parsed(NamedTuple):
    """The parts of a tensor's name."""

    layer: str  # with the network's prefix, and with underscores instead of dots
    role: str
    adapter: str | None


class Place(NamedTuple):
    """The layer that a tensor changes."""

    part: str  # the name of the network
    key: str  # the key of the layer's weight in diffusers' layout
    role: str
    adapter: str | None


def layer_keys(network: Any) -> dict[str, str]:
    """Returns {dotted path of a layer: key of its weight in diffusers' layout}."""
    keys = [torch_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(network)]
    return {key.removesuffix(".weight"): key for key in keys if key.endswith(".weight")}


def parsed(name: str) -> Parsed | None:
    """Splits a tensor's name into its parts. Returns None if it is not a name that LoRAs use."""
    for role, end in _COMPILED.items():
        if match := end.search(name):
            layer = _WRAPPERS.sub("", name[: match.start()]).replace(".processor", "")
            return Parsed(layer.replace(".", "_"), role, match.groupdict().get("adapter"))
    return None


def unsupported(names: Any) -> str | None:
    """Returns the name of an unsupported method that uses one of the given tensor names, or None."""
    for pattern, method in _UNSUPPORTED.items():
        if any(re.search(pattern, name) for name in names):
            return method
    return None


def places(networks: Mapping[str, Any], names: Mapping[str, LoraNames]) -> Callable[[str], Place | None]:
    """Returns a function that maps a tensor's name to the layer that the tensor changes, or to None."""
    layers = {
        part: {name.replace(".", "_"): key for name, key in names[part].layers(network).items()}
        for part, network in networks.items()
    }
    starts = [(start.replace(".", "_"), part) for part in networks for start in names[part].starts]
    starts.sort(key=lambda pair: -len(pair[0]))  # longest first, so that the empty prefix is last

    def place(name: str) -> Place | None:
        if (parts := parsed(name)) is None:
            return None
        for start, part in starts:
            if not parts.layer.startswith(start):
                continue
            layer = parts.layer.removeprefix(start)
            # Files for one network may omit the network's prefix.
            for candidate in [part] if start else [part, *layers]:
                if layer in layers[candidate]:
                    return Place(candidate, layers[candidate][layer], parts.role, parts.adapter)
        return None

    return place
