"""The components of a loaded checkpoint; `Pipeline` makes them callable."""

import copy
from collections.abc import Sequence
from typing import Any, NoReturn, Self

import jax
import numpy as np

from sega_jax.method.checks import brief
from sega_jax.method.numerics import at_least_float32
from sega_jax.method.schedules import Scheduler
from sega_jax.pipelines.components import as_scheduler, check_training
from sega_jax.pipelines.execution.chunks import Chunks
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import EmbeddingCache
from sega_jax.pipelines.recommended import Recommended, checked
from sega_jax.pipelines.safety import Safety
from sega_jax.systems.base import System


class LoadedCheckpoint:
    """The components of a pipeline, and the compiled programs and cached embeddings that its calls share.

    Args:
        system: The family of the checkpoint.
        models: The networks, as the family's NamedTuple.
        tokenizer: The tokenizer or tokenizers; None if all texts will be passed as embeddings.
        scheduler: The schedule and solver; None for a family that defines its own schedule.
        devices: The devices that share the rows of a batch; None means all devices of this host.
        safety: The checkpoint's safety checker; `pipe.safety = None` turns it off.
        extras: Further settings of the checkpoint, as the family's NamedTuple. For SDXL, these include whether a
            missing negative prompt is encoded as zeros.
        recommended: The settings that the checkpoint recommends. Calls use them for all settings that the user does not
            give. `pipe.recommended = sega_jax.Recommended()` restores the library's defaults.

    Raises:
        TypeError, ValueError: A component belongs to a different family, or the components do not fit together.
    """

    source: str | None = None  # the checkpoint's name or path; None if the pipeline was not loaded from a checkpoint

    def __init__(
        self,
        system: System,
        models: Any,
        tokenizer: Any,
        scheduler: Any,
        devices: Devices | Sequence[jax.Device] | None,
        safety: Safety | None = None,
        extras: Any = None,
        recommended: Recommended | None = None,
    ):
        if not isinstance(system, System):
            raise TypeError(f"system={brief(system)} should be another pipeline's family (pipe.system)")
        if not (safety is None or isinstance(safety, Safety)):
            raise TypeError(f"safety={safety!r} should be another pipeline's safety checker (pipe.safety), or None")
        if not isinstance(extras, system.checkpoint.extras_type):
            kind = system.checkpoint.extras_type
            expected = "None" if kind is type(None) else f"another pipeline's (pipe.extras), of type {kind.__name__}"
            raise TypeError(f"extras={brief(extras)} should be {expected}, for {system.title}")
        self.system = system
        self.devices = devices if isinstance(devices, Devices) else Devices(devices)
        self._keep(self._built(models))
        self.tokenizer = tokenizer
        if system.checkpoint.scheduler is None and scheduler is not None:
            raise TypeError(f"{system.title} has its own schedule and takes no scheduler")
        self._scheduler = None if system.checkpoint.scheduler is None else as_scheduler(scheduler)
        self.safety = safety
        self.extras = extras
        self.recommended = Recommended() if recommended is None else recommended
        self.chunks = Chunks()
        self.embeddings = EmbeddingCache(system.text.encode, self.devices)

    @property
    def recommended(self) -> Recommended:
        """The settings that the checkpoint recommends."""
        return self._recommended

    @recommended.setter
    def recommended(self, value: Recommended) -> None:
        if not isinstance(value, Recommended):
            raise TypeError(f"recommended={brief(value)} should be a sega_jax.Recommended")
        self._recommended = checked(value, self.system)

    @property
    def components(self) -> dict[str, Any]:
        """The arguments that recreate this pipeline.

        `Pipeline(**pipe.components)` creates a second pipeline that shares this one's weights and compiled programs but
        has its own scheduler.
        """
        names = ("system", "models", "tokenizer", "scheduler", "devices", "safety", "extras", "recommended")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        kinds = [device.platform for device in self.devices.devices]
        sizes = self.system.sampler.sizes(self.models).default
        parts = [
            self.system.title,
            *([] if self.source is None else [repr(self.source)]),
            self.dtype.name,
            kinds[0] if len(kinds) == 1 else f"{len(kinds)} x {kinds[0]}",
            *([] if self._scheduler is None else [self._scheduler.name]),
            *([] if sizes is None else [f"{sizes[0]} x {sizes[1]} pixels"]),
        ]
        return f"<{type(self).__name__}: {', '.join(parts)}>"

    def __copy__(self) -> Self:
        """Returns a pipeline that shares this one's weights and compiled programs but has its own scheduler."""
        copied = type(self)(**self.components)
        copied.source = self.source
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a pipeline with copied networks.

        The copies share their arrays with the originals, because arrays are immutable.
        """
        copied = self.__copy__()
        memo[id(self)] = copied
        copied.models = jax.tree.map(lambda leaf: leaf, self.models)
        copied.tokenizer = copy.deepcopy(self.tokenizer, memo)
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a pipeline cannot be pickled, because it holds compiled programs and arrays on devices; write"
            " pipe.save(folder) here, and sega_jax.load(folder) in the other process"
        )

    @property
    def models(self) -> Any:
        """The networks, on the devices; `pipe.models = pipe.models._replace(unet=...)` replaces one."""
        return self._models

    @models.setter
    def models(self, models: Any) -> None:
        built = self._built(models)
        self._keep(type(built)(*self.devices.place(built)))
        self.chunks = Chunks()
        self.embeddings.clear()

    def _keep(self, models: Any) -> None:
        self._models = models
        # The dtype is cached, because traversing a network's hundreds of modules takes milliseconds at every call.
        self._dtype = jax.tree.leaves(self.system.sampler.networks(models))[0].dtype

    def _built(self, models: Any) -> Any:
        if not isinstance(models, self.system.checkpoint.models):
            names = ", ".join(self.system.checkpoint.networks)
            raise TypeError(
                f"models={type(models).__name__} should be the Models of a {self.system.title} pipeline"
                f" (pipe.models), such as pipe.models._replace({names.split(', ')[-1]}=...)"
            )
        return self.system.checkpoint.build(**models._asdict())

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the denoising network. The other networks usually have the same dtype."""
        return self._dtype

    @property
    def wide(self) -> np.dtype:
        """The dtype of the sampling loop: float32, or float64 if the networks are float64."""
        return at_least_float32(self.dtype)

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler; None for a family that defines its own schedule.

        To change it, assign a `Scheduler`, a config, a folder with a config, or the name of a diffusers class, which
        adopts the options of the previous scheduler. Most scheduler changes need no recompilation.
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        if self._scheduler is None:
            raise TypeError(f"{self.system.title} has its own schedule and takes no scheduler")
        scheduler = as_scheduler(value, self._scheduler.config)
        check_training(scheduler.name, self._scheduler.config)
        self._scheduler = scheduler
