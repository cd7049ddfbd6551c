"""Translates the configs of diffusers' Flax checkpoints, so that they name torch classes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sega_jax.method.schedules import of_torch
from sega_jax.text.files import read_json

_PREFIX = "Flax"


def of_torch_classes(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Returns the configs that name Flax classes, rewritten to name the corresponding torch classes.

    Args:
        folder: the folder of the checkpoint.
        files: the paths of its files, relative to the folder.

    Returns:
        {path: content} for the configs that change.
    """
    configs = {}
    for path in files:
        if path.name in ("model_index.json", "config.json", "scheduler_config.json"):
            config = read_json(folder / path)
            if (changed := _changed(path.name, config)) != config:
                configs[str(path)] = changed
    return configs


def _changed(name: str, config: dict[str, Any]) -> dict[str, Any]:
    if name == "scheduler_config.json":
        return of_torch(config)
    # An index lists the library and class of every component. Like the other configs, it also names its own class.
    return {
        key: [_torch(entry) for entry in value] if name == "model_index.json" and isinstance(value, list) else value
        for key, value in config.items()
    } | ({"_class_name": _torch(config["_class_name"])} if "_class_name" in config else {})


def _torch(name: Any) -> Any:
    return name.removeprefix(_PREFIX) if isinstance(name, str) else name
