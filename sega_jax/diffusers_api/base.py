"""What all pipelines with diffusers' names share: a native pipeline, and its components by diffusers' names."""

from pathlib import Path
from typing import Any, ClassVar, Self

from sega_jax.method.arguments import unknown_arguments
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.pipelines import sources
from sega_jax.pipelines.components import as_module
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.messages import collected
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.systems.base import System
from sega_jax.text.files import CheckpointError


class Face:
    """A pipeline with diffusers' names around a native one (`pipeline`)."""

    pipeline: Pipeline
    _systems: ClassVar[tuple[System, ...]]  # the families that it takes

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: the `source` of `sega_jax.load`.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            options: the options of `sega_jax.load`.

        Raises:
            CheckpointError: the checkpoint is of another family; nothing but its index was fetched.
            Others as `sega_jax.load`.
        """
        return cls._load(pretrained_model_name_or_path, torch_dtype, options)

    @classmethod
    def _load(cls, source: str | Path, torch_dtype: Any, options: dict[str, Any]) -> Self:
        """Loads a folder, repository or single file."""
        unknown_arguments(LoadOptions, list(options), cls.__name__)
        if options.get("dtype") is None:
            options = options | {"dtype": torch_dtype}
        checked = LoadOptions(source, **options)
        with collected():
            found = sources.find(
                checked.source, checked.revision, checked.config, checked.prediction_type, checked.replaced
            )
            if found.system not in cls._systems:
                raise CheckpointError(
                    f"{source} is {found.system.title}, expected {cls._expected()}; sega_jax.load takes either"
                )
            return cls.from_pipe(load(source, **options))

    @classmethod
    def from_pipe(cls, pipeline: Any) -> Self:
        """Wraps a native pipeline, or that of another pipeline with diffusers' names.

        Raises:
            TypeError: it is something else, or of another family.
        """
        native = pipeline.pipeline if isinstance(pipeline, Face) else pipeline
        if not isinstance(native, Pipeline):
            raise TypeError(f"pipeline={native!r} should be what sega_jax.load gives")
        if native.system not in cls._systems:
            raise TypeError(f"pipeline is of {native.system.title}, expected {cls._expected()}")
        self = cls.__new__(cls)
        self.pipeline = native
        return self

    @classmethod
    def _expected(cls) -> str:
        return f"{' or '.join(system.title for system in cls._systems)} for {cls.__name__}"


class UNetFace(Face):
    """A pipeline whose network is a UNet."""

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
        """Exchanges a network.

        Raises:
            TypeError: the value is something else.
        """
        module = self.pipeline.system.checkpoint.networks[name].module
        self.pipeline.models = self.pipeline.models._replace(**{name: as_module(name, value, module)})

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; assign the name of a class in diffusers, a config, a folder, or a scheduler of diffusers."""
        scheduler = self.pipeline.scheduler
        assert scheduler is not None  # families without one have no UNet
        return scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipeline.scheduler = value


def refuse(options: dict[str, Any], *names: str) -> None:
    """Removes options of diffusers that are not supported.

    Raises:
        TypeError: one has a value other than None and False.
    """
    for name in names:
        if options.pop(name, None) not in (None, False):
            raise TypeError(f"{name} is not supported; leave it out")
