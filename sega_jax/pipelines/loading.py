"""Loads checkpoints: `resolve` finds the files, `describe` reads the configs, and `fill_pipeline` reads the weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from sega_jax.method import schedules
from sega_jax.method.arguments import declared_by
from sega_jax.method.naming import assignment, name_of
from sega_jax.nn.safety import SafetyCheckerConfig, StableDiffusionSafetyChecker
from sega_jax.pipelines.adapters import lora_changes, new_words
from sega_jax.pipelines.components import as_module, as_scheduler, check_training
from sega_jax.pipelines.device_defaults import pick_attention, pick_dtype
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import ADAPTERS, LoadOptions
from sega_jax.pipelines.load_options import DEMO as DEMO
from sega_jax.pipelines.messages import collected, warn
from sega_jax.pipelines.network_sources import NetworkSource, find_network
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.recommended import Recommended
from sega_jax.pipelines.recommended import read as read_recommended
from sega_jax.pipelines.safety import FeatureExtractor, Safety
from sega_jax.pipelines.sources import Source, find
from sega_jax.systems.base import System, listed
from sega_jax.systems.registry import CHECKER, check_adapters, recognise
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights import single_file, tensors
from sega_jax.weights.lora import merged
from sega_jax.weights.pull import fill
from sega_jax.weights.tensors import Weights
from sega_jax.weights.textual_inversion import added


@declared_by(LoadOptions, "sega_jax.load")
def load(options: LoadOptions) -> Pipeline:
    """Loads a checkpoint of any supported family as a `Pipeline`.

    The family is recognised from the checkpoint's files. DeepFloyd-IF's own safety checker and watermark are not
    supported; a warning says that its pictures are neither checked nor watermarked.

    Returns:
        The pipeline. Call it with a prompt and edits to generate pictures.

    Raises:
        FileNotFoundError: The folder or file does not exist.
        TypeError: An option has the wrong type.
        CheckpointError: The source is not a checkpoint or cannot be fetched, or a file is missing or broken, or does
            not fit the checkpoint.
        ValueError: The dtype, attention, scheduler or config is not supported, an option does not apply to this
            checkpoint, or the tokenizer already contains one of the new words.

    Example:
        >>> import sega_jax
        >>> pipe = sega_jax.load(dtype="float32", scheduler="EulerDiscreteScheduler")
        >>> pipe.scheduler.name
        'EulerDiscreteScheduler'
        >>> pipe("a face", steps=2, output="latent", progress=False).images.shape
        (1, 32, 32, 4)
    """
    with collected():
        resolved = resolve(options)
        description = describe(
            resolved.folder,
            resolved.attention,
            options.scheduler,
            resolved.tokenizer,
            options.safety_checker,
            resolved.configs | dict(resolved.replaced),
        )
        notice = resolved.source.system.checkpoint.notice(resolved.source.model_index)
        if options.safety_checker is True and notice is not None:
            warn(f"{resolved.folder} {notice}")
        return fill_pipeline(options, resolved, description)


class Resolved(NamedTuple):
    """The location of a checkpoint, and the settings for loading it."""

    source: Source
    folder: Path  # the folder that contains all needed files
    devices: Devices
    dtype: np.dtype
    attention: str
    replaced: Mapping[str, Any]  # {name: replacement network, or None to omit the network}
    alone: Mapping[str, NetworkSource]  # {name: files of a replacement network}
    tokenizer: Any  # a replacement for the checkpoint's tokenizer; None keeps the original

    @property
    def configs(self) -> dict[str, Any]:
        """The configs that are stored next to the files in `alone`, as {name: config}."""
        return {part: one.config for part, one in self.alone.items() if one.config is not None}


def resolve(options: LoadOptions) -> Resolved:
    """Finds a checkpoint, checks the options against its family, and fetches the needed files.

    Raises:
        FileNotFoundError, TypeError, ValueError, CheckpointError: As for `load`.
    """
    devices = options.devices if isinstance(options.devices, Devices) else Devices(options.devices)
    dtype = pick_dtype(options.dtype, devices)
    attention = pick_attention(options.attention, dtype, devices)
    replacements = options.replaced
    source = find(options.source, options.revision, options.config, options.prediction_type, replacements)
    check_adapters(source.system, {name: getattr(options, name) for name in ADAPTERS})
    source.check(options.variant, ema=options.ema, given=replacements)
    replaced, alone = _replaced(replacements, source.system, options.variant)
    if source.system.checkpoint.scheduler is None:
        for name in ("scheduler", "prediction_type"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{assignment(name, value)}: {source.system.title} has its own schedule; leave it out")
    readers = [part for part in source.system.text.parts if part in source.parts]
    omits_readers = bool(readers) and all(part in replaced and replaced[part] is None for part in readers)
    needs_tokenizer = options.tokenizer is None and not omits_readers
    without = [*replaced, *alone, *([] if options.safety_checker is True else [CHECKER])]
    # For a weight file without a config, the checkpoint's config is used.
    configs_of = [part for part, network in alone.items() if network.config is None]
    if missing := [part for part in configs_of if part not in source.parts or not source.has_config(part)]:
        raise CheckpointError(
            f"{assignment(missing[0], str(replacements[missing[0]]))} is a file without a config, and {source.name}"
            f" has no {missing[0]} config; give a folder with config.json and the weights"
        )
    without = [part for part in without if part not in configs_of]
    folder = source.fetch(
        options.variant,
        without=without if needs_tokenizer else [*without, "tokenizer"],
        configs_of=configs_of,
        strict=all(network.variant is None for network in alone.values()),
    )
    tokenizer = options.tokenizer if options.tokenizer is not None or not needs_tokenizer else source.vocabulary()
    return Resolved(source, folder, devices, dtype, attention, replaced, alone, tokenizer)


def _replaced(
    replacements: Mapping[str, Any], system: System, variant: str | None
) -> tuple[dict[str, Any], dict[str, NetworkSource]]:
    """Separates replacements into networks (or None, which omits a network) and files to read.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: A replacement is neither a network nor a network's
            files, or the family has no network with that name.
    """
    networks, file = system.checkpoint.networks, system.checkpoint.single_file
    replaced: dict[str, Any] = {}
    alone: dict[str, NetworkSource] = {}
    for part, value in replacements.items():
        if part not in networks:
            raise ValueError(f"{name_of(part)} is given, but {system.title} has no such network; leave it out")
        if isinstance(value, str | os.PathLike):
            originals = () if file is None else file.networks.get(part, ())
            alone[part] = find_network(part, value, networks[part], originals, variant)
        elif value is False and networks[part].optional:
            replaced[part] = None
        else:
            replaced[part] = as_module(part, value, networks[part].module)
    return replaced, alone


class Description(NamedTuple):
    """The contents of a checkpoint's folder, without the weights. The networks have shapes instead of parameters."""

    system: System
    models: Any
    tokenizer: Any
    scheduler: schedules.Scheduler | None
    safety: Safety | None
    extras: Any
    recommended: Recommended = Recommended()

    @property
    def networks(self) -> dict[str, Any]:
        """All networks, including the safety checker, as {folder: network}."""
        checker = None if self.safety is None else self.safety.checker
        return {part: module for part, module in {**self.models._asdict(), CHECKER: checker}.items() if module}


