"""diffusers' classes of schedulers: each makes a `sega_jax.method.schedules.Scheduler`."""

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
    """The type of a class of diffusers' schedulers. Calling the class makes a scheduler, which is an instance of it."""

    def __call__(cls, **options: Any) -> Scheduler:
        """Makes a scheduler with these options, and diffusers' defaults for the others.

        Raises:
            TypeError, ValueError: an option is unknown or has a value that is not supported.
        """
        _check(cls.__name__, options)
        return from_config({"_class_name": cls.__name__, **options})

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Scheduler) and instance.name == cls.__name__

    def from_config(cls, config: Any, **options: Any) -> Scheduler:
        """Makes a scheduler with the options of another one.

        Args:
            config: a scheduler's config (`pipe.scheduler.config`), or the scheduler.
            options: replace those of the config.

        Raises:
            TypeError, ValueError: it is no config, or an option is unknown or has a value that is not supported.
        """
        _check(cls.__name__, options)
        values = dict(config if isinstance(config, Mapping) else as_scheduler(config).config)
        chosen = [name for name in values.get("_use_default_values") or [] if name not in options]
        return as_scheduler(cls.__name__, {**values, "_use_default_values": chosen, **options})

    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> Scheduler:
        """Reads a scheduler's config from a folder or a repository on the hub.

        Args:
            pretrained_model_name_or_path: the folder or "owner/name".
            subfolder: the folder in it, usually "scheduler".
            options: `revision`, other options of the hub, and options that replace those of the config.

        Raises:
            TypeError, ValueError, CheckpointError: there is none, or an option is unknown.
        """
        revision = options.pop("revision", None)
        own = {name: options.pop(name) for name in list(options) if name in _known(cls.__name__)}
        source = pretrained_model_name_or_path
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"{type(source).__name__} should be the path of a folder, or owner/name on the hub")
        name = f"{subfolder}/{_FILE}" if subfolder else _FILE
        with hub_options(f"{cls.__name__}.from_pretrained", options):
            folder = Path(os.path.expanduser(source))
            if not folder.exists() and hub.is_id(source):
                folder = hub.fetch(source, [name], revision)
        return cls.from_config(read_json(folder / name), **own)


def _known(name: str) -> list[str]:
    return [*FAMILIES[name].defaults, *FAMILIES[name].fixed]


def _check(name: str, options: Mapping[str, Any]) -> None:
    """Checks that a class has options of these names.

    Raises:
        TypeError: it has not; the message has similar ones.
    """
    known = _known(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise TypeError(f"{option} is not an option of {name}; {hint}")


def _class(name: str) -> SchedulerType:
    return SchedulerType(name, (), {"__doc__": f"diffusers' `{name}`.", "__module__": __name__})


SCHEDULERS = {name: _class(name) for name in FAMILIES}
