"""Saves pipelines as checkpoints in diffusers layout."""

import os
import tempfile
from pathlib import Path
from typing import Any

from sega_jax.nn.config import written
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.progress import bar
from sega_jax.pipelines.recommended import FILE
from sega_jax.systems.base import Network, Saved
from sega_jax.systems.registry import CHECKER
from sega_jax.weights.destination import atomic_folder
from sega_jax.weights.write import Part, as_json, checkpoint_bytes, module_part, write_checkpoint

_CHECKER = Network(
    StableDiffusionSafetyChecker,
    None,
    "model",
    options=lambda config: {"model_type": "clip"},
    published=StableDiffusionSafetyChecker.published,
    library="stable_diffusion",
)


def save(pipe: LoadedCheckpoint, folder: str | Path, progress: bool | None = None) -> Path:
    """Saves a pipeline as a checkpoint in diffusers layout.

    The checkpoint contains the current networks in their dtypes, with merged LoRAs and added words. It also contains
    the tokenizers, the scheduler, the safety checker and the recommended settings (`pipe.recommended`).

    Args:
        pipe: The pipeline.
        folder: A new or empty folder. The files appear in it only once all of them have been written.
        progress: Whether to show a progress bar; None shows one in terminals and notebooks.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
        TypeError: `folder` is not a path, or the pipeline's family does not support saving.
        OSError: The folder cannot be written, or the disk is full.
    """
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise TypeError(f"folder={folder!r} should be the path of a new folder")
    saved = pipe.system.checkpoint.saved
    if saved is None:
        raise TypeError(f"{pipe.system.title} does not support saving; set `saved` in the family's Checkpoint")
    dest = Path(os.path.expanduser(folder)).resolve()
    networks = _networks(pipe)
    parts = {name: _part(network, module) for name, (network, module) in networks.items()}
    with tempfile.TemporaryDirectory() as scratch, atomic_folder(dest) as partial:
        files = _files(pipe, saved, networks, Path(scratch))
        total = checkpoint_bytes(parts, files)
        with bar(total, "B", progress, unit_scale=True, unit_divisor=1024) as shown:
            write_checkpoint(partial, parts, files, shown.update)
    return dest


def _networks(pipe: LoadedCheckpoint) -> dict[str, tuple[Network, Any]]:
    """Returns the pipeline's networks as {folder: (the family's `Network`, network)}."""
    described, models = pipe.system.checkpoint.networks, pipe.models._asdict()
    present = {name: (network, models[name]) for name, network in described.items() if models[name] is not None}
    return present if pipe.safety is None else present | {CHECKER: (_CHECKER, pipe.safety.checker)}


def _part(network: Network, module: Any) -> Part:
    return module_part(module, network.stem, network.published)


def _files(
    pipe: LoadedCheckpoint, saved: Saved, networks: dict[str, tuple[Network, Any]], scratch: Path
) -> dict[Path, Path | bytes]:
    """Returns all files except weights. model_index.json comes last, so that an incomplete folder cannot be loaded."""
    files: dict[Path, Path | bytes] = {}
    checkpoint = pipe.system.checkpoint
    index: dict[str, Any] = {"_class_name": saved.class_name}
    index |= {part: [None, None] for part, network in checkpoint.networks.items() if network.optional}
    index |= {**checkpoint.unchecked, **saved.entries(pipe.extras)}
    for name, (network, module) in networks.items():
        library, class_name = network.library or _library(network), type(module).__name__
        identity = {"architectures": [class_name]} if network.stem == "model" else {"_class_name": class_name}
        files[Path(name, "config.json")] = as_json(
            {**identity, **network.options(module.config), **written(module.config)}
        )
        index[name] = [library, class_name]
    for name, tokenizer in saved.tokenizers(pipe.tokenizer).items():
        index[name] = [None, None]
        if tokenizer is not None:
            tokenizer.save(scratch / name)
            files |= {path.relative_to(scratch): path for path in sorted((scratch / name).iterdir())}
            index[name] = ["transformers", tokenizer.library_class]
    schedulers = {} if pipe.scheduler is None else {"scheduler": pipe.scheduler, **saved.schedulers(pipe.extras)}
    for name, scheduler in schedulers.items():
        files[Path(name, "scheduler_config.json")] = as_json(scheduler.config)
        index[name] = ["diffusers", scheduler.name]
    if pipe.safety is not None:
        files[Path("feature_extractor", "preprocessor_config.json")] = as_json(pipe.safety.feature_extractor.config)
        index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True}
    if pipe.recommended:
        files[Path(FILE)] = as_json(pipe.recommended.as_dict())
    files[Path("model_index.json")] = as_json(index)
    return files


def _library(network: Network) -> str:
    return "transformers" if network.stem == "model" else "diffusers"