def describe(
    folder: Path,
    attention: str = "xla",
    scheduler: Any = None,
    tokenizer: Any = None,
    safety_checker: bool | Safety | None = True,
    replaced: Mapping[str, Any] = MappingProxyType({}),
) -> Description:
    """Reads a checkpoint's configs, but not its weights.

    Args:
        folder: The checkpoint's folder.
        attention, scheduler, tokenizer, safety_checker: As for `load`.
        replaced: {name: replacement network or config, or None to omit the network}.

    Raises:
        CheckpointError: A file is missing or broken, or it describes an unsupported component.
        TypeError, ValueError: The scheduler is invalid or does not fit the checkpoint.
    """
    system, index = recognise(folder, replaced), read_json(folder / "model_index.json")
    checkpoint = system.checkpoint
    absent = {part: None for part, one in checkpoint.networks.items() if one.optional and listed(index, part) is None}
    replaced = absent | dict(replaced)
    configs = {
        part: replaced[part] if part in replaced else read_json(folder / part / "config.json")
        for part in checkpoint.networks
    }
    if scheduler is not None:
        if checkpoint.scheduler is None:
            raise TypeError(f"{system.title} has its own schedule and takes no scheduler; leave it out")
        config_files = [folder / name / "scheduler_config.json" for name in checkpoint.schedulers]
        original = next((read_json(path) for path in config_files if path.is_file()), None)
        scheduler = as_scheduler(scheduler, original)
        check_training(scheduler.name, original)
    try:
        if checkpoint.scheduler is not None:
            scheduler = scheduler or checkpoint.scheduler(folder)
        models = checkpoint.build(**configs, attention=attention)
        extras = checkpoint.extras(folder, index, models)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    tokenizer = checkpoint.tokenizer(folder, models, tokenizer)
    if not isinstance(safety_checker, Safety):
        safety_checker = _safety(folder) if safety_checker and checkpoint.notice(index) is None else None
    return Description(system, models, tokenizer, scheduler, safety_checker, extras, read_recommended(folder, system))


