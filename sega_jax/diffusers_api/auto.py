"""diffusers' pipelines that choose the class by the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sega_jax.diffusers_api import plain
from sega_jax.diffusers_api.base import Face, of_source
from sega_jax.diffusers_api.options import hub_choices
from sega_jax.diffusers_api.paella import SemanticPaellaPipeline
from sega_jax.diffusers_api.upscaler import StableDiffusionUpscalePipeline
from sega_jax.pipelines import sources
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.systems import deepfloyd, paella, sdxl, stable_diffusion, upscaler
from sega_jax.systems.base import System
from sega_jax.text.files import CheckpointError
from sega_jax.weights import hub

_FROM_WORDS = {
    stable_diffusion.SYSTEM.name: plain.StableDiffusionPipeline,
    sdxl.SYSTEM.name: plain.StableDiffusionXLPipeline,
    deepfloyd.STAGE_1.name: plain.IFPipeline,
    deepfloyd.STAGE_2.name: plain.IFSuperResolutionPipeline,
    upscaler.SYSTEM.name: StableDiffusionUpscalePipeline,
    paella.SYSTEM.name: SemanticPaellaPipeline,
}
_FROM_PICTURES = {
    stable_diffusion.SYSTEM.name: plain.StableDiffusionImg2ImgPipeline,
    sdxl.SYSTEM.name: plain.StableDiffusionXLImg2ImgPipeline,
}


class DiffusionPipeline:
    """Makes the pipeline of a checkpoint's family."""

    _kinds: ClassVar[Mapping[str, type[Face]]] = _FROM_WORDS

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is made by from_pretrained, from_single_file or from_pipe")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Loads a checkpoint; see `from_pretrained` of its family's pipeline.

        Raises:
            CheckpointError: the family has no such pipeline; nothing but the checkpoint's index was fetched.
            Others as `sega_jax.load`.
        """
        with hub.using(**hub_choices(options)):
            known = of_source(pretrained_model_name_or_path, options)
            names = ("revision", "config", "prediction_type")
            checked = {name: known[name] for name in names if name in known}
            given = {**known, **(known.get("networks") or {})}
            found = sources.find(pretrained_model_name_or_path, **checked, given=given)
        return cls._kind(found.system).from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **options: Any) -> Any:
        """Loads a single file; see `from_pretrained`."""
        return cls.from_pretrained(pretrained_model_link_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """Wraps another pipeline, with which it shares the weights.

        Raises:
            TypeError, CheckpointError: it is none, or its family has no such pipeline.
        """
        native = pipeline.pipeline if isinstance(pipeline, Face) else pipeline
        if not isinstance(native, Pipeline):
            raise TypeError(f"pipeline={native!r} should be what sega_jax.load gives")
        return cls._kind(native.system).from_pipe(pipeline, **options)

    @classmethod
    def _kind(cls, system: System) -> type[Face]:
        if system.name not in cls._kinds:
            raise CheckpointError(f"{cls.__name__} has no pipeline for {system.title}; sega_jax.load takes it")
        return cls._kinds[system.name]


class AutoPipelineForText2Image(DiffusionPipeline):
    """Makes the pipeline of a checkpoint's family that starts from words."""


class AutoPipelineForImage2Image(DiffusionPipeline):
    """Makes the pipeline of a checkpoint's family that starts from a picture."""

    _kinds = _FROM_PICTURES
