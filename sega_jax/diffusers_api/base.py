"""What all pipelines with diffusers' names share: a native pipeline, and its components by diffusers' names."""

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

# What `from_pipe` exchanges.
_PARTS = ("scheduler", "unet", "vae", "text_encoder", "text_encoder_2")


class Face(Switches):
    """A pipeline with diffusers' names around a native one (`pipeline`)."""

    pipeline: Pipeline
    _systems: ClassVar[tuple[System, ...]]  # the families that it takes
    _added: Additions | None = None  # what was added to the networks
    _current: Any = None  # the networks with it
    _sharing: "weakref.WeakSet[Face] | None" = None  # pipelines with which it shares its networks, itself among them
    _calls: int = 0  # calls that are running
    _interrupt: bool = False  # set by callbacks to end a call

    def __init__(self, *args: Any, **components: Any) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not built from components; write {name}.from_pretrained(folder) or from_pipe(pipe)")

    @property
    def components(self) -> dict[str, Any]:
        """The networks, the tokenizer and the scheduler by their names."""
        native = self.pipeline
        return {**native.models._asdict(), "tokenizer": native.tokenizer, "scheduler": native.scheduler}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: the `source` of `sega_jax.load`.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            options: the options of `sega_jax.load`, and those of diffusers: options of the hub (`cache_dir`, `token`,
                `local_files_only`, `force_download`), `device_map` as the device of `to`, and others without an effect
                here, such as `use_safetensors`.

        Raises:
            TypeError: an option is unknown or not supported.
            CheckpointError: the checkpoint is of another family; nothing but its index was fetched.
            Others as `sega_jax.load`.
        """
        return cls._load(pretrained_model_name_or_path, torch_dtype, options)

    @classmethod
    def _load(cls, source: str | Path, torch_dtype: Any, options: dict[str, Any]) -> Self:
        """Loads a folder, repository or single file."""
        if torch_dtype is not None:
            options = options | {"torch_dtype": torch_dtype}
        ours, of_hub, device_map = load_options(options, cls.__name__)
        with collected(), hub.using(**of_hub):
            ours = of_source(source, ours)
            if isinstance(device_map, str) and "devices" not in ours:
                ours["devices"] = devices_of(device_map, Devices())
            checked = LoadOptions(source, **ours)
            found = sources.find(
                checked.source, checked.revision, checked.config, checked.prediction_type, checked.replaced
            )
            if found.system not in cls._systems:
                raise CheckpointError(
                    f"{source} is {found.system.title}, expected {cls._expected()}; sega_jax.load takes either"
                )
            return cls.from_pipe(load(source, **ours))

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a single file.

        Args:
            pretrained_model_link_or_path: a .safetensors or .ckpt file, or its address on the hub.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            options: as of `from_pretrained`, such as `config` and `tokenizer`.

        Raises:
            CheckpointError: the checkpoint is of another family; no weights were read.
            Others as `sega_jax.load`.
        """
        return cls._load(pretrained_model_link_or_path, torch_dtype, options)

    @classmethod
    def from_pipe(cls, pipeline: Any, *, torch_dtype: Any = None, **options: Any) -> Self:
        """Wraps a native pipeline, or that of another pipeline with diffusers' names.

        Args:
            pipeline: the pipeline, which shares its weights and compiled programs, but not its scheduler. LoRAs and
                new words that are added to a pipeline with diffusers' names are added to both from then on, until a
                network is exchanged or cast.
            torch_dtype: casts the networks of the new pipeline alone.
            options: `scheduler`, or networks in place of the pipeline's.

        Raises:
            TypeError: it is something else, or of another family; or an option is unknown or not supported.
        """
        native = pipeline.pipeline if isinstance(pipeline, Face) else pipeline
        if not isinstance(native, Pipeline):
            raise TypeError(f"pipeline={native!r} should be what sega_jax.load gives")
        if native.system not in cls._systems:
            raise TypeError(f"pipeline is of {native.system.title}, expected {cls._expected()}")
        ours, _, _ = load_options(options | {"torch_dtype": torch_dtype}, f"{cls.__name__}.from_pipe")
        if unknown := [name for name in ours if name not in ("dtype", "safety_checker", *_PARTS)]:
            raise TypeError(f"{unknown[0]} is not an argument of from_pipe; it takes torch_dtype, {', '.join(_PARTS)}")
        self, known = cls.__new__(cls), pipeline._known() if isinstance(pipeline, Face) else None
        self.pipeline = copy.copy(native)
        if known is not None:
            self._added, self._current = known, self.pipeline.models
        if isinstance(pipeline, Face) and not ours.keys() - {"scheduler", "safety_checker"}:
            self._join(pipeline)
        if not ours.pop("safety_checker", True):
            self.pipeline.safety = None
        dtype = ours.pop("dtype", None)
        for name, value in ours.items():
            if value is not None:
                setattr(self, name, value)
        return self if dtype is None else self.to(dtype=dtype)

    @classmethod
    def _expected(cls) -> str:
        return f"{' or '.join(system.title for system in cls._systems)} for {cls.__name__}"

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the pipeline as a checkpoint in diffusers layout, with merged LoRAs and new words; see
        `sega_jax.Pipeline.save`.

        Args:
            save_directory: a new or empty folder.
            options: `safe_serialization` and `max_shard_size`, which have no effect here.

        Raises:
            TypeError: an option is unknown or not supported.
            Others as `sega_jax.Pipeline.save`.
        """
        for name, value in options.items():
            if name in ("variant", "push_to_hub") and value:
                raise TypeError(f"{name}={value!r} is not supported; leave it out")
            if name not in ("safe_serialization", "max_shard_size", "variant", "push_to_hub"):
                raise TypeError(f"{name} is not an argument of save_pretrained")
        self.pipeline.save(save_directory, progress=self._progress)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.pipeline!r}"

    def __copy__(self) -> Self:
        """Another pipeline that shares the weights, with a scheduler of its own."""
        return self._with(copy.copy(self.pipeline))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = self._with(copy.deepcopy(self.pipeline, memo))
        memo[id(self)] = made
        return made

    def _with(self, native: Pipeline) -> Self:
        known, made = self._known(), type(self).__new__(type(self))
        made.__dict__.update(vars(self), pipeline=native, _added=known, _current=native.models, _sharing=None)
        return made

    def _make(self, call: Any, *texts: Any) -> Output:
        """Runs a call of the native pipeline.

        Args:
            call: the arguments.
            texts: the prompt, negative prompt and concepts, as `FaceArguments.native` takes them.
        """
        options = call.native(*texts)
        options.setdefault("progress", self._progress)
        if self._tiled:
            options["tiled"] = True
        options = self._sized(options)
        self._check_guidance(getattr(call, "guidance_scale", None))
        seeds = None
        if call.random is not None and not is_key(call.random):
            seeds = Seeds(call.random)
            options["seed"] = seeds.value
        elif call.random is not None:
            options["key"] = call.random
        if call.step_end is not None:
            options["callback"], options["callback_steps"] = StepEnd(self, call.step_end), 1
        with self._scaled(call.lora_scale), styled(**self._bar):
            self._calls += 1
            self._interrupt = False
            try:
                out = self.pipeline(**options)
            finally:
                self._calls -= 1
        if seeds is not None:
            seeds.advance()
        return out

    def _sized(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a native call with the size of its pictures, where another picture decides it."""
        return options

    def _check_guidance(self, scale: Any) -> None:
        """Warns of a guidance scale that is not taken as diffusers takes it."""

    # What is added to the networks

    def _join(self, other: "Face") -> None:
        """Shares the networks of another pipeline, and the LoRAs and new words in them."""
        if other._sharing is None:
            other._sharing = weakref.WeakSet([other])
        self._sharing = other._sharing
        self._sharing.add(self)

    def _leave(self) -> None:
        """Shares the networks with no other pipeline any more."""
        if self._sharing is not None:
            self._sharing.discard(self)
            self._sharing = None

    def _known(self) -> Additions | None:
        """Returns what was added to the current networks; None if nothing was, or the networks were exchanged."""
        return self._added if self._current is self.pipeline.models else None

    def _additions(self) -> Additions:
        return self._known() or Additions(self.pipeline.models, self.pipeline.tokenizer)

    def _add(self, added: Additions) -> None:
        """Replaces the LoRAs and new words in the networks.

        Raises:
            RuntimeError: a call is running, whose networks cannot change.
            Others as `Additions.build`.
        """
        sharing = [self, *(face for face in self._sharing or () if face is not self)]
        if any(face._calls for face in sharing):
            raise RuntimeError("LoRAs and new words cannot change during a call; make one call for each weight")
        models, tokenizer = added.build()
        for face in sharing:
            face.pipeline.models, face.pipeline.tokenizer = models, tokenizer
            face._set_additions(added)

    def _set_additions(self, added: Additions) -> None:
        self._added, self._current = added, self.pipeline.models

    @contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        """Multiplies the weights of the LoRAs during a block."""
        added = self._known()
        if scale == 1 or added is None or not (added.enabled and added.loras):
            yield
            return
        try:
            self.pipeline.models, _ = added.build(scale)
            yield
        finally:
            self._add(added)

    def _move(self, devices: Devices, dtype: np.dtype | None) -> None:
        if self._calls:
            raise RuntimeError("the networks cannot move during a call")
        self._leave()
        added, native = self._additions(), self.pipeline

        def moved(tree: Any) -> Any:
            cast = tree if dtype is None else cast_to(tree, dtype)
            return cast if devices is native.devices else devices.place(cast)

        safety = native.safety
        safety = safety and safety._replace(checker=moved(safety.checker))
        parts = {"models": moved(added.models), "devices": devices, "safety": safety}
        self.pipeline = Pipeline(**native.components | parts)
        self._add(dataclasses.replace(added, models=self.pipeline.models))


