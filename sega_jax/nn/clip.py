"""CLIP's towers (OpenAI's and OpenCLIP's), in the layout of transformers' `CLIPTextModel` and `CLIPVisionModel`."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.config import build
from sega_jax.nn.layers import ACTIVATIONS, Conv, Embed, LayerNorm, Linear, attend, parameter

_TEXT_MODELS = (None, "clip_text_model", "clip")
_CHOICES = {"hidden_act": tuple(ACTIVATIONS)}
# Tensors of a whole CLIP that the text encoders do without.
_OF_PICTURES = re.compile(r"vision_model\.|visual_projection\.|logit_(scale|bias)$")
_OTHERS = re.compile(rf"{_OF_PICTURES.pattern}|text_projection(\.weight)?$")


class CLIPTextConfig(NamedTuple):
    """The fields of `text_encoder/config.json` that shape the network, with transformers' defaults."""

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
        """Reads a config.json, of a text encoder or of a whole CLIP, whose text encoder is `text_config` there.

        Raises:
            ValueError: the config describes a network that this module does not compute.
        """
        if isinstance(text := config.get("text_config"), Mapping):
            config = {**text, "projection_dim": config.get("projection_dim", 512)}
        kind = config.get("model_type")
        if kind not in _TEXT_MODELS:
            raise ValueError(
                f"text encoder config: model_type={kind!r} is not supported, only CLIP's text encoders (OpenAI's and"
                " OpenCLIP's), clip_text_model"
            )
        self = build(cls, config, "text encoder", choices=_CHOICES, strict=False)
        _check_heads(self, "text encoder")
        return self


class CLIPVisionConfig(NamedTuple):
    """The fields of a vision tower's config that shape the network, with transformers' defaults."""

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
        """Reads a config of transformers'.

        Raises:
            ValueError: the config describes a network that this module does not compute.
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
    def __init__(self, channels: int, hidden: int, activation: str):
        self.activation = activation
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig, *, causal: bool):
        self.layer_norm1 = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = SelfAttention(c.hidden_size, c.num_attention_heads, causal=causal)
        self.layer_norm2 = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig, *, causal: bool):
        self.layers = nnx.List([EncoderLayer(c, causal=causal) for _ in range(c.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last_two(x)[1]

    def last_two(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The states before and after the last layer."""
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return before, x

    def earlier(self, x: jax.Array, skip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The states `skip` layers before the last, int32 [batch], from 0 to the number of layers, and the last."""
        kept = x
        for number, layer in enumerate(self.layers, 1):
            x = layer(x)
            kept = jnp.where((number <= len(self.layers) - skip)[:, None, None], x, kept)
        return kept, x


class Embeddings(nnx.Module):
    def __init__(self, c: CLIPTextConfig):
        self.token_embedding = Embed(c.vocab_size, c.hidden_size)
        self.position_embedding = Embed(c.max_position_embeddings, c.hidden_size)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[-1]))[None]


class CLIPTextModel(nnx.Module):
    """`__call__(ids)`: int32 [batch, tokens] -> the last hidden state after the final LayerNorm
    [batch, tokens, hidden_size]. The mask is causal; padding is attended, as in Stable Diffusion. `skip`, int32
    [batch], takes the hidden state of so many layers earlier in place of the last."""

    def __init__(self, config: CLIPTextConfig):
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    @staticmethod
    def rename(name: str) -> str | None:
        """Removes `text_model.`, under which published files put every key and transformers 5 none. Files of a whole
        CLIP also have tensors that this network does without."""
        return None if _OTHERS.match(name) else name.removeprefix("text_model.")

    @staticmethod
    def published(name: str) -> str:
        """The name in published files."""
        return f"text_model.{name}"

    def __call__(self, ids: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        x = self.embeddings(ids)
        return self.final_layer_norm(self.encoder(x) if skip is None else self.encoder.earlier(x, skip)[0])

    def penultimate(self, ids: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """The states before the last layer, without the final LayerNorm [batch, tokens, hidden_size]: what Stable
        Diffusion XL reads. `skip`, int32 [batch], takes the states of so many layers earlier."""
        return self.two_states(ids, skip)[0]

    def two_states(self, ids: jax.Array, skip: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What `penultimate` gives, and the states after the last layer, without the final LayerNorm."""
        x = self.embeddings(ids)
        return self.encoder.last_two(x) if skip is None else self.encoder.earlier(x, skip + 1)


class CLIPTextModelWithProjection(nnx.Module):
    """`__call__(ids)`: int32 [batch, tokens] -> the texts' embeddings beside those of pictures, not normalised
    [batch, projection_dim]: the state at the first end token, projected. That is `eos_token_id`, or where the config
    says 2, as published ones do, the token of the largest id, which is the end in CLIP's own vocabulary. What pads a
    text comes after it and is not seen."""

    def __init__(self, config: CLIPTextConfig):
        self.config = config
        self.text_model = CLIPTextModel(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """Files of a whole CLIP also have the tensors of pictures."""
        return None if _OF_PICTURES.match(name) else name

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self._pooled(ids, self.text_model(ids))

    def states(self, ids: jax.Array, skip: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The states before the last layer, without the final LayerNorm [batch, tokens, hidden_size], and what
        `__call__` gives, which `skip` leaves as it is; see `CLIPTextModel.penultimate`."""
        before, last = self.text_model.two_states(ids, skip)
        return before, self._pooled(ids, self.text_model.final_layer_norm(last))

    def _pooled(self, ids: jax.Array, last: jax.Array) -> jax.Array:
        number = self.config.eos_token_id
        end = ids.argmax(-1) if number == 2 else (ids == number).argmax(-1)
        return self.text_projection(jnp.take_along_axis(last, end[:, None, None], 1)[:, 0])


class VisionEmbeddings(nnx.Module):
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
    """`__call__(pixels)`: normalised [pictures, image_size, image_size, 3] -> the pooled output, the class
    token's last hidden state after the final LayerNorm [pictures, hidden_size]."""

    def __init__(self, config: CLIPVisionConfig):
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # so spelt in every checkpoint
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        pixels = pixels.astype(self.embeddings.patch_embedding.kernel[...].dtype)
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class CLIPModel(nnx.Module):
    """Both towers, in the layout of transformers' `CLIPModel`. `__call__(ids, pixels)`: int32 [n, tokens] and
    normalised [n, image_size, image_size, 3] -> the cosines of each text with its picture, [n] in float32."""

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig):
        self.text_model, self.vision_model = CLIPTextModel(text), CLIPVisionModel(vision)
        self.text_projection = Linear(text.hidden_size, text.projection_dim, bias=False)
        self.visual_projection = Linear(vision.hidden_size, text.projection_dim, bias=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """The temperature of the training is no part of a cosine."""
        return None if name == "logit_scale" else name

    def __call__(self, ids: jax.Array, pixels: jax.Array) -> jax.Array:
        end = ids.argmax(-1)[:, None, None]
        words = self.text_projection(jnp.take_along_axis(self.text_model(ids), end, 1)[:, 0]).astype(jnp.float32)
        seen = self.visual_projection(self.vision_model(pixels)).astype(jnp.float32)
        return (words * seen).sum(-1) / (jnp.linalg.norm(words, axis=-1) * jnp.linalg.norm(seen, axis=-1))
