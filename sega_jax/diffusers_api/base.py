"""What all faces have: a pipeline of ours behind them, and its parts by diffusers' names."""

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sega_jax.diffusers_api import arguments
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines import sources
from sega_jax.pipelines.components import as_module
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.pipelines.running import Running, one_of
from sega_jax.systems import registry
from sega_jax.weights.pull import CheckpointError

F = TypeVar("F", bound="AnyFace")
_OUTPUTS = {"pil": "pil", "np": "float", "latent": "latent"}


class AnyFace:
    """A face of a pipeline of ours (`pipeline`)."""

    pipeline: Running
    _kinds: ClassVar[tuple[registry.Kind, ...]]

    @classmethod
    def from_pipe(cls: type[F], pipeline: Any) -> F:
        """Another face of a pipeline of ours, or of the pipeline behind another face."""
        pipeline = getattr(pipeline, "pipeline", pipeline)
        if not isinstance(pipeline, Running):
            raise TypeError(f"pipeline={pipeline!r} should be what sega_jax.load gives")
        if (kind := registry.of(pipeline.models)) not in cls._kinds:
            raise TypeError(f"pipeline is of {kind.name}, expected {cls._expected()}")
        self = cls.__new__(cls)
        self.pipeline = pipeline
        return self

    @classmethod
    def _check(cls, source: str | Path, revision: str | None = None) -> None:
        """Before anything but the index is fetched.

        Raises:
            CheckpointError: the checkpoint is of another kind; others as `sega_jax.load`.
        """
        if (kind := sources.find(source, revision).kind) not in cls._kinds:
            raise CheckpointError(f"{source} is {kind.name}, expected {cls._expected()}; sega_jax.load takes either")

    @classmethod
    def _expected(cls) -> str:
        return f"{' or '.join(kind.name for kind in cls._kinds)} for {cls.__name__}"


class Face(AnyFace):
    """A face of a `sega_jax.Pipeline`."""

    pipeline: Pipeline

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipeline.models.unet

    @unet.setter
    def unet(self, value: UNet2DConditionModel) -> None:
        self._exchange("unet", value)

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.models.text_encoder

    @text_encoder.setter
    def text_encoder(self, value: Any) -> None:
        self._exchange("text_encoder", value)

    def _exchange(self, name: str, value: Any) -> None:
        models = self.pipeline.models
        self.pipeline.models = models._replace(**{name: as_module(name, value, type(getattr(models, name)))})

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; assign a class name of diffusers', a config, a folder, or an object of diffusers'."""
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipeline.scheduler = value


class LatentFace(Face):
    """A face of Stable Diffusion, also XL."""

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.models.vae

    @vae.setter
    def vae(self, value: AutoencoderKL) -> None:
        self._exchange("vae", value)

    def _made(
        self,
        prompt: Any,
        edits: list,
        *,
        num_images_per_prompt: int,
        num_inference_steps: Any,
        guidance_scale: Any,
        edit_momentum_scale: float | None,
        edit_mom_beta: float | None,
        sem_guidance: Any,
        output_type: str,
        return_guidance: bool,
        generator: None,
        **ours: Any,
    ) -> Output:
        """What a call makes, of diffusers' arguments and of those that have the same name in ours."""
        one_of("output_type", output_type, list(_OUTPUTS))
        arguments.no_generator(generator)
        return self.pipeline(
            prompt,
            edits,
            images_per_prompt=num_images_per_prompt,
            steps=num_inference_steps,
            guidance_scale=arguments.guidance_scale(guidance_scale),
            momentum_scale=0.1 if edit_momentum_scale is None else edit_momentum_scale,
            momentum_beta=0.4 if edit_mom_beta is None else edit_mom_beta,
            replay=arguments.replayed(sem_guidance, arguments.count(prompt), num_images_per_prompt),
            output=_OUTPUTS[output_type],
            record=return_guidance,
            strict=False,
            **ours,
        )
