"""Semantic guidance (SEGA) for text-to-image diffusion in JAX."""

from sega_jax.diffusers_api.deepfloyd import SemanticIFPipeline as SemanticIFPipeline
from sega_jax.diffusers_api.deepfloyd import SemanticIFPipelineOutput as SemanticIFPipelineOutput
from sega_jax.diffusers_api.paella import SemanticPaellaPipeline as SemanticPaellaPipeline
from sega_jax.diffusers_api.paella import SemanticPaellaPipelineOutput as SemanticPaellaPipelineOutput
from sega_jax.diffusers_api.stable_diffusion import SemanticStableDiffusionPipeline as SemanticStableDiffusionPipeline
from sega_jax.diffusers_api.stable_diffusion import (
    SemanticStableDiffusionPipelineOutput as SemanticStableDiffusionPipelineOutput,
)
from sega_jax.diffusers_api.stable_diffusion_xl import (
    SemanticStableDiffusionXLPipeline as SemanticStableDiffusionXLPipeline,
)
from sega_jax.diffusers_api.stable_diffusion_xl import (
    SemanticStableDiffusionXLPipelineOutput as SemanticStableDiffusionXLPipelineOutput,
)
from sega_jax.method.guidance import Edit as Edit
from sega_jax.method.guidance import Edits as Edits
from sega_jax.method.guidance import Predictions as Predictions
from sega_jax.method.guidance import cfg as cfg
from sega_jax.method.guidance import replay as replay
from sega_jax.method.guidance import rescale as rescale
from sega_jax.method.guidance import sega as sega
from sega_jax.pipelines.cascade import Cascade as Cascade
from sega_jax.pipelines.cascade import load_cascade as load_cascade
from sega_jax.pipelines.loading import load as load
from sega_jax.pipelines.paella import PaellaPipeline as PaellaPipeline
from sega_jax.pipelines.pipeline import Output as Output
from sega_jax.pipelines.pipeline import Pipeline as Pipeline
from sega_jax.pipelines.recording import load_guidance as load_guidance
from sega_jax.pipelines.recording import save_guidance as save_guidance
from sega_jax.weights.lora import merge_lora as merge_lora
from sega_jax.weights.pull import CheckpointError as CheckpointError
from sega_jax.weights.textual_inversion import add_words as add_words

__version__ = "0.1.0"