def of_source(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Returns options without those that are None, and of single files without a variant, which diffusers accepts for
    them and which means nothing there."""
    options = {name: value for name, value in options.items() if value is not None or name == "safety_checker"}
    if sources.names_file(source):
        options.pop("variant", None)
    return options


class UNetFace(Face):
    """A pipeline whose network is a UNet."""

    def _check_guidance(self, scale: Any) -> None:
        scales = scale if isinstance(scale, list | tuple) else [1 if scale is None else scale]
        if self.unet.config.time_cond_proj_dim and any(each < 1 for each in scales):
            warn(f"guidance_scale={scale!r} is taken as 1 by this network, which was trained with 1 and more")

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
        """Exchanges a network. LoRAs are forgotten, and in the other networks they are taken out.

        Raises:
            TypeError: the value is something else.
        """
        if type(value).__module__.startswith("torch.") or inspect.isfunction(value):
            raise TypeError(f"{name}: JAX compiles the networks at the first call; leave torch.compile out")
        module = self.pipeline.system.checkpoint.networks[name].module
        value, added = as_module(name, value, module), self._additions()
        self._leave()
        models = added.models._replace(**{name: value})
        if added.words and name.startswith("text_encoder"):
            # New words are in the text encoder that goes.
            self._add(Additions(models, added.tokenizer))
        else:
            self._add(Additions(models, added.tokenizer, added.words))

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
