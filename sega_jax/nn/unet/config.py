"""The config of a UNet: the fields of `unet/config.json` that define the network."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sega_jax.nn.config import build
from sega_jax.nn.layers import ACTIVATIONS

# The number of groups in the norm over the text encoder's hidden states in joint attention; diffusers has no option for
# it.
TEXT_GROUPS = 32


class _Family(NamedTuple):
    """A family of UNets: the names of its blocks, and the options that have a fixed value in this family."""

    down: tuple[str, ...]
    up: tuple[str, ...]
    fixed: Mapping[str, tuple]


_CROSS, _SIMPLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"
# Other mid blocks in the Stable Diffusion family. Some smaller models have one resnet there, or no block ("").
_RESNET, _NOTHING = "UNetMidBlock2D", ""
# {mid block: family} for Stable Diffusion and DeepFloyd-IF.
_FAMILIES = {
    _CROSS: _Family(
        ("CrossAttnDownBlock2D", "DownBlock2D"),
        ("UpBlock2D", "CrossAttnUpBlock2D"),
        {
            "mid_block_scale_factor": (1, 1.0),
            "encoder_hid_dim": (None,),
            "encoder_hid_dim_type": (None,),
            "class_embed_type": (None,),
            "addition_embed_type": (None, "text_time"),
            "resnet_time_scale_shift": ("default",),
            "resnet_skip_time_act": (False,),
            "resnet_out_scale_factor": (1, 1.0),
            "time_embedding_act_fn": (None,),
            "cross_attention_norm": (None,),
        },
    ),
    _SIMPLE: _Family(
        ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        {
            "only_cross_attention": (False,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None, "text_proj"),
            "class_embed_type": (None, "timestep"),
            "addition_embed_type": (None, "text"),
            "resnet_time_scale_shift": ("scale_shift",),
            "cross_attention_norm": ("group_norm",),
            "time_cond_proj_dim": (None,),
            "reverse_transformer_layers_per_block": (None,),
        },
    ),
}
# {option: supported values} for options that change the network in ways that this module does not support.
_FIXED = {
    "center_input_sample": (False,),
    "mid_block_type": (_CROSS, _SIMPLE, _RESNET, None),
    "downsample_padding": (1,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
}
# Options without effect. Dropout is only for training, the attention softmax is always computed in float32, the two
# Flax options choose how attention is computed, and the others belong to unsupported options.
_IGNORED = (
    "dropout",
    "upcast_attention",
    "use_memory_efficient_attention",
    "split_head_dim",
    *{option for family in _FAMILIES.values() for option in family.fixed},
)


def _is_of_old_default(config: Mapping[str, Any]) -> bool:
    """Returns whether a config predates diffusers 0.9 and has a sample_size below 64.

    Before version 0.9, the default was 32, although Stable Diffusion 1 generates pictures of 512 x 512 pixels (64 x 64
    latents). diffusers' pipelines also replace such a value with 64.
    """
    version, size = config.get("_diffusers_version"), config.get("sample_size")
    old = isinstance(version, str) and re.match(r"0\.[0-8]\.", version)
    return bool(old) and type(size) is int and 0 < size < 64


class UNetConfig(NamedTuple):
    """The fields of `unet/config.json` that define the network, with diffusers' defaults.

    Where diffusers allows it, a number may also be a tuple with one entry for each level. 0 and "" mean None. Despite
    its name, `attention_head_dim` is the number of heads, except in DeepFloyd-IF, where it is the width of a head. An
    entry of `transformer_layers_per_block` may be a tuple with one entry for each transformer on the way down. In this
    case, `reverse_transformer_layers_per_block` has the entries for the way up, starting at the deepest level.
    """

    sample_size: int | tuple[int, int] = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = _CROSS
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] = ()
    encoder_hid_dim: int = 0
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str = ""
    addition_embed_type: str = ""
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0
    num_class_embeds: int = 0
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_dim: int = 0
    time_embedding_act_fn: str = ""
    time_cond_proj_dim: int = 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support. The message names the option
                and the supported values.
        """
        simple = config.get("mid_block_type") == _SIMPLE
        family = _FAMILIES[_SIMPLE if simple else _CROSS]
        choices = {"down_block_types": family.down, "up_block_types": family.up}
        choices |= {"act_fn": tuple(ACTIVATIONS), "time_embedding_act_fn": tuple(ACTIVATIONS)}
        if simple:
            # In diffusers, these options default to Stable Diffusion's values.
            config = {"resnet_time_scale_shift": None, "cross_attention_norm": None} | dict(config)
        if _is_of_old_default(config):
            config = dict(config) | {"sample_size": 64}
        fixed, zero = {**_FIXED, **family.fixed}, ("transformer_layers_per_block",)
        self = build(cls, config, "UNet", fixed=fixed, choices=choices, ignored=_IGNORED, may_be_zero=zero)
        if "mid_block_type" in config and config["mid_block_type"] is None:
            self = self._replace(mid_block_type=_NOTHING)
        if config.get("encoder_hid_dim_type") and not self.encoder_hid_dim:
            raise ValueError("UNet config: encoder_hid_dim is missing, but encoder_hid_dim_type needs it")
        self._check_levels()
        self._check_transformers()
        if simple:
            self._check_text()
        if self.has_size_conditioning and self.pooled_dim <= 0:
            raise ValueError(
                "UNet config: projection_class_embeddings_input_dim="
                f"{self.projection_class_embeddings_input_dim} should be the number of pooled text channels plus six"
                f" times addition_time_embed_dim={self.addition_time_embed_dim}"
            )
        return self

    def fixed(self) -> dict[str, Any]:
        """Returns the options of diffusers' config.json that are not fields and have only one supported value."""
        family = _FAMILIES[_SIMPLE if self.mid_block_type == _SIMPLE else _CROSS]
        fixed = {name: values[0] for name, values in family.fixed.items() if len(values) == 1}
        if self.adds_keys and self.encoder_hid_dim:
            fixed["encoder_hid_dim_type"] = "text_proj"
        return {name: value for name, value in fixed.items() if name not in self._fields}

    def _check_levels(self) -> None:
        count = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"UNet config: {name} has {len(getattr(self, name))} entries, but block_out_channels has"
                    f" {count}; they should have one entry for each level"
                )
        for level, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"UNet config: {channels} channels cannot be split into {self.norm_num_groups} groups"
                    " (norm_num_groups)"
                )
            heads = self.level("attention_head_dim", level)
            if channels % heads and self._attends(level):
                into = f"heads of {heads} channels" if self.adds_keys else f"{heads} heads"
                raise ValueError(f"UNet config: {channels} channels cannot be split into {into} (attention_head_dim)")

    def _check_transformers(self) -> None:
        nested = self.transformer_layers_per_block
        lists = isinstance(nested, tuple) and any(isinstance(one, tuple) for one in nested)
        if lists and not self.reverse_transformer_layers_per_block:
            raise ValueError(
                "UNet config: transformer_layers_per_block has nested lists, so reverse_transformer_layers_per_block"
                " (for the way up) is required, but it is missing"
            )
        count = len(self.block_out_channels)
        for level in range(count):
            layers = self.level("layers_per_block", level)
            for up, kinds in ((False, self.down_block_types[level]), (True, self.up_block_types[count - 1 - level])):
                entries = self.transformer_layers(level, up=up)
                if "CrossAttn" in kinds and len(entries) != layers + up:
                    name = "reverse_transformer_layers_per_block" if up else "transformer_layers_per_block"
                    raise ValueError(
                        f"UNet config: {name} has {len(entries)} entries, but a level has {layers + up} transformers"
                    )
        if self.mid_block_type in (_RESNET, _NOTHING) and not any(
            "CrossAttn" in kind for kind in (*self.down_block_types, *self.up_block_types)
        ):
            raise ValueError(
                "UNet config: no block attends to the text; down_block_types should include CrossAttnDownBlock2D"
            )

    def transformer_layers(self, level: int, *, up: bool = False) -> tuple[int, ...]:
        """Returns the number of layers in each transformer of a level, on the way down or up."""
        reverse = self.reverse_transformer_layers_per_block
        count = self.level("layers_per_block", level) + up
        if up and reverse:
            if len(reverse) != len(self.block_out_channels):
                raise ValueError(
                    f"UNet config: reverse_transformer_layers_per_block has {len(reverse)} entries, but"
                    f" block_out_channels has {len(self.block_out_channels)}; they should have one entry for each level"
                )
            layers: Any = reverse[~level]
        else:
            layers = self.level("transformer_layers_per_block", level)
        return layers if isinstance(layers, tuple) else (layers,) * count

    @property
    def middle_layers(self) -> int:
        """The number of layers in the mid block's transformer."""
        layers: Any = self.level("transformer_layers_per_block", len(self.block_out_channels) - 1)
        return layers[0] if isinstance(layers, tuple) else layers

    def _attends(self, level: int) -> bool:
        """Returns whether to check the heads of a level. In the Stable Diffusion family, all levels are checked."""
        last = level == len(self.block_out_channels) - 1
        return not self.adds_keys or last or "Attn" in self.down_block_types[level] + self.up_block_types[~level]

    def _check_text(self) -> None:
        for name in ("attention_head_dim", "cross_attention_dim"):
            if isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"UNet config: {name}={getattr(self, name)} is not supported; it should be one number for all"
                    " levels"
                )
        if self.level("cross_attention_dim", 0) % TEXT_GROUPS:
            raise ValueError(
                f"UNet config: cross_attention_dim {self.cross_attention_dim} cannot be split into {TEXT_GROUPS} groups"
            )
        if self.addition_embed_type and self.text_dim % self.addition_embed_type_num_heads:
            raise ValueError(
                f"UNet config: {self.text_dim} text channels cannot be split into"
                f" {self.addition_embed_type_num_heads} heads (addition_embed_type_num_heads)"
            )

    @property
    def adds_keys(self) -> bool:
        """Whether the network belongs to the DeepFloyd-IF family, whose attention concatenates the keys from the text
        and from the picture."""
        return self.mid_block_type == _SIMPLE

    @property
    def middle_resnets(self) -> int:
        """The number of resnets in the mid block."""
        return {_NOTHING: 0, _RESNET: 1}.get(self.mid_block_type, 2)

    @property
    def has_size_conditioning(self) -> bool:
        """Whether the network has Stable Diffusion XL's conditioning: a pooled text embedding and sizes."""
        return self.addition_embed_type == "text_time"

    @property
    def pooled_dim(self) -> int:
        """The number of channels of the pooled text embedding, which is concatenated with the embeddings of six
        sizes."""
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    @property
    def text_dim(self) -> int:
        """The number of channels of the text encoder's hidden states, if it is the same for all levels."""
        return self.encoder_hid_dim or self.level("cross_attention_dim", 0)

    def level(self, name: str, level: int) -> int:
        """Returns a field's value at a level. The field has one value for all levels, or one entry for each level."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return value
        if len(value) != len(self.block_out_channels):
            raise ValueError(
                f"UNet config: {name} has {len(value)} entries, but block_out_channels has"
                f" {len(self.block_out_channels)}; they should have one entry for each level"
            )
        return value[level]
