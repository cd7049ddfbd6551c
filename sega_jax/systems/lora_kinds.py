"""Rules that recognise a LoRA's family by the names and sizes of the LoRA's layers."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

# {layer name: (outputs, inputs)}, the sizes of the weights that a file changes; () if a size is unknown. The layer
# names are as in the file, but with underscores instead of dots.
Sizes = Mapping[str, tuple[int, ...]]


class LoraKind(NamedTuple):
    """A group of checkpoints that can use the same LoRAs."""

    title: str
    recognise: Callable[[Sizes], bool]


def attends_to(width: int) -> Callable[[Sizes], bool]:
    """Returns a test for Stable Diffusion UNets that attend to text of the given width.

    In these UNets, the numbers of channels are multiples of 320.
    """
    return lambda sizes: any(
        size[1:2] == (width,) and size[0] % 320 == 0 for name, size in sizes.items() if re.search(_ATTENTION, name)
    )


def has(pattern: str, width: int | None = None) -> Callable[[Sizes], bool]:
    """Returns a test that passes if the name of any layer matches the pattern.

    If `width` is given, that layer must have `width` inputs.
    """
    return lambda sizes: any(
        width is None or size[1:2] == (width,) for name, size in sizes.items() if re.search(pattern, name)
    )


def any_of(*tests: Callable[[Sizes], bool]) -> Callable[[Sizes], bool]:
    """Returns a test that passes if any of the given tests passes."""
    return lambda sizes: any(test(sizes) for test in tests)


_ATTENTION = r"(?:down|up|mid|input|output|middle)_blocks?_.*attn2_to_[kv]"
_ROOT = r"^(lora_unet_|lora_transformer_|transformer_|diffusion_model_)?"
# Families whose checkpoints this library cannot load. If several match, the first match is used.
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
