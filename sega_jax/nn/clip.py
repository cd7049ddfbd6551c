"""CLIP's text and vision towers (OpenAI's and OpenCLIP's), in the layout of transformers' `CLIPTextModel` and
`CLIPVisionModel`."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.attention import attend
from sega_jax.nn.config import build
from sega_jax.nn.layers import ACTIVATIONS, Conv, Embed, LayerNorm, Linear, parameter

_TEXT_MODELS = (None, "clip_text_model", "clip")
_CHOICES = {"hidden_act": tuple(ACTIVATIONS)}
# Tensors that complete CLIP files contain but text encoders do not need.
_OF_PICTURES = re.compile(r"vision_model\.|visual_projection\.|logit_(scale|bias)$")
_UNUSED = re.compile(rf"{_OF_PICTURES.pattern}|text_projection(\.weight)?$")


class CLIPTextConfig(NamedTuple):
    """The fields of `text_encoder/config.json` that define the network, with transformers' defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Reads the config.json of a text encoder, or of a complete CLIP model, which describes its text encoder under
        `text_config`.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        if isinstance(text := config.get("text_config"), Mapping):
            config = {**text, "projection_dim": config.get("projection_dim", 512)}
        kind = config.get("model_type")
        if kind not in _TEXT_MODELS:
            raise ValueError(
                f"text encoder config: model_type={kind!r} is not supported; it should be clip_text_model, the type of"
                " CLIP's text encoders (OpenAI's and OpenCLIP's)"
            )
        self = build(cls, config, "text encoder", choices=_CHOICES, strict=False)
        _check_heads(self, "text encoder")
        return self


class CLIPVisionConfig(NamedTuple):
    """The fields of a vision tower's config that define the network, with transformers' defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPVisionConfig":
        """Reads a transformers config.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        fixed = {"num_channels": (3, None)}
        self = build(cls, config, "vision tower", fixed=fixed, choices=_CHOICES, strict=False)
        _check_heads(self, "vision tower")
        return self


def _check_heads(config: CLIPTextConfig | CLIPVisionConfig, what: str) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{what} config: hidden_size {config.hidden_size} is not a multiple of"
            f" num_attention_heads {config.num_attention_heads}"
        )


