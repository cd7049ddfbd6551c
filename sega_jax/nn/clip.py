"""CLIP's text tower (OpenAI's and OpenCLIP's, in the layout of transformers' `CLIPTextModel`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.nn.config import build
from sega_jax.nn.layers import ACTIVATIONS, Embed, LayerNorm, Linear, attend


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

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Reads a config.json.

        Raises:
            ValueError: the config describes a network that this module does not compute.
        """
        self = build(cls, config, "text encoder", choices={"hidden_act": tuple(ACTIVATIONS)}, strict=False)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text encoder config: hidden_size {self.hidden_size} is not a multiple of"
                f" num_attention_heads {self.num_attention_heads}"
            )
        return self


class SelfAttention(nnx.Module):
    def __init__(self, channels: int, heads: int):
        self.heads = heads
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, channels)
        self.out_proj = Linear(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), heads=self.heads, causal=True))


class MLP(nnx.Module):
    def __init__(self, channels: int, hidden: int, activation: str):
        self.activation = activation
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, c: CLIPTextConfig):
        self.layer_norm1 = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = SelfAttention(c.hidden_size, c.num_attention_heads)
        self.layer_norm2 = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, c: CLIPTextConfig):
        self.layers = nnx.List([EncoderLayer(c) for _ in range(c.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Embeddings(nnx.Module):
    def __init__(self, c: CLIPTextConfig):
        self.token_embedding = Embed(c.vocab_size, c.hidden_size)
        self.position_embedding = Embed(c.max_position_embeddings, c.hidden_size)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[-1]))[None]


class CLIPTextModel(nnx.Module):
    """`__call__(ids)`: int32 [batch, tokens] -> the last hidden state after the final LayerNorm
    [batch, tokens, hidden_size]. The mask is causal; padding is attended, as in Stable Diffusion."""

    def __init__(self, config: CLIPTextConfig):
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    @staticmethod
    def rename(name: str) -> str:
        """Published files put every key under `text_model.`; transformers 5 writes none."""
        return name.removeprefix("text_model.")

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))
