"""Semantic guidance (SEGA) for text-to-image diffusion in JAX.

`load` returns a `Pipeline`, which makes pictures from a prompt and guides them with edits. `Edit` describes a concept.

Example:
    >>> import sega_jax
    >>> pipe = sega_jax.load()  # the demo model, which makes cartoon portraits
    >>> out = pipe("a portrait of a woman", sega_jax.Edit("glasses", warmup=2), steps=5, seed=1)
    >>> out.images[0].size
    (128, 128)
"""

import importlib
from typing import TYPE_CHECKING, Any

from sega_jax.method.argument_kinds import Choice as Choice
from sega_jax.method.argument_kinds import Flag as Flag
from sega_jax.method.argument_kinds import Integer as Integer
from sega_jax.method.argument_kinds import Kind as Kind
from sega_jax.method.argument_kinds import Pair as Pair
from sega_jax.method.argument_kinds import Real as Real
from sega_jax.method.argument_kinds import Words as Words
from sega_jax.method.arguments import Argument as Argument
from sega_jax.method.arguments import argument as argument
from sega_jax.method.arguments import changed as changed
from sega_jax.method.guidance import Edit as Edit
from sega_jax.method.guidance import Edits as Edits
from sega_jax.method.guidance import Predictions as Predictions
from sega_jax.method.guidance import cfg as cfg
from sega_jax.method.guidance import replay as replay
from sega_jax.method.guidance import rescale as rescale
from sega_jax.method.guidance import sega as sega
from sega_jax.pipelines.adapters import add_words as add_words
from sega_jax.pipelines.adapters import merge_lora as merge_lora
from sega_jax.pipelines.cascade import Cascade as Cascade
from sega_jax.pipelines.cascade import load_cascade as load_cascade
from sega_jax.pipelines.loading import load as load
from sega_jax.pipelines.pipeline import Output as Output
from sega_jax.pipelines.pipeline import Pipeline as Pipeline
from sega_jax.pipelines.png import sheet as sheet
from sega_jax.pipelines.recommended import Recommended as Recommended
from sega_jax.pipelines.recording import load_guidance as load_guidance
from sega_jax.pipelines.recording import save_guidance as save_guidance
from sega_jax.systems.base import Checkpoint as Checkpoint
from sega_jax.systems.base import Given as Given
from sega_jax.systems.base import Network as Network
from sega_jax.systems.base import Record as Record
from sega_jax.systems.base import Sampler as Sampler
from sega_jax.systems.base import Saved as Saved
from sega_jax.systems.base import Settings as Settings
from sega_jax.systems.base import Setup as Setup
from sega_jax.systems.base import Sizes as Sizes
from sega_jax.systems.base import Static as Static
from sega_jax.systems.base import System as System
from sega_jax.systems.base import TextReader as TextReader
from sega_jax.systems.call import Call as Call
from sega_jax.systems.clip_text import ClipText as ClipText
from sega_jax.systems.conditioning import Text as Text
from sega_jax.systems.conditioning import conditioning as conditioning
from sega_jax.systems.deepfloyd import T5Text as T5Text
from sega_jax.systems.paella_text import PaellaText as PaellaText
from sega_jax.systems.registry import register as register
from sega_jax.systems.sdxl import SDXLText as SDXLText
from sega_jax.text.files import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from sega_jax.diffusers_api.deepfloyd import SemanticIFPipeline as SemanticIFPipeline
    from sega_jax.diffusers_api.deepfloyd import SemanticIFPipelineOutput as SemanticIFPipelineOutput
    from sega_jax.diffusers_api.paella import SemanticPaellaPipeline as SemanticPaellaPipeline
    from sega_jax.diffusers_api.paella import SemanticPaellaPipelineOutput as SemanticPaellaPipelineOutput
    from sega_jax.diffusers_api.stable_diffusion import (
        SemanticStableDiffusionPipeline as SemanticStableDiffusionPipeline,
    )
    from sega_jax.diffusers_api.stable_diffusion import (
        SemanticStableDiffusionPipelineOutput as SemanticStableDiffusionPipelineOutput,
    )
    from sega_jax.diffusers_api.stable_diffusion_xl import (
        SemanticStableDiffusionXLPipeline as SemanticStableDiffusionXLPipeline,
    )
    from sega_jax.diffusers_api.stable_diffusion_xl import (
        SemanticStableDiffusionXLPipelineOutput as SemanticStableDiffusionXLPipelineOutput,
    )

# Paella once had its own class. One `Pipeline` class now serves all families.
PaellaPipeline = Pipeline

__version__ = "0.2.0"

# The modules that define these names are imported on first use, because most programs do not need them.
_DIFFUSERS_API = {
    "SemanticIFPipeline": "deepfloyd",
    "SemanticIFPipelineOutput": "deepfloyd",
    "SemanticPaellaPipeline": "paella",
    "SemanticPaellaPipelineOutput": "paella",
    "SemanticStableDiffusionPipeline": "stable_diffusion",
    "SemanticStableDiffusionPipelineOutput": "stable_diffusion",
    "SemanticStableDiffusionXLPipeline": "stable_diffusion_xl",
    "SemanticStableDiffusionXLPipelineOutput": "stable_diffusion_xl",
}


def __getattr__(name: str) -> Any:
    if name not in _DIFFUSERS_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.diffusers_api.{_DIFFUSERS_API[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DIFFUSERS_API})
