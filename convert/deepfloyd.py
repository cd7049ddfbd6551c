"""Reads a DeepFloyd-IF stage in its original layout: `config.yml` and `pytorch_model.bin`.

The UNet is the same as in diffusers, but its layers have different names. diffusers groups resnets and attention
modules by resolution level. The original code has one list of blocks for the down path and one for the up path (see
`sega_jax.weights.original_names.places`). Its linear layers over tokens are 1 x 1 convolutions. A single convolution
computes an attention module's queries, keys and values. The convolution's rows are ordered by head: the first head's
queries, keys and values, then the second head's, and so on.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sega_jax.nn.config import build
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.text.files import CheckpointError
from sega_jax.weights.fused import Forms, parameters
from sega_jax.weights.layout import Entry, Layout, from_torch, leaves, torch_name, torch_shape
from sega_jax.weights.original_names import RESNET, places
from sega_jax.weights.torch_pickle import PickledTensors

CONFIG = "config.yml"

# Layers outside the resolution levels.
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "aug_proj.0",
    "class_embedding.linear_2": "aug_proj.2",
    "encoder_hid_proj": "encoder_proj",
    "add_embedding.norm1": "encoder_pooling.0",
    "add_embedding.pool": "encoder_pooling.1",
    "add_embedding.proj": "encoder_pooling.2",
    "add_embedding.norm2": "encoder_pooling.3",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Layers of resnets and attentions.
_LAYERS = RESNET | {"group_norm": "norm", "norm_cross": "norm_encoder", "to_out.0": "proj_out"}
# {fused layer: the layers of this library that it combines, in the order of its rows}.
_FUSED = {"qkv": ("to_q", "to_k", "to_v"), "encoder_kv": ("add_k_proj", "add_v_proj")}
_FORMS = Forms(
    fused={rf"\.{layer}\.(weight|bias)$": layers for layer, layers in _FUSED.items()},
    convolutions=rf"\.({'|'.join(_FUSED)}|proj_out)\.",
)


class _Params(NamedTuple):
    """The `params` in config.yml that define the network. The defaults describe IF-I-XL."""

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    model_channels: int = 704
    channel_mult: str | tuple[int, ...] = "1,2,3,4"
    num_res_blocks: int | tuple[int, ...] = 3
    attention_resolutions: str | tuple[int, ...] = "32,16,8"
    num_head_channels: int = 64
    encoder_dim: int = 4096
    encoder_channels: int = 2816
    att_pool_heads: int = 64
    activation: str = "gelu"
    efficient_activation: bool = False
    scale_skip_connection: bool = False


# {option: its only supported values}. The options in `_IGNORED` do not affect the network.
_FIXED = {
    "use_scale_shift_norm": (True,),
    "resblock_updown": (True,),
    "disable_self_attentions": (None, False, ""),
    "num_classes": (None,),
    "dims": (2,),
    "interpolate_mode": ("bilinear",),
}
_IGNORED = ("precision", "dropout", "conv_resample", "num_heads", "num_heads_upsample")
_OPTIONAL = ("efficient_activation", "scale_skip_connection")
_SCALAR = str | int | float
# {whether the level has attention: block type}.
_DOWN = {True: "SimpleCrossAttnDownBlock2D", False: "ResnetDownsampleBlock2D"}
_UP = {True: "SimpleCrossAttnUpBlock2D", False: "ResnetUpsampleBlock2D"}


def is_original(folder: Path) -> bool:
    """Returns whether a folder has the original layout but not diffusers' layout.

    Repositories on the hub contain both layouts; diffusers' layout takes precedence.
    """
    return os.path.isfile(folder / CONFIG) and not os.path.exists(folder / "model_index.json")


class Stage(NamedTuple):
    """A stage without weights: its UNet (only shapes), and {path: content} for the JSON files in diffusers' layout."""

    unet: UNet2DConditionModel
    files: dict[str, dict[str, Any]]


def describe(folder: Path) -> Stage:
    """Reads config.yml and describes the stage.

    The returned files describe a diffusers pipeline without a safety checker or text encoder: all stages share one
    text encoder, and no stage's weight file contains it. The schedulers have the original repository's defaults.

    Raises:
        CheckpointError: config.yml is missing or broken, or describes an unsupported network.
    """
    path = folder / CONFIG
    try:
        config = _unet_config(_params(path))
        unet = UNet2DConditionModel(UNetConfig.from_dict(config))
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from None
    second = bool(config["class_embed_type"])
    cosine = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    scheduler = cosine | {
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.0 if second else 1.5,
    }
    schedulers = {"scheduler": scheduler} | ({"image_noising_scheduler": cosine} if second else {})
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker")
    index = {
        "_class_name": "IFSuperResolutionPipeline" if second else "IFPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        **{name: ["diffusers", "DDPMScheduler"] for name in schedulers},
        **{name: [None, None] for name in absent},
        "requires_safety_checker": False,
    }
    files = {f"{name}/scheduler_config.json": options for name, options in schedulers.items()}
    return Stage(unet, {"unet/config.json": config, **files, "model_index.json": index})


