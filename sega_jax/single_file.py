"""Stable Diffusion 1.x and 2.x in one file, with the names of the repositories that it was trained in.

The networks are those that diffusers has, in other words. Where its UNet has levels of resnets and attentions, the
original has one list of blocks down and one up, whose entries are lists themselves: a resnet, an attention where the
level has it, and in the last block up of a level its upsampler; a downsampler is a block of its own. The autoencoder's
levels count from the largest picture in both directions, and its attention is of 1x1 convolutions. The text encoder of
1.x is called the same; that of 2.x is OpenCLIP's, whose queries, keys and values come from one tensor, and whose last
layer is not used.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.checkpoint import (
    CheckpointError,
    Entry,
    Layout,
    Tensors,
    from_torch,
    leaves,
    torch_name,
    torch_shape,
)
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pickled import CkptTensors

ENDINGS = (".safetensors", ".ckpt")
# Folders in diffusers layout without weights and vocabulary.
_PUBLISHED = Path(__file__).parent / "published"

UNET, VAE, CLIP, OPENCLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)
_STARTS = {"unet": (UNET,), "vae": (VAE, "vae."), "text_encoder": (CLIP, OPENCLIP)}
_EMA = "model_ema."
# Beside the networks' own tensors: of training, or of what nobody calls.
_OTHERS = {
    "unet": r"$^",
    "vae": r"(?!(encoder|decoder|quant_conv|post_quant_conv)\.)",
    "text_encoder": r".*(position_ids|text_projection(\.weight)?|logit_scale|attn_mask)$",
}

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
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
}
_OPENCLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_FUSED = ("q_proj", "k_proj", "v_proj")  # in the order of their rows in `in_proj`


def is_one(source: Any) -> bool:
    """Whether this names a single file, by its ending."""
    return isinstance(source, str | os.PathLike) and Path(source).suffix in ENDINGS and not Path(source).is_dir()


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
        start: of the names: `UNET`, `VAE`, `CLIP` or `OPENCLIP`, or "".
    """
    if isinstance(network, UNet2DConditionModel):
        found = _UNET_ENDS | dict(places(network))
        name = partial(_unet_name, places=found)
    elif isinstance(network, AutoencoderKL):
        name = partial(_vae_name, levels=len(network.config.block_out_channels))
    else:
        name = _openclip_name if start == OPENCLIP else _clip_name
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
    for ours, (theirs, *_) in _VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return key


def _clip_name(key: str) -> str:
    return f"text_model.{key}"


def _openclip_name(key: str) -> str:
    if key in _OPENCLIP:
        return _OPENCLIP[key]
    layer, part, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key).groups()
    block = f"transformer.resblocks.{layer}"
    if (fused := part.removeprefix("self_attn.")) in _FUSED:
        return f"{block}.attn.in_proj_{kind}[{fused}]"
    return f"{block}.{_OPENCLIP_LAYERS[part]}.{kind}"


def opened(path: Path) -> Tensors:
    """All tensors of a file, under its own names.

    Raises:
        CheckpointError: it is missing, broken, or hostile.
    """
    kind = CkptTensors if path.suffix == ".ckpt" else Tensors
    return kind(path.parent, path.stem, None, str)


