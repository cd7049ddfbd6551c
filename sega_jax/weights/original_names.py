"""Names in the repositories that Stable Diffusion was trained in.

The networks are those that diffusers has, in other words. Where its UNet has levels of resnets and attentions, the
original has one list of blocks down and one up, whose entries are lists themselves: a resnet, an attention where the
level has it, and in the last block up of a level its upsampler; a downsampler is a block of its own. The autoencoder's
levels count from the largest picture in both directions, and its attention is of 1x1 convolutions. OpenAI's text
encoder is called the same; OpenCLIP's has its queries, keys and values in one tensor, and its projection transposed.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.weights.pull import leaves

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# The text encoders of 1.x and 2.x, and both of XL.
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPENCLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# The layers of a resnet, in all repositories that descend from guided-diffusion.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# The autoencoder's attention as the original has it, and under other names that are about.
VAE_ATTENTION = {
    "group_norm": ("norm",),
    "to_q": ("q", "query"),
    "to_k": ("k", "key"),
    "to_v": ("v", "value"),
    "to_out.0": ("proj_out", "proj_attn", "to_out"),
}
_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
FUSED = ("q_proj", "k_proj", "v_proj")  # in the order of their rows in `in_proj`


def places(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Of every resnet, attention and sampler on the way down and up, its path and the entry in the original's
    blocks."""
    down, up = [], []
    for i, level in enumerate(unet.down_blocks):
        for j in range(len(level.resnets)):
            attention = [f"down_blocks.{i}.attentions.{j}"] if level.attentions else []
            down.append([f"down_blocks.{i}.resnets.{j}", *attention])
        down += [[f"down_blocks.{i}.downsamplers.0"]] if level.downsamplers else []
    for i, level in enumerate(unet.up_blocks):
        for j in range(len(level.resnets)):
            attention = [f"up_blocks.{i}.attentions.{j}"] if level.attentions else []
            up.append([f"up_blocks.{i}.resnets.{j}", *attention])
        up[-1] += [f"up_blocks.{i}.upsamplers.0"] if level.upsamplers else []
    for name, blocks, first in (("input_blocks", down, 1), ("output_blocks", up, 0)):
        for number, block in enumerate(blocks, first):
            yield from ((part, f"{name}.{number}.{k}") for k, part in enumerate(block))


def original_names(network: Any, start: str) -> dict[str, str]:
    """For every parameter's key in diffusers' layout, its name in the original; one of several in one tensor is
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight[q_proj]".

    Args:
        network: a UNet, an autoencoder, or a text encoder, with or without values.
        start: of the names: `UNET`, `VAE`, `CLIP`, `OPENCLIP`, `CLIP_XL` or `OPENCLIP_XL`, or "".
    """
    if isinstance(network, UNet2DConditionModel):
        found = _UNET_ENDS | dict(places(network))
        name = partial(_unet_name, places=found)
    elif isinstance(network, AutoencoderKL):
        name = partial(_vae_name, levels=len(network.config.block_out_channels))
    else:
        name = _openclip_name if start in (OPENCLIP, OPENCLIP_XL) else _clip_name
    return {key: start + name(key) for key in leaves(network)}


def _unet_name(key: str, places: Mapping[str, str]) -> str:
    place = next(place for place in places if key.startswith(f"{place}."))
    layer, _, kind = key.removeprefix(f"{place}.").rpartition(".")
    if "downsamplers" in place:
        layer = "op"
    return ".".join(filter(None, (places[place], RESNET.get(layer, layer), kind)))


def _vae_name(key: str, levels: int) -> str:
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
    key = key.replace("down_blocks.", "down.").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = re.sub(r"\.resnets\.", ".block.", key).replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    for ours, (theirs, *_) in VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return key


def _clip_name(key: str) -> str:
    return f"text_model.{key.removeprefix('text_model.')}"


def _openclip_name(key: str) -> str:
    key = key.removeprefix("text_model.")
    if key in _OPENCLIP:
        return _OPENCLIP[key]
    layer, part, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key).groups()
    block = f"transformer.resblocks.{layer}"
    if (fused := part.removeprefix("self_attn.")) in FUSED:
        return f"{block}.attn.in_proj_{kind}[{fused}]"
    return f"{block}.{_OPENCLIP_LAYERS[part]}.{kind}"
