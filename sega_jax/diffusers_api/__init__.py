"""Pipelines with diffusers' names: they translate its arguments, defaults and results, and have no sampling loop.

Code that is written for diffusers changes the line of its imports alone:

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
    """Imports a pipeline or scheduler at the first use of its name.

    Raises:
        ImportError: diffusers may have a class of this name, but there is none here.
    """
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name.endswith("Scheduler"):
        schedulers = importlib.import_module(f"{__name__}.schedulers").SCHEDULERS
        if name in schedulers:
            return schedulers[name]
        raise ImportError(f"{name} is not supported; there are {', '.join(schedulers)}")
    if name.endswith("Pipeline"):
        raise ImportError(f"{name} has no counterpart here; there are {', '.join(_NAMES)}, and sega_jax.load")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    schedulers = importlib.import_module(f"{__name__}.schedulers").SCHEDULERS
    return sorted({*globals(), *_NAMES, *schedulers})