def _params(path: Path) -> dict[str, Any]:
    """Reads the `params` of config.yml."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not readable YAML ({reason}); fetch it again") from None
    params = content.get("params") if isinstance(content, dict) else None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} has no params, expected the parameters of a DeepFloyd-IF stage; fetch it again")
    for name, value in params.items():
        entries = value if isinstance(value, list) else [value]
        # With YAML references, a small file can describe huge values. All values are checked before printing any.
        if not isinstance(name, str) or not all(entry is None or isinstance(entry, _SCALAR) for entry in entries):
            raise CheckpointError(f"{path}: {str(name)[:80]} is neither a value nor a list of values; fetch it again")
    return params


def _unet_config(params: dict[str, Any]) -> dict[str, Any]:
    """Translates `params` to diffusers' UNet config."""
    missing = [name for name in _Params._fields if params.get(name) is None and name not in _OPTIONAL]
    if missing:
        raise ValueError(f"params lacks {', '.join(missing)}; fetch the file again")
    params = {"use_scale_shift_norm": False, "resblock_updown": False} | params
    choices = {"activation": ("gelu", "silu")}
    p = build(_Params, params, "DeepFloyd-IF", fixed=_FIXED, choices=choices, ignored=_IGNORED)
    if (p.in_channels, p.out_channels) not in ((3, 6), (6, 6)):
        raise ValueError(
            f"in_channels={p.in_channels} and out_channels={p.out_channels} do not fit a supported stage: the first"
            " stage has 3 and 6, the second 6 and 6"
        )
    widths = _numbers("channel_mult", p.channel_mult)
    rates = _numbers("attention_resolutions", p.attention_resolutions)
    if isinstance(p.attention_resolutions, str):  # strings contain sizes in pixels, lists contain downsampling factors
        rates = [p.image_size // size for size in rates]
    attends = [2**level in rates for level in range(len(widths))]
    scale = (
        1 / 0.7071 if p.scale_skip_connection else 1.0
    )  # the original code multiplies by 0.7071, not by the square root of 1/2
    projected = p.encoder_dim != p.encoder_channels
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": p.image_size,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "block_out_channels": [width * p.model_channels for width in widths],
        "layers_per_block": p.num_res_blocks,
        "down_block_types": [_DOWN[yes] for yes in attends],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [_UP[yes] for yes in attends[::-1]],
        "act_fn": p.activation,
        "attention_head_dim": p.num_head_channels,
        "cross_attention_dim": p.encoder_channels,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": p.encoder_dim if projected else None,
        "encoder_hid_dim_type": "text_proj" if projected else None,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": p.att_pool_heads,
        "class_embed_type": "timestep" if p.in_channels == 6 else None,
        "time_embedding_dim": max(widths) * p.model_channels,
        "time_embedding_act_fn": p.activation if p.efficient_activation else None,
        "resnet_skip_time_act": p.efficient_activation,
        "resnet_time_scale_shift": "scale_shift",
        "resnet_out_scale_factor": scale,
        "mid_block_scale_factor": scale,
    }


def _numbers(name: str, value: str | tuple[int, ...]) -> list[int]:
    """Reads positive integers from a tuple or a comma-separated string."""
    try:
        numbers = [int(entry) for entry in (value.split(",") if isinstance(value, str) else value)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f'{name}={value!r} should be positive numbers like "1,2,3,4"')
    return numbers


def original_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Returns {key in diffusers' layout: original name} for a UNet's parameters.

    A parameter that is part of a fused tensor has a name like "middle_block.1.qkv.weight[to_q]".
    """
    known = _ENDS | dict(places(unet))
    return {key: _original_name(key, known) for key in leaves(unet)}


def _original_name(key: str, places: dict[str, str]) -> str:
    place = next(place for place in places if key.startswith(f"{place}."))
    layer, _, kind = key.removeprefix(f"{place}.").rpartition(".")
    for fused, parts in _FUSED.items():
        if layer in parts:
            return f"{places[place]}.{fused}.{kind}[{layer}]"
    return ".".join(filter(None, (places[place], _LAYERS.get(layer, layer), kind)))


class OriginalTensors(PickledTensors):
    """Reads the parameters in `pytorch_model.bin`. Some layers are fused, and linear layers over tokens are
    convolutions.

    Raises:
        CheckpointError: as for `PickledTensors`.
    """

    def __init__(self, folder: Path, unet: UNet2DConditionModel):
        names = original_names(unet)
        self._width = unet.config.level("attention_head_dim", 0)
        self.layout = Layout(lambda path: names[torch_name(path)], torch_shape, from_torch)
        super().__init__(folder, "pytorch_model", None, str)
        self.keys = {name: key for key, name in names.items()}

    def _open(self, path: Path) -> Iterator[Entry]:
        for entry in super()._open(path):
            yield from (parameter for _, parameter in parameters(entry.key, entry, _FORMS, self._width))
