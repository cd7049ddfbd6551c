"""Stable Diffusion's safety checker (diffusers' `StableDiffusionSafetyChecker`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.clip import CLIPVisionConfig, CLIPVisionModel
from sega_jax.nn.config import build
from sega_jax.nn.layers import Linear, parameter

_CONCEPTS, _SPECIAL = 17, 3
_ADJUSTMENT = 0.01


class SafetyCheckerConfig(NamedTuple):
    """The fields of `safety_checker/config.json` that shape the network, with transformers' defaults."""

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SafetyCheckerConfig":
        """Reads a config.json.

        Raises:
            ValueError: the config describes a network that this module does not compute.
        """
        # Old files have both, and transformers takes every field from the second, or its default.
        names = [name for name in ("vision_config_dict", "vision_config") if config.get(name) is not None]
        vision = config[names[0]] if names else {}
        if not isinstance(vision, Mapping):
            raise ValueError(f"safety checker config: {names[0]}={vision!r} should be an object of settings")
        values = {"vision_config": CLIPVisionConfig.from_dict(vision), "projection_dim": config.get("projection_dim")}
        return build(cls, values, "safety checker")


class StableDiffusionSafetyChecker(nnx.Module):
    """`__call__(pixels)`: normalised [pictures, image_size, image_size, 3] -> bool [pictures], whether a picture
    is too near one of 17 concepts."""

    def __init__(self, config: SafetyCheckerConfig):
        self.config = config
        channels = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = Linear(config.vision_config.hidden_size, channels, bias=False)
        self.concept_embeds = parameter(_CONCEPTS, channels)
        self.concept_embeds_weights = parameter(_CONCEPTS)
        self.special_care_embeds = parameter(_SPECIAL, channels)
        self.special_care_embeds_weights = parameter(_SPECIAL)

    @staticmethod
    def rename(name: str) -> str:
        """Published files say `vision_model.` twice; transformers 5 writes it once."""
        return name.replace("vision_model.vision_model.", "vision_model.", 1)

    @staticmethod
    def published(name: str) -> str:
        """The name in published files."""
        return f"vision_model.{name}" if name.startswith("vision_model.") else name

    def __call__(self, pixels: jax.Array) -> jax.Array:
        special, concepts = self.cosines(pixels)
        return too_near(special, concepts, self.special_care_embeds_weights[...], self.concept_embeds_weights[...])

    def cosines(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each picture with the concepts of special care [pictures, 3], and with all others [pictures, 17].

        In at least float32 whatever the network's dtype. diffusers rounds them to half precision, whose steps
        are as wide as the last digit that counts.
        """
        picture = _unit(self.visual_projection(self.vision_model(pixels)))
        special, concepts = (
            # Accelerators would round the factors by default.
            jnp.matmul(picture, _unit(embeds[...]).T, precision=lax.Precision.HIGHEST)
            for embeds in (self.special_care_embeds, self.concept_embeds)
        )
        return special, concepts


def too_near(
    special: jax.Array, concepts: jax.Array, special_thresholds: jax.Array, thresholds: jax.Array
) -> jax.Array:
    """bool [pictures] from cosines [pictures, n] and their thresholds [n].

    A score is the cosine less the threshold, in float32 and rounded to three digits as in diffusers; one above
    zero is too near. A picture too near a concept of special care gets 0.01 more for the others.
    """
    special, concepts = (
        cosines.astype(jnp.float32) - least.astype(jnp.float32)[None]
        for cosines, least in ((special, special_thresholds), (concepts, thresholds))
    )
    care = (jnp.round(special, 3) > 0).any(1, keepdims=True)
    return (jnp.round(concepts + jnp.where(care, jnp.float32(_ADJUSTMENT), 0), 3) > 0).any(1)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors [n, channels] of length one."""
    x = x.astype(at_least_float32(x.dtype))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
