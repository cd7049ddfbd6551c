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
    """The fields of `safety_checker/config.json` that define the network, with transformers' defaults."""

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SafetyCheckerConfig":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        # Old files have both names. In this case, transformers reads only `vision_config_dict`.
        names = [name for name in ("vision_config_dict", "vision_config") if config.get(name) is not None]
        vision = config[names[0]] if names else {}
        if not isinstance(vision, Mapping):
            raise ValueError(f"safety checker config: {names[0]}={vision!r} should be a JSON object")
        values = {"vision_config": CLIPVisionConfig.from_dict(vision), "projection_dim": config.get("projection_dim")}
        return build(cls, values, "safety checker")


class StableDiffusionSafetyChecker(nnx.Module):
    """Stable Diffusion's safety checker.

    `__call__(pixels)`: normalised [pictures, image_size, image_size, 3] -> bool [pictures], True for pictures that are
    too similar to one of 17 concepts.
    """

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
        """Maps a tensor name in a file to a parameter name. Published files repeat the prefix `vision_model.`; files
        written by transformers 5 do not."""
        return name.replace("vision_model.vision_model.", "vision_model.", 1)

    @staticmethod
    def published(name: str) -> str:
        """Returns the name that a parameter has in published files."""
        return f"vision_model.{name}" if name.startswith("vision_model.") else name

    def __call__(self, pixels: jax.Array) -> jax.Array:
        special, concepts = self.cosines(pixels)
        return too_near(special, concepts, self.special_care_embeds_weights[...], self.concept_embeds_weights[...])

    def cosines(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the cosine similarities with the special-care concepts [pictures, 3] and the others [pictures, 17].

        They are computed in at least float32, whatever the network's dtype. In half precision, diffusers' rounding
        error is as large as the last decimal that it compares.
        """
        picture = _unit(self.visual_projection(self.vision_model(pixels)))
        special, concepts = (
            # By default, accelerators round the inputs of a matrix product.
            jnp.matmul(picture, _unit(embeds[...]).T, precision=lax.Precision.HIGHEST)
            for embeds in (self.special_care_embeds, self.concept_embeds)
        )
        return special, concepts


def too_near(
    special: jax.Array, concepts: jax.Array, special_thresholds: jax.Array, thresholds: jax.Array
) -> jax.Array:
    """Returns which pictures are too similar to a concept.

    A score is the cosine similarity minus the threshold, in float32 and rounded to three decimals, as in diffusers. A
    picture is too similar to a concept if its score is positive. If the score of a special-care concept is positive,
    the scores of all other concepts increase by 0.01.

    Args:
        special, concepts: Cosine similarities [pictures, n].
        special_thresholds, thresholds: [n].

    Returns:
        bool [pictures].
    """
    special, concepts = (
        cosines.astype(jnp.float32) - limits.astype(jnp.float32)[None]
        for cosines, limits in ((special, special_thresholds), (concepts, thresholds))
    )
    care = (jnp.round(special, 3) > 0).any(1, keepdims=True)
    return (jnp.round(concepts + jnp.where(care, jnp.float32(_ADJUSTMENT), 0), 3) > 0).any(1)


def _unit(x: jax.Array) -> jax.Array:
    """Scales vectors [n, channels] to length 1."""
    x = x.astype(at_least_float32(x.dtype))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
