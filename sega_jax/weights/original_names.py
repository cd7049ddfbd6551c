"""Translates parameter names from diffusers' layout to the names in the original latent diffusion repositories.

Each `*_names` function returns {key in diffusers' layout: original name} for one network. Only the shapes of its
parameters are needed. Names in files have an additional prefix that depends on the family. A parameter that is part
of a fused tensor has a name like "transformer.resblocks.0.attn.in_proj_weight[q_proj]". `OPENCLIP_FORMS` and
`VAE_FORMS` describe how files store such tensors.

diffusers groups the UNet's resnets and attention modules by level. The original UNet has one list of blocks for the
down path and one for the up path. Each block is itself a list that contains a resnet and, at levels with attention, an
attention module. In the up path, the last block of a level also contains the upsampler. In the down path, a downsampler
is a separate block. The original autoencoder numbers its levels from the highest resolution in both the encoder and the
decoder. The parameters of OpenAI's text encoder have the same names in both layouts.
"""

import re
from collections.abc import Iterator, Mapping

from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.weights.fused import Forms
from sega_jax.weights.layout import leaves

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# The names of a resnet's layers in all repositories derived from guided-diffusion.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# {layer of the autoencoder's attention: (original name, *alternative names in files)}.
_VAE_ATTENTION = {
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
_FUSED = ("q_proj", "k_proj", "v_proj")

OPENCLIP_FORMS = Forms(fused={r"\.in_proj_(weight|bias)$": _FUSED}, transposed=r"(^|\.)text_projection$")
VAE_FORMS = Forms(convolutions=r"\.mid\.attn_1\.")


def places(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Yields (path, original path) for every resnet, attention, downsampler and upsampler outside the middle block."""
    down, up = [], []
    for i, level in enumerate(unet.down_blocks):
        for j in range(len(level.resnets)):
            attention = [f"down_blocks.{i}.attentions.{j}"] if level.attentions else []
            down.append([f"down_blocks.{i}.resnets.{j}", *attention])
        down += [[f"down_blocks.{i}.downsamplers.0"]] if level.downsamplers else []
    for i, up_level in enumerate(unet.up_blocks):
        for j in range(len(up_level.resnets)):
            attention = [f"up_blocks.{i}.attentions.{j}"] if up_level.attentions else []
            up.append([f"up_blocks.{i}.resnets.{j}", *attention])
        up[-1] += [f"up_blocks.{i}.upsamplers.0"] if up_level.upsamplers else []
    for name, blocks, first in (("input_blocks", down, 1), ("output_blocks", up, 0)):
        for number, block in enumerate(blocks, first):
            yield from ((part, f"{name}.{number}.{k}") for k, part in enumerate(block))


def unet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Returns {key: original name} for a UNet's parameters."""
    known = _UNET_ENDS | dict(places(unet))
    return {key: _unet_name(key, known) for key in leaves(unet)}


def vae_names(vae: AutoencoderKL) -> dict[str, str]:
    """Returns {key: original name} for an autoencoder's parameters."""
    levels = len(vae.config.block_out_channels)
    return {key: _vae_name(key, levels) for key in leaves(vae)}


def clip_names(text_encoder: CLIPTextModel) -> dict[str, str]:
    """Returns {key: OpenAI's name} for a CLIP text encoder's parameters."""
    return {key: clip_spelling(key) for key in leaves(text_encoder)}


def openclip_names(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> dict[str, str]:
    """Returns {key: OpenCLIP's name} for a text encoder's parameters."""
    return {key: _openclip_name(key) for key in leaves(text_encoder)}


def openclip_spelling(name: str) -> str:
    """Translates the name of a text projection stored as a linear layer to its name in `openclip_names`."""
    return "text_projection" if name == "text_projection.weight" else name


def vae_spelling(name: str) -> str:
    """Translates an alternative name of an autoencoder's parameter to the name in `vae_names`."""
    for layer, (original, *others) in _VAE_ATTENTION.items():
        for other in (layer, *others):
            name = name.replace(f"mid.attn_1.{other}.", f"mid.attn_1.{original}.")
    return name


def clip_spelling(name: str) -> str:
    """Translates a name with or without the prefix "text_model." to the name in `clip_names`."""
    return f"text_model.{name.removeprefix('text_model.')}"


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
    return vae_spelling(key.replace("mid_block.attentions.0.", "mid.attn_1."))


def _openclip_name(key: str) -> str:
    key = key.removeprefix("text_model.")
    if key in _OPENCLIP:
        return _OPENCLIP[key]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    assert match is not None
    layer, part, kind = match.groups()
    block = f"transformer.resblocks.{layer}"
    if (fused := part.removeprefix("self_attn.")) in _FUSED:
        return f"{block}.attn.in_proj_{kind}[{fused}]"
    return f"{block}.{_OPENCLIP_LAYERS[part]}.{kind}"
