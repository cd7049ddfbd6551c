"""Base classes of the pipelines that wrap a native pipeline in diffusers' interface."""

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sega_jax.diffusers_api.additions import Additions
from sega_jax.diffusers_api.callbacks import StepEnd
from sega_jax.diffusers_api.options import load_options
from sega_jax.diffusers_api.switches import Switches, cast_to
from sega_jax.diffusers_api.torch_values import Seeds, devices_of, is_key
from sega_jax.method.arguments import arguments
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.pipelines import sources
from sega_jax.pipelines.components import as_module
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.messages import collected, warn
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import styled
from sega_jax.systems.base import System
from sega_jax.text.files import CheckpointError
from sega_jax.weights import hub

# The components that `from_pipe` can replace.
_REPLACEABLE = ("scheduler", "unet", "vae", "text_encoder", "text_encoder_2")


class DiffusersPipeline(Switches):
    """A native pipeline wrapped in diffusers' interface.

    Attributes:
        pipeline: the native pipeline.
    """

    pipeline: Pipeline
    _systems: ClassVar[tuple[System, ...]]  # the supported families
    _additions_record: Additions | None = None  # the LoRAs and new words contained in `_modified_models`
    _modified_models: Any = None  # the networks that `_additions_record` describes
    # All pipelines that share LoRAs and new words with this one, including this one.
    _sharers: "weakref.WeakSet[DiffusersPipeline] | None" = None
    _running_calls: int = 0
    _interrupt: bool = False  # set by a callback to end the call

    def __init__(self, *args: Any, **components: Any) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be built from components; use {name}.from_pretrained(folder) or from_pipe(pipe)"
        )

    @property
    def components(self) -> dict[str, Any]:
        """The networks, the tokenizer and the scheduler, as {name: component}."""
        native = self.pipeline
        return {**native.models._asdict(), "tokenizer": native.tokenizer, "scheduler": native.scheduler}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder, hub repository or single file, like `source` in `sega_jax.load`.
            torch_dtype: the dtype of the networks, like `dtype` in `sega_jax.load`. torch dtypes are also accepted.
            options: the options of `sega_jax.load` and of diffusers. `cache_dir`, `token`, `local_files_only` and
                `force_download` are passed to the hub client. `device_map` accepts the same devices as `to`. Options
                such as `use_safetensors` have no effect here.

        Raises:
            TypeError: an option is unknown or not supported.
            CheckpointError: the checkpoint belongs to a different family. Raised before any weights are downloaded.
            Others: as for `sega_jax.load`.
        """
        return cls._load(pretrained_model_name_or_path, torch_dtype, options)

    @classmethod
    def _load(cls, source: str | Path, torch_dtype: Any, options: dict[str, Any]) -> Self:
        """Loads a checkpoint from a folder, hub repository or single file."""
        if torch_dtype is not None:
            options = options | {"torch_dtype": torch_dtype}
        native_options, client_options, device_map = load_options(options, cls.__name__)
        with collected(), hub.using(**client_options):
            native_options = source_options(source, native_options)
            if isinstance(device_map, str) and "devices" not in native_options:
                native_options["devices"] = devices_of(device_map, Devices())
            checked = LoadOptions(source, **native_options)
            checkpoint = sources.find(
                checked.source, checked.revision, checked.config, checked.prediction_type, checked.replaced
            )
            if checkpoint.system not in cls._systems:
                raise CheckpointError(
                    f"{source} is {checkpoint.system.title}, expected {cls._expected()}; sega_jax.load loads any family"
                )
            return cls.from_pipe(load(source, **native_options))

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a single-file checkpoint.

        Args:
            pretrained_model_link_or_path: a .safetensors or .ckpt file, or its address on the hub.
            torch_dtype: as for `from_pretrained`.
            options: as for `from_pretrained`, such as `config` and `tokenizer`.

        Raises:
            CheckpointError: the checkpoint belongs to a different family. Raised before any weights are read.
            Others: as for `sega_jax.load`.
        """
        return cls._load(pretrained_model_link_or_path, torch_dtype, options)

    @classmethod
    def from_pipe(cls, pipeline: Any, *, torch_dtype: Any = None, **options: Any) -> Self:
        """Creates a pipeline that shares another pipeline's weights and compiled programs, but not its scheduler.

        Args:
            pipeline: a native pipeline, or a pipeline from this package. With a pipeline from this package, LoRAs and
                new words that are added to either pipeline are added to both, until a network in either is replaced,
                cast or moved.
            torch_dtype: the dtype of the new pipeline's networks. The other pipeline keeps its dtype.
            options: a `scheduler` or networks (`unet`, `vae`, `text_encoder`, `text_encoder_2`) that replace those of
                `pipeline`. `safety_checker=None` turns the safety checker off.

        Raises:
            TypeError: the argument is not a pipeline or belongs to a different family, or an option is unknown or not
                supported.
        """
        native = pipeline.pipeline if isinstance(pipeline, DiffusersPipeline) else pipeline
        if not isinstance(native, Pipeline):
            raise TypeError(f"pipeline={native!r} should be a pipeline from sega_jax.load or sega_jax.diffusers_api")
        if native.system not in cls._systems:
            raise TypeError(f"pipeline is for {native.system.title}, expected {cls._expected()}")
        replaced, _, _ = load_options(options | {"torch_dtype": torch_dtype}, f"{cls.__name__}.from_pipe")
        if unknown := [name for name in replaced if name not in ("dtype", "safety_checker", *_REPLACEABLE)]:
            raise TypeError(
                f"{unknown[0]} is not an argument of from_pipe; it accepts torch_dtype, {', '.join(_REPLACEABLE)}"
            )
        self, recorded = cls.__new__(cls), pipeline._recorded() if isinstance(pipeline, DiffusersPipeline) else None
        self.pipeline = copy.copy(native)
        if recorded is not None:
            self._additions_record, self._modified_models = recorded, self.pipeline.models
        if isinstance(pipeline, DiffusersPipeline) and not replaced.keys() - {"scheduler", "safety_checker"}:
            self._share_with(pipeline)
        if not replaced.pop("safety_checker", True):
            self.pipeline.safety = None
        dtype = replaced.pop("dtype", None)
        for name, value in replaced.items():
            if value is not None:
                setattr(self, name, value)
        return self if dtype is None else self.to(dtype=dtype)

    @classmethod
    def _expected(cls) -> str:
        return f"{' or '.join(system.title for system in cls._systems)} for {cls.__name__}"

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes a checkpoint in diffusers layout. New words are included, and LoRAs are merged into the weights.

        Args:
            save_directory: a new or empty folder.
            options: `safe_serialization` and `max_shard_size` are accepted but have no effect.

        Raises:
            TypeError: an option is unknown or not supported.
            Others: as for `sega_jax.Pipeline.save`.
        """
        for name, value in options.items():
            if name in ("variant", "push_to_hub") and value:
                raise TypeError(f"{name}={value!r} is not supported; leave it out")
            if name not in ("safe_serialization", "max_shard_size", "variant", "push_to_hub"):
                raise TypeError(f"{name} is not an argument of save_pretrained; leave it out")
        self.pipeline.save(save_directory, progress=self._progress)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.pipeline!r}"

    def __copy__(self) -> Self:
        """Returns a pipeline that shares this pipeline's weights but has its own scheduler, LoRAs and new words."""
        return self._copy_around(copy.copy(self.pipeline))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self._copy_around(copy.deepcopy(self.pipeline, memo))
        memo[id(self)] = copied
        return copied

    def _copy_around(self, native: Pipeline) -> Self:
        """Returns a copy of this pipeline that wraps `native`."""
        recorded, copied = self._recorded(), type(self).__new__(type(self))
        copied.__dict__.update(
            vars(self), pipeline=native, _additions_record=recorded, _modified_models=native.models, _sharers=None
        )
        return copied

    def _run(self, call: Any, *texts: Any) -> Output:
        """Calls the native pipeline.

        Args:
            call: the arguments.
            texts: the prompt, negative prompt and concepts, as for `PipelineArguments.native`.
        """
        # diffusers knows no recommended settings, so the family's defaults replace them.
        declared = arguments(self.pipeline.system.call)
        options = {name: declared[name].default for name in self.pipeline.recommended.call} | call.native(*texts)
        options.setdefault("progress", self._progress)
        if self._tiled:
            options["tiled"] = True
        options = self._with_picture_size(options)
        self._check_guidance(getattr(call, "guidance_scale", None))
        seeds = None
        if call.random is not None and not is_key(call.random):
            seeds = Seeds(call.random)
            options["seed"] = seeds.value
        elif call.random is not None:
            options["key"] = call.random
        if call.step_end is not None:
            options["callback"], options["callback_steps"] = StepEnd(self, call.step_end), 1
        with self._scaled_loras(call.lora_scale), styled(**self._bar):
            self._running_calls += 1
            self._interrupt = False
            try:
                out = self.pipeline(**options)
            finally:
                self._running_calls -= 1
        if seeds is not None:
            seeds.advance()
        return out

    def _with_picture_size(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a native call. Subclasses that start from a picture add the picture's size."""
        return options

    def _check_guidance(self, scale: Any) -> None:
        """Warns about a guidance scale that has a different effect here than in diffusers."""

    # LoRAs and new words

    def _share_with(self, other: "DiffusersPipeline") -> None:
        """Shares LoRAs and new words with another pipeline from now on."""
        if other._sharers is None:
            other._sharers = weakref.WeakSet([other])
        self._sharers = other._sharers
        self._sharers.add(self)

    def _stop_sharing(self) -> None:
        """Stops sharing LoRAs and new words with other pipelines."""
        if self._sharers is not None:
            self._sharers.discard(self)
            self._sharers = None

    def _recorded(self) -> Additions | None:
        """Returns the additions to the current networks. Returns None if there are none or a network was replaced."""
        return self._additions_record if self._modified_models is self.pipeline.models else None

    def _additions(self) -> Additions:
        return self._recorded() or Additions(self.pipeline.models, self.pipeline.tokenizer)

    def _apply(self, additions: Additions) -> None:
        """Replaces the LoRAs and new words of this pipeline and of all pipelines that share them.

        Raises:
            RuntimeError: one of these pipelines is running a call.
            Others: as for `Additions.build`.
        """
        sharing = [self, *(pipe for pipe in self._sharers or () if pipe is not self)]
        if any(pipe._running_calls for pipe in sharing):
            raise RuntimeError(
                "LoRAs and new words cannot be changed during a call; use a separate call for each setting"
            )
        models, tokenizer = additions.build()
        for pipe in sharing:
            pipe.pipeline.models, pipe.pipeline.tokenizer = models, tokenizer
            pipe._set_additions(additions)

    def _set_additions(self, additions: Additions) -> None:
        self._additions_record, self._modified_models = additions, self.pipeline.models

    @contextmanager
    def _scaled_loras(self, scale: float) -> Iterator[None]:
        """Multiplies the weights of the LoRAs by `scale` inside a `with` block."""
        additions = self._recorded()
        if scale == 1 or additions is None or not (additions.enabled and additions.loras):
            yield
            return
        try:
            self.pipeline.models, _ = additions.build(scale)
            yield
        finally:
            self._apply(additions)

    def _move(self, devices: Devices, dtype: np.dtype | None) -> None:
        if self._running_calls:
            raise RuntimeError("the networks cannot be moved or cast during a call; move or cast them between calls")
        self._stop_sharing()
        additions, native = self._additions(), self.pipeline

        def moved(tree: Any) -> Any:
            cast = tree if dtype is None else cast_to(tree, dtype)
            return cast if devices is native.devices else devices.place(cast)

        safety = native.safety
        safety = safety and safety._replace(checker=moved(safety.checker))
        parts = {"models": moved(additions.models), "devices": devices, "safety": safety}
        self.pipeline = Pipeline(**native.components | parts)
        self._apply(dataclasses.replace(additions, models=self.pipeline.models))


def source_options(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Removes options that are None. Also removes `variant` if the source is a single file.

    `safety_checker=None` is kept. diffusers accepts a variant for single files but ignores it.
    """
    options = {name: value for name, value in options.items() if value is not None or name == "safety_checker"}
    if sources.names_file(source):
        options.pop("variant", None)
    return options


class UNetPipeline(DiffusersPipeline):
    """A pipeline that denoises with a UNet."""

    def _check_guidance(self, scale: Any) -> None:
        scales = scale if isinstance(scale, list | tuple) else [1 if scale is None else scale]
        if self.unet.config.time_cond_proj_dim and any(row_scale < 1 for row_scale in scales):
            warn(
                f"guidance_scale={scale!r} is raised to 1, because this network was trained with guidance scales of at"
                " least 1"
            )

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipeline.models.unet

    @unet.setter
    def unet(self, value: UNet2DConditionModel) -> None:
        self._replace_network("unet", value)

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.models.text_encoder

    @text_encoder.setter
    def text_encoder(self, value: Any) -> None:
        self._replace_network("text_encoder", value)

    def _replace_network(self, name: str, value: Any) -> None:
        """Replaces a network of this pipeline and removes all LoRAs.

        Raises:
            TypeError: `value` is not the right kind of network.
        """
        if type(value).__module__.startswith("torch.") or inspect.isfunction(value):
            raise TypeError(f"{name}: JAX compiles the networks at the first call; leave torch.compile out")
        module = self.pipeline.system.checkpoint.networks[name].module
        value, additions = as_module(name, value, module), self._additions()
        self._stop_sharing()
        models = additions.models._replace(**{name: value})
        if additions.words and name.startswith("text_encoder"):
            # The new words are lost, because their embeddings are in the old text encoder.
            self._apply(Additions(models, additions.tokenizer))
        else:
            self._apply(Additions(models, additions.tokenizer, additions.words))

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler. It can be set to a diffusers class name, a config, a folder or a diffusers scheduler."""
        scheduler = self.pipeline.scheduler
        assert scheduler is not None  # every family with a UNet has a scheduler
        return scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipeline.scheduler = value
