"""diffusers' scheduler classes. Calling a class creates a `sega_jax.method.schedules.Scheduler`."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sega_jax.diffusers_api.options import hub_options
from sega_jax.method.schedules import FAMILIES, Scheduler, from_config
from sega_jax.pipelines.components import as_scheduler
from sega_jax.text.files import read_json
from sega_jax.weights import hub

_FILE = "scheduler_config.json"


class SchedulerType(type):
    """The metaclass of the scheduler classes.

    Calling a scheduler class creates a `Scheduler`, for which `isinstance(scheduler, that_class)` is true.
    """

    def __call__(cls, **options: Any) -> Scheduler:
        """Creates a scheduler from options. Missing options have diffusers' defaults.

        Raises:
            TypeError, ValueError: an option is unknown or has an unsupported value.
        """
        _check(cls.__name__, options)
        return from_config({"_class_name": cls.__name__, **options})

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Scheduler) and instance.name == cls.__name__

    def from_config(cls, config: Any, **options: Any) -> Scheduler:
        """Creates a scheduler with the options of another scheduler.

        Args:
            config: a scheduler's config (`pipe.scheduler.config`), or the scheduler itself.
            options: options that override the config.

        Raises:
            TypeError, ValueError: `config` is not a config, or an option is unknown or has an unsupported value.
        """
        _check(cls.__name__, options)
        values = dict(config if isinstance(config, Mapping) else as_scheduler(config).config)
        defaulted = [name for name in values.get("_use_default_values") or [] if name not in options]
        return as_scheduler(cls.__name__, {**values, "_use_default_values": defaulted, **options})

    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> Scheduler:
        """Creates a scheduler from the config in a folder or hub repository.

        Args:
            pretrained_model_name_or_path: the folder, or "owner/name" on the hub.
            subfolder: the config's folder inside that folder or repository, usually "scheduler".
            options: `revision`, other options of the hub client, and options that override the config.

        Raises:
            TypeError, ValueError, CheckpointError: the config is missing or broken, or an option is unknown or has an
                unsupported value.
        """
        revision = options.pop("revision", None)
        overrides = {name: options.pop(name) for name in list(options) if name in _option_names(cls.__name__)}
        source = pretrained_model_name_or_path
        if not isinstance(source, str | os.PathLike):
            raise TypeError(
                f"pretrained_model_name_or_path has type {type(source).__name__}; expected a folder or owner/name on"
                " the hub"
            )
        name = f"{subfolder}/{_FILE}" if subfolder else _FILE
        with hub_options(f"{cls.__name__}.from_pretrained", options):
            folder = Path(os.path.expanduser(source))
            if not folder.exists() and hub.is_id(source):
                folder = hub.fetch(source, [name], revision)
        return cls.from_config(read_json(folder / name), **overrides)


def _option_names(name: str) -> list[str]:
    return [*FAMILIES[name].defaults, *FAMILIES[name].fixed]


def _check(name: str, options: Mapping[str, Any]) -> None:
    """Checks that the scheduler class `name` has the given options.

    Raises:
        TypeError: an option is unknown.
    """
    known = _option_names(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"its options are {', '.join(known)}"
            raise TypeError(f"{option} is not an option of {name}; {hint}")


def _class(name: str) -> SchedulerType:
    return SchedulerType(name, (), {"__doc__": f"diffusers' `{name}`.", "__module__": __name__})


SCHEDULERS = {name: _class(name) for name in FAMILIES}