def check(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a file holds a Stable Diffusion 1.x or 2.x with these names, by the shapes of its tensors.

    Raises:
        CheckpointError: it does not.
    """
    if not any(key.startswith(UNET) for key in shapes):
        raise CheckpointError(f"{path} has no Stable Diffusion's UNet, names that start with {UNET}: {_hint(shapes)}")
    if any(key.startswith("conditioner.") for key in shapes):
        raise CheckpointError(f"{path} is of Stable Diffusion XL, expected 1.x or 2.x")
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", ())[1:2]
    if channels not in ((), (4,)):
        raise CheckpointError(
            f"{path} takes {channels[0]} channels, as models that fill in, enlarge or know of depth do: only"
            " text-to-image checkpoints are supported, which take 4"
        )


def published(path: Path, shapes: Mapping[str, tuple[int, ...]], prediction_type: str | None = None) -> Path:
    """The folder of configs of the published checkpoint that a file is like, by the shapes of its tensors: Stable
    Diffusion 1.5, 2.1, or 2.1-base for "epsilon". What a model of 2.x predicts does not show; None is v, as in
    diffusers.

    Raises:
        CheckpointError: it is like none.
    """
    width = shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (0,))[-1]
    names = {768: "sd-1.5", 1024: "sd-2.1-base" if prediction_type == "epsilon" else "sd-2.1"}
    if width not in names:
        raise CheckpointError(
            f"{path} attends to text of width {width}, neither 768 as Stable Diffusion 1.x nor 1024 as 2.x; give"
            " config=, a folder in diffusers layout with its configs"
        )
    return _PUBLISHED / names[width]


def _hint(keys: Iterable[str]) -> str:
    if any("lora" in key for key in keys):
        return "it is a LoRA, which goes with a checkpoint as lora="
    if any(key.startswith(("down_blocks.", "encoder.", "text_model.")) for key in keys):
        return "it is one network in diffusers layout, give the folder of the whole checkpoint"
    return f"it has {', '.join(key[:80] for key in list(keys)[:3]) or 'nothing'}"


class OriginalWeights:
    """The weights of one network of a single file, under the original's names. Queries, keys and values are apart where
    the original has them in one tensor, and the autoencoder's attention has matrices where that is of 1x1 convolutions.

    Args:
        path: the file's.
        tensors: all of it, closed with this.
        part: "unet", "vae" or "text_encoder".
        module: the network, without values.
        ema: of a UNet, the moving average in place of the last step's weights.

    Raises:
        CheckpointError: the file has none of them.
    """

    def __init__(self, path: Path, tensors: Tensors, part: str, module: Any, *, ema: bool = False):
        self.folder, self._tensors = path, tensors
        try:
            names, rename = _renaming(path, tensors.shapes, part, module, ema)
            self._entries = _entries(path, tensors, rename)
        except BaseException:
            self.__exit__()
            raise
        self.layout = Layout(lambda path: names[torch_name(path)], torch_shape, from_torch)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.keys = {name: key for key, name in names.items()}
        self.nbytes = sum(entry.nbytes for entry in self._entries.values())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].read()

    def buffers(self) -> dict[str, np.ndarray]:
        return {}

    def __enter__(self) -> "OriginalWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.__exit__()


def _renaming(
    path: Path, keys: Iterable[str], part: str, module: Any, ema: bool
) -> tuple[dict[str, str], Callable[[str], str | None]]:
    """`original_names`, and from a file's keys to them; to None for what is of another network."""
    start = next((start for start in _STARTS[part] if any(key.startswith(start) for key in keys)), None)
    if start is None:
        raise CheckpointError(
            f"{path} has no {part}, names that start with {' or '.join(_STARTS[part])}; give {part}=, another"
            f" pipeline's (pipe.models.{part})"
        )
    names = original_names(module, VAE if part == "vae" else start)
    if ema and part == "unet":
        averages = {_average_name(name): name for name in names.values()}
        if averages.keys().isdisjoint(keys):
            raise CheckpointError(f"{path} has no moving average, names that start with {_EMA}; leave ema out")
        return names, averages.get
    # OpenCLIP's last layer is not used.
    unused = f"{OPENCLIP}transformer.resblocks.{module.config.num_hidden_layers}." if start == OPENCLIP else None
    return names, partial(_own_name, part=part, start=start, unused=unused)


def _entries(path: Path, tensors: Tensors, rename: Callable[[str], str | None]) -> dict[str, Entry]:
    """The tensors of one network, by the original's names."""
    found: dict[str, Entry] = {}
    for key, entry in tensors.entries.items():
        if (name := rename(key)) is None:
            continue
        for own, piece in _pieces(name, entry):
            if own in found:
                both = f"{entry.key} and {found[own].key}"
                raise CheckpointError(f"{path}: {both} are the same parameter; fetch it again")
            found[own] = piece
    return found


def _own_name(key: str, part: str, start: str, unused: str | None) -> str | None:
    """The original's name of a tensor of this network; None for others."""
    name = key.removeprefix(start)
    if name == key or re.match(_OTHERS[part], name) or (unused and key.startswith(unused)):
        return None
    if part == "vae":
        for ours, (theirs, *others) in _VAE_ATTENTION.items():
            for other in (ours, *others):
                name = name.replace(f"mid.attn_1.{other}.", f"mid.attn_1.{theirs}.")
        return VAE + name
    if start == CLIP:
        name = f"text_model.{name.removeprefix('text_model.')}"
    return start + name


def _average_name(name: str) -> str:
    return _EMA + name.removeprefix("model.").replace(".", "")


def _pieces(name: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """The parameters in a tensor."""
    if ".mid.attn_1." in name and entry.shape[2:] in ((1,), (1, 1)):
        yield name, entry._replace(shape=entry.shape[:2], read=partial(_reshaped, entry.read, entry.shape[:2]))
    elif name.endswith((".in_proj_weight", ".in_proj_bias")) and entry.shape and entry.shape[0] % len(_FUSED) == 0:
        rows = entry.shape[0] // len(_FUSED)
        shape, nbytes = (rows, *entry.shape[1:]), entry.nbytes // len(_FUSED)
        for i, part in enumerate(_FUSED):
            read = partial(_rows, entry.read, i * rows, rows)
            yield f"{name}[{part}]", Entry(f"{entry.key}[{part}]", shape, nbytes, read)
    else:
        yield name, entry


def _reshaped(read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return read().reshape(shape)


def _rows(read: Callable[[], np.ndarray], start: int, count: int) -> np.ndarray:
    return read()[start : start + count]
