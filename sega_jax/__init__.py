"""Semantic guidance (SEGA) for text-to-image diffusion in JAX."""

from sega_jax.cascade import Cascade as Cascade
from sega_jax.cascade import load_cascade as load_cascade
from sega_jax.checkpoint import CheckpointError as CheckpointError
from sega_jax.faces.deepfloyd import SemanticIFPipeline as SemanticIFPipeline
from sega_jax.faces.deepfloyd import SemanticIFPipelineOutput as SemanticIFPipelineOutput
from sega_jax.faces.paella import SemanticPaellaPipeline as SemanticPaellaPipeline
from sega_jax.faces.paella import SemanticPaellaPipelineOutput as SemanticPaellaPipelineOutput
from sega_jax.faces.stable_diffusion import SemanticStableDiffusionPipeline as SemanticStableDiffusionPipeline
from sega_jax.faces.stable_diffusion import (
    SemanticStableDiffusionPipelineOutput as SemanticStableDiffusionPipelineOutput,
)
from sega_jax.faces.stable_diffusion_xl import SemanticStableDiffusionXLPipeline as SemanticStableDiffusionXLPipeline
from sega_jax.faces.stable_diffusion_xl import (
    SemanticStableDiffusionXLPipelineOutput as SemanticStableDiffusionXLPipelineOutput,
)
from sega_jax.guidance import Edit as Edit
from sega_jax.guidance import Edits as Edits
from sega_jax.guidance import Predictions as Predictions
from sega_jax.guidance import cfg as cfg
from sega_jax.guidance import replay as replay
from sega_jax.guidance import rescale as rescale
from sega_jax.guidance import sega as sega
from sega_jax.inversion import add_words as add_words
from sega_jax.loading import load as load
from sega_jax.lora import merge_lora as merge_lora
from sega_jax.paella import PaellaPipeline as PaellaPipeline
from sega_jax.pipeline import Output as Output
from sega_jax.pipeline import Pipeline as Pipeline
from sega_jax.vectors import load_guidance as load_guidance
from sega_jax.vectors import save_guidance as save_guidance

__version__ = "0.1.0"