def _safety(folder: Path) -> Safety | None:
    """Reads the configs of the safety checker and its preprocessing. Returns None if the checkpoint has no checker."""
    name, part = listed(read_json(folder / "model_index.json"), CHECKER), folder / CHECKER
    if name is None:
        return None
    if not part.is_dir():
        warn(f"{folder} lists a safety checker but has no folder for it, so pictures are not checked")
        return None
    try:
        if name != StableDiffusionSafetyChecker.__name__:
            raise ValueError(f"it is {name}, expected {StableDiffusionSafetyChecker.__name__}")
        config = SafetyCheckerConfig.from_dict(read_json(part / "config.json"))
        extractor = FeatureExtractor(folder / "feature_extractor", config.vision_config.image_size)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} has an unusable safety checker; give {assignment('safety_checker', False)} to load without it:"
            f" {error}"
        ) from None
    return Safety(extractor, StableDiffusionSafetyChecker(config))


def fill_pipeline(options: LoadOptions, resolved: Resolved, description: Description) -> Pipeline:
    """Reads the weights of a described checkpoint, and adds LoRAs and new words.

    Raises:
        TypeError, ValueError, CheckpointError: As for `load`.
    """
    # These small files are checked first, because reading the weights takes longer.
    changes = [] if options.lora is None else lora_changes(description.models, options.lora)
    files = options.textual_inversion
    words = [] if files is None else new_words(description.models, description.tokenizer, files)
    networks: dict[str, Any] = dict.fromkeys(description.models._fields)
    sampled, declarations = description.system.sampler.networks(description.models), dict[str, Any]()
    for part, module in description.networks.items():
        if part in resolved.replaced or (part == CHECKER and description.safety is options.safety_checker):
            networks[part] = resolved.devices.place(module)
        else:
            weights, file_declarations = _opened(options, resolved, part, module)
            if module is sampled:  # files of other networks may declare options for a UNet that is not loaded
                declarations = file_declarations
            networks[part] = filled(weights, module, resolved.dtype, resolved.devices)
    safety = description.safety and description.safety._replace(checker=networks.pop(CHECKER))
    models, tokenizer = added(merged(type(description.models)(**networks), changes), description.tokenizer, words)
    scheduler = description.scheduler
    if scheduler is not None:
        scheduler = _scheduler(options, resolved.source.name, scheduler, declarations)
    filled_parts = {"models": models, "tokenizer": tokenizer, "scheduler": scheduler, "safety": safety}
    pipe = Pipeline(**description._asdict() | filled_parts | {"devices": resolved.devices})
    pipe.source = str(resolved.source.name)
    return pipe


def _opened(options: LoadOptions, resolved: Resolved, part: str, module: Any) -> tuple[Weights, dict[str, Any]]:
    """Opens a network's weights, and returns them with the scheduler options that their file declares."""
    network, source = resolved.alone.get(part), resolved.source
    if network is None:
        weights = source.weights(part, module, options.variant, ema=options.ema)
        return weights, {**source.declared, **tensors.declared(weights.spare)}
    weights = network.open(module)
    if network.file is None:
        return weights, tensors.declared(weights.spare)
    return weights, single_file.declared(network.file, weights.spare)


def _scheduler(
    options: LoadOptions, source: str | Path, scheduler: schedules.Scheduler, declared: dict[str, Any]
) -> schedules.Scheduler:
    """Applies the user's scheduler options or, if there are none, those in the weight files; warns if they disagree."""
    contradicted = {}
    if isinstance(options.scheduler, schedules.Scheduler):
        # The user passed a complete config, which takes precedence over the files.
        contradicted = {name: value for name, value in declared.items() if scheduler.options.get(name) != value}
        declared = {}
    if options.prediction_type is not None:
        if declared.get("prediction_type", options.prediction_type) != options.prediction_type:
            contradicted["prediction_type"] = declared["prediction_type"]
        declared["prediction_type"] = options.prediction_type
    if contradicted:
        contradictions = " and ".join(f"{name}={value!r}" for name, value in contradicted.items())
        warn(f"{source} declares {contradictions}, but the given options differ and take precedence")
    if not declared:
        return scheduler
    config = scheduler.config | declared
    if defaults := config.get("_use_default_values"):
        # The user or the file chose these values, so a different scheduler class must adopt them.
        config["_use_default_values"] = [name for name in defaults if name not in declared]
    return schedules.from_config(config, strict=False)


def filled(weights: Weights, module: Any, dtype: DTypeLike, devices: Devices) -> Any:
    """Loads a network's weights onto the devices, and closes the weight files.

    Raises:
        CheckpointError: The weights are broken or do not fit the network.
    """
    with weights:
        return fill(module, weights, dtype, devices.place, warn)
