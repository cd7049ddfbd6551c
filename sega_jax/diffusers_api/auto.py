"""diffusers' pipeline factories, which choose the pipeline class that fits a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sega_jax.diffusers_api import plain
from sega_jax.diffusers_api.base import DiffusersPipeline, source_options
from sega_jax.diffusers_api.options import hub_choices
from sega_jax.diffusers_api.paella import SemanticPaellaPipeline
from sega_jax.diffusers_api.upscaler import StableDiffusionUpscalePipeline
from sega_jax.pipelines import sources
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.systems import deepfloyd, paella, sdxl, stable_diffusion, upscaler
from sega_jax.systems.base import System
from sega_jax.text.files import CheckpointError
from sega_jax.weights import hub

_TEXT_TO_IMAGE = {
    stable_diffusion.SYSTEM.name: plain.StableDiffusionPipeline,
    sdxl.SYSTEM.name: plain.StableDiffusionXLPipeline,
    deepfloyd.STAGE_1.name: plain.IFPipeline,
    deepfloyd.STAGE_2.name: plain.IFSuperResolutionPipeline,
    upscaler.SYSTEM.name: StableDiffusionUpscalePipeline,
    paella.SYSTEM.name: SemanticPaellaPipeline,
}
_IMAGE_TO_IMAGE = {
    stable_diffusion.SYSTEM.name: plain.StableDiffusionImg2ImgPipeline,
    sdxl.SYSTEM.name: plain.StableDiffusionXLImg2ImgPipeline,
}


class DiffusionPipeline:
    """Creates the text-to-image pipeline for a checkpoint's family."""

    _classes: ClassVar[Mapping[str, type[DiffusersPipeline]]] = _TEXT_TO_IMAGE

    def __init__(self) -> None:
        raise TypeError(
            f"{type(self).__name__} cannot be called; create a pipeline with from_pretrained, from_single_file or"
            " from_pipe"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Loads a checkpoint.

        The arguments are the same as for `from_pretrained` of the family's pipeline class.

        Raises:
            CheckpointError: the family has no such pipeline. Raised before any weights are downloaded.
            Others: as for `sega_jax.load`.
        """
        with hub.using(**hub_choices(options)):
            specified = source_options(pretrained_model_name_or_path, options)
            names = ("revision", "config", "prediction_type")
            checked = {name: specified[name] for name in names if name in specified}
            given = {**specified, **(specified.get("networks") or {})}
            source = sources.find(pretrained_model_name_or_path, **checked, given=given)
        return cls._class_for(source.system).from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **options: Any) -> Any:
        """Loads a single-file checkpoint; see `from_pretrained`."""
        return cls.from_pretrained(pretrained_model_link_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """Creates a pipeline that shares the weights of another pipeline.

        Args:
            pipeline: a native pipeline, or a pipeline from this package.
            options: as for `from_pipe` of the family's pipeline class.

        Raises:
            TypeError, CheckpointError: the argument is not a pipeline, or no such pipeline exists for its family.
        """
        native = pipeline.pipeline if isinstance(pipeline, DiffusersPipeline) else pipeline
        if not isinstance(native, Pipeline):
            raise TypeError(f"pipeline={native!r} should be a pipeline from sega_jax.load or sega_jax.diffusers_api")
        return cls._class_for(native.system).from_pipe(pipeline, **options)

    @classmethod
    def _class_for(cls, system: System) -> type[DiffusersPipeline]:
        if system.name not in cls._classes:
            raise CheckpointError(
                f"{cls.__name__} has no pipeline for {system.title}; load the checkpoint with sega_jax.load"
            )
        return cls._classes[system.name]


class AutoPipelineForText2Image(DiffusionPipeline):
    """Creates the text-to-image pipeline for a checkpoint's family."""


class AutoPipelineForImage2Image(DiffusionPipeline):
    """Creates the image-to-image pipeline for a checkpoint's family."""

    _classes = _IMAGE_TO_IMAGE
