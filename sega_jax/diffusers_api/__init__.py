"""Pipelines with the same names, arguments, defaults and results as in diffusers. The native pipelines do the sampling.

To run most code that was written for diffusers, change only its imports:

    from sega_jax.diffusers_api import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
"""

import importlib
from typing import Any

_MODULES = {
    "auto": ("DiffusionPipeline", "AutoPipelineForText2Image", "AutoPipelineForImage2Image"),
    "deepfloyd": ("SemanticIFPipeline",),
    "networks": ("AutoModel", "AutoencoderKL", "UNet2DConditionModel"),
    "paella": ("SemanticPaellaPipeline",),
    "plain": (
        *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline"),
        *("StableDiffusionXLImg2ImgPipeline", "IFPipeline", "IFSuperResolutionPipeline"),
    ),
    "upscaler": ("StableDiffusionUpscalePipeline",),
    "stable_diffusion": ("SemanticStableDiffusionPipeline",),
    "stable_diffusion_xl": ("SemanticStableDiffusionXLPipeline",),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a pipeline or scheduler when its name is first used.

    Raises:
        ImportError: the name ends in "Pipeline" or "Scheduler", but `sega_jax` has no such class.
        AttributeError: this package has no such name.
    """
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name.endswith("Scheduler"):
        schedulers = importlib.import_module(f"{__name__}.schedulers").SCHEDULERS
        if name in schedulers:
            return schedulers[name]
        raise ImportError(f"{name} is not supported; choose one of {', '.join(schedulers)}")
    if name.endswith("Pipeline"):
        raise ImportError(
            f"{name} has no counterpart in sega_jax; use one of {', '.join(_NAMES)}, or load the checkpoint with"
            " sega_jax.load"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    schedulers = importlib.import_module(f"{__name__}.schedulers").SCHEDULERS
    return sorted({*globals(), *_NAMES, *schedulers})