class SelfAttention(nnx.Module):
    """Multi-head self-attention over [batch, positions, channels]."""

    def __init__(self, channels: int, heads: int, *, causal: bool):
        self.heads, self.causal = heads, causal
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, channels)
        self.out_proj = Linear(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, heads=self.heads, causal=self.causal))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, channels: int, hidden: int, activation: str):
        self.activation = activation
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Self-attention and an MLP, each pre-normalised and with a residual connection."""

    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig, *, causal: bool):
        self.layer_norm1 = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = SelfAttention(c.hidden_size, c.num_attention_heads, causal=causal)
        self.layer_norm2 = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """A stack of encoder layers over hidden states [batch, positions, channels]."""

    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig, *, causal: bool):
        self.layers = nnx.List([EncoderLayer(c, causal=causal) for _ in range(c.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last_two(x)[1]

    def last_two(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the hidden states before and after the last layer."""
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return before, x

    def earlier(self, x: jax.Array, skip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the hidden states from `skip` layers before the last one, and the last hidden states.

        Args:
            skip: int32 [batch], from 0 to the number of layers.
        """
        selected = x
        for number, layer in enumerate(self.layers, 1):
            x = layer(x)
            selected = jnp.where((number <= len(self.layers) - skip)[:, None, None], x, selected)
        return selected, x


class Embeddings(nnx.Module):
    """The sum of token and position embeddings."""

    def __init__(self, c: CLIPTextConfig):
        self.token_embedding = Embed(c.vocab_size, c.hidden_size)
        self.position_embedding = Embed(c.max_position_embeddings, c.hidden_size)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[-1]))[None]


class CLIPTextModel(nnx.Module):
    """CLIP's text encoder.

    `__call__(ids, skip=None)`: int32 [batch, tokens] -> the last hidden state after the final LayerNorm,
    [batch, tokens, hidden_size]. With `skip`, int32 [batch], the hidden state `skip` layers before the last one is
    returned instead, with the same norm applied. Attention is causal and does not mask padding, as in Stable Diffusion.
    """

    def __init__(self, config: CLIPTextConfig):
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    @staticmethod
    def rename(name: str) -> str | None:
        """Maps a tensor name in a file to a parameter name, or to None if this network does not need the tensor.

        Published files prefix all names with `text_model.`; files written by transformers 5 do not.
        """
        return None if _UNUSED.match(name) else name.removeprefix("text_model.")

    @staticmethod
    def published(name: str) -> str:
        """Returns the name that a parameter has in published files."""
        return f"text_model.{name}"

    def __call__(self, ids: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        x = self.embeddings(ids)
        return self.final_layer_norm(self.encoder(x) if skip is None else self.encoder.earlier(x, skip)[0])

    def penultimate(self, ids: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Returns the hidden states before the last layer, [batch, tokens, hidden_size], as Stable Diffusion XL
        requires.

        The final LayerNorm is not applied. With `skip`, int32 [batch], the hidden states `skip` layers earlier are
        returned.
        """
        return self.two_states(ids, skip)[0]

    def two_states(self, ids: jax.Array, skip: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns the result of `penultimate` and the hidden states after the last layer, both without the final
        LayerNorm."""
        x = self.embeddings(ids)
        return self.encoder.last_two(x) if skip is None else self.encoder.earlier(x, skip + 1)


class CLIPTextModelWithProjection(nnx.Module):
    """CLIP's text encoder with a projection into the joint embedding space of texts and pictures.

    `__call__(ids)`: int32 [batch, tokens] -> unnormalised text embeddings [batch, projection_dim]: the projected hidden
    states at the first end tokens. The end token is `eos_token_id`. If `eos_token_id` is 2, as in published configs,
    the end token is instead the token with the largest id, as in CLIP's own vocabulary. Padding comes after the end
    token and has no effect.
    """

    def __init__(self, config: CLIPTextConfig):
        self.config = config
        self.text_model = CLIPTextModel(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """Maps a tensor name in a file to a parameter name, or to None for the tensors of CLIP's vision tower."""
        return None if _OF_PICTURES.match(name) else name

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self._pooled(ids, self.text_model(ids))

    def states(self, ids: jax.Array, skip: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns the result of `CLIPTextModel.penultimate` [batch, tokens, hidden_size] and the result of `__call__`.

        `skip` affects only the first.
        """
        before, last = self.text_model.two_states(ids, skip)
        return before, self._pooled(ids, self.text_model.final_layer_norm(last))

    def _pooled(self, ids: jax.Array, last: jax.Array) -> jax.Array:
        number = self.config.eos_token_id
        end = ids.argmax(-1) if number == 2 else (ids == number).argmax(-1)
        return self.text_projection(jnp.take_along_axis(last, end[:, None, None], 1)[:, 0])


class VisionEmbeddings(nnx.Module):
    """The embeddings of a class token and of a picture's patches, plus their position embeddings."""

    def __init__(self, c: CLIPVisionConfig):
        self.class_embedding = parameter(c.hidden_size)
        self.patch_embedding = Conv(3, c.hidden_size, c.patch_size, stride=c.patch_size, padding=0, bias=False)
        self.position_embedding = Embed((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (len(patches), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], 1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class CLIPVisionModel(nnx.Module):
    """CLIP's vision tower.

    `__call__(pixels)`: normalised [pictures, image_size, image_size, 3] -> the pooled output [pictures, hidden_size],
    which is the last hidden state of the class token after the final LayerNorm.
    """

    def __init__(self, config: CLIPVisionConfig):
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # misspelt in all checkpoints
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        pixels = pixels.astype(self.embeddings.patch_embedding.kernel[...].dtype)
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class CLIPModel(nnx.Module):
    """Both towers of CLIP, in the layout of transformers' `CLIPModel`.

    `__call__(ids, pixels)`: int32 [n, tokens] and normalised [n, image_size, image_size, 3] -> the cosine similarity of
    each text with its picture, float32 [n].
    """

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig):
        self.text_model, self.vision_model = CLIPTextModel(text), CLIPVisionModel(vision)
        self.text_projection = Linear(text.hidden_size, text.projection_dim, bias=False)
        self.visual_projection = Linear(vision.hidden_size, text.projection_dim, bias=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """Maps a tensor name in a file to a parameter name, or to None for the training temperature, which is not
        needed."""
        return None if name == "logit_scale" else name

    def __call__(self, ids: jax.Array, pixels: jax.Array) -> jax.Array:
        end = ids.argmax(-1)[:, None, None]
        text = self.text_projection(jnp.take_along_axis(self.text_model(ids), end, 1)[:, 0]).astype(jnp.float32)
        picture = self.visual_projection(self.vision_model(pixels)).astype(jnp.float32)
        return (text * picture).sum(-1) / (jnp.linalg.norm(text, axis=-1) * jnp.linalg.norm(picture, axis=-1))
