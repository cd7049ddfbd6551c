"""Which checkpoints a LoRA is made for, as far as the names and sizes of its layers show it."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

# (out, in) of the weights that a file changes, or () where it does not say, by the layers' names in the file, whose
# dots are underscores.
Sizes = Mapping[str, tuple[int, ...]]


class LoraKind(NamedTuple):
    """Checkpoints that share their LoRAs."""

    title: str
    recognise: Callable[[Sizes], bool]


def attends_to(width: int) -> Callable[[Sizes], bool]:
    """Returns a function that tells whether a UNet attends to text of this width and has a multiple of 320 channels, as
    Stable Diffusion's UNets have."""
    return lambda sizes: any(
        size[1:2] == (width,) and size[0] % 320 == 0 for name, size in sizes.items() if re.search(_ATTENTION, name)
    )


def has(pattern: str, width: int | None = None) -> Callable[[Sizes], bool]:
    """Returns a function that tells whether a layer has a name like this, and as many inputs if `width` is given."""
    return lambda sizes: any(
        width is None or size[1:2] == (width,) for name, size in sizes.items() if re.search(pattern, name)
    )


def any_of(*signs: Callable[[Sizes], bool]) -> Callable[[Sizes], bool]:
    """Returns a function that tells whether one of these signs is there."""
    return lambda sizes: any(sign(sizes) for sign in signs)


_ATTENTION = r"(?:down|up|mid|input|output|middle)_blocks?_.*attn2_to_[kv]"
_ROOT = r"^(lora_unet_|lora_transformer_|transformer_|diffusion_model_)?"
# Families whose checkpoints cannot be loaded here. The first that fits is the one.
FOREIGN = (
    LoraKind("Stable Cascade", has(r"^lora_prior_")),
    LoraKind("HiDream", has(r"double_stream_blocks_\d+|single_stream_blocks_\d+")),
    LoraKind("Qwen-Image", has(r"transformer_blocks_\d+_(img|txt)_(mlp|mod)")),
    LoraKind("FLUX", has(r"single_transformer_blocks_\d+|(double|single)_blocks_\d+_(img|txt|linear)")),
    LoraKind("FLUX", has(r"transformer_blocks_\d+_attn_(add_[qkv]_proj|to_[qkv])", 3072)),
    LoraKind("Stable Diffusion 3", has(r"joint_blocks_\d+|transformer_blocks_\d+_attn_(add_[qkv]_proj|to_add_out)")),
    LoraKind("Wan", has(r"(?<!transformer_)(?<!single_)blocks_\d+_(self_attn|cross_attn)_[qkvo]")),
    LoraKind("PixArt", has(rf"{_ROOT}transformer_blocks_\d+_attn[12]_to_[qkv]$", 1152)),
    LoraKind("LTX-Video", has(rf"{_ROOT}transformer_blocks_\d+_attn[12]_to_[qkv]$", 2048)),
    LoraKind("Sana", has(rf"{_ROOT}transformer_blocks_\d+_attn[12]_to_[qkv]$", 2240)),
    LoraKind("Lumina", has(r"(noise|context)_refiner_\d+_attn_")),
    LoraKind("Z-Image", has(r"(noise|context)_refiner_\d+_attention_|(^|_)layers_\d+_attention_(to_[qkv]|qkv)")),
)
