"""`load`: a checkpoint to a `Pipeline`, in three steps: resolve its source, describe it, fill it with weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from sega_jax.method import schedules
from sega_jax.method.arguments import declared_by
from sega_jax.method.checks import brief
from sega_jax.nn.safety import SafetyCheckerConfig, StableDiffusionSafetyChecker
from sega_jax.pipelines.adapters import lora_changes, new_words
from sega_jax.pipelines.components import as_module, as_scheduler, check_training
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import ADAPTERS, LoadOptions, pick_attention, pick_dtype
from sega_jax.pipelines.load_options import DEMO as DEMO
from sega_jax.pipelines.messages import collected, warn
from sega_jax.pipelines.network_sources import NetworkSource, find_network
from sega_jax.pipelines.pipeline import Pipeline
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
    """Loads a checkpoint of any family.

    DeepFloyd-IF's safety checker, which is another than Stable Diffusion's, and its watermark are not supported: its
    pictures are neither checked nor marked, and a warning says so.

    Raises:
        FileNotFoundError: there is no such folder or file.
        TypeError: the source is no path, the devices are none, or a component is something else.
        CheckpointError: the source is no checkpoint or cannot be fetched, or a file is missing, broken or does not
            fit.
        ValueError: an unknown dtype or attention, a config that is not supported, or a new word that the tokenizer has.
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
    """Where a checkpoint is, and how it is loaded."""

    source: Source
    folder: Path  # with all files that are needed
    devices: Devices
    dtype: np.dtype
    attention: str
    replaced: Mapping[str, Any]  # networks in place of the checkpoint's, None for none
    alone: Mapping[str, NetworkSource]  # networks that are read from files of their own
    tokenizer: Any  # in place of the checkpoint's; None for its own

    @property
    def configs(self) -> dict[str, Any]:
        """The configs of networks that come with their own."""
        return {part: one.config for part, one in self.alone.items() if one.config is not None}


def resolve(options: LoadOptions) -> Resolved:
    """Finds a checkpoint, checks the options against its family, and fetches the files that are needed.

    Raises:
        FileNotFoundError, TypeError, ValueError, CheckpointError: as `load`.
    """
    devices = options.devices if isinstance(options.devices, Devices) else Devices(options.devices)
    dtype = pick_dtype(options.dtype, devices)
    attention = pick_attention(options.attention, dtype, devices)
    given = options.replaced
    source = find(options.source, options.revision, options.config, options.prediction_type, given)
    check_adapters(source.system, {name: getattr(options, name) for name in ADAPTERS})
    source.check(options.variant, ema=options.ema, given=given)
    replaced, alone = _replaced(given, source.system, options.variant)
    if source.system.checkpoint.scheduler is None:
        for name in ("scheduler", "prediction_type"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"{name}={brief(value)}: {source.system.title} has a schedule of its own; leave it out"
                )
    readers = [part for part in source.system.text.parts if part in source.parts]
    without_readers = bool(readers) and all(part in replaced and replaced[part] is None for part in readers)
    reads = options.tokenizer is None and not without_readers
    without = [*replaced, *alone, *([] if options.safety_checker is True else [CHECKER])]
    # A network alone may leave its config to the checkpoint.
    configs_of = [part for part, network in alone.items() if network.config is None]
    if missing := [part for part in configs_of if part not in source.parts or not source.has_config(part)]:
        raise CheckpointError(
            f"{missing[0]}={str(given[missing[0]])!r} is a file without a config, and {source.name} has none of its"
            f" {missing[0]}; give a folder with config.json and the weights"
        )
    without = [part for part in without if part not in configs_of]
    folder = source.fetch(
        options.variant,
        without=without if reads else [*without, "tokenizer"],
        configs_of=configs_of,
        strict=all(network.variant is None for network in alone.values()),
    )
    tokenizer = options.tokenizer if options.tokenizer is not None or not reads else source.vocabulary()
    return Resolved(source, folder, devices, dtype, attention, replaced, alone, tokenizer)


def _replaced(
    given: Mapping[str, Any], system: System, variant: str | None
) -> tuple[dict[str, Any], dict[str, NetworkSource]]:
    """Returns the networks in place of the checkpoint's, None for none, and those that are to be read from files.

    Raises:
        TypeError, ValueError, FileNotFoundError: something else, or a network that the family does not have.
    """
    networks, file = system.checkpoint.networks, system.checkpoint.single_file
    replaced: dict[str, Any] = {}
    alone: dict[str, NetworkSource] = {}
    for part, value in given.items():
        if part not in networks:
            raise ValueError(f"{part} is given, which {system.title} does not have")
        if isinstance(value, str | os.PathLike):
            originals = () if file is None else file.networks.get(part, ())
            alone[part] = find_network(part, value, networks[part], originals, variant)
        elif value is False and networks[part].optional:
            replaced[part] = None
        else:
            replaced[part] = as_module(part, value, networks[part].module)
    return replaced, alone


class Description(NamedTuple):
    """What a checkpoint's folder holds besides the weights; the networks are without values."""

    system: System
    models: Any
    tokenizer: Any
    scheduler: schedules.Scheduler | None
    safety: Safety | None
    extras: Any

    @property
    def networks(self) -> dict[str, Any]:
        """All networks that are there, by the names of their folders."""
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
    """Reads the configs of a checkpoint; what is given in place of a part of it, as to `load`, is taken as it is.

    Args:
        folder: of the checkpoint.
        attention, scheduler, tokenizer, safety_checker: as of `load`.
        replaced: networks, or their configs, in place of the checkpoint's; None for none.

    Raises:
        CheckpointError: a file is missing, broken, or describes what is not supported.
        TypeError, ValueError: a scheduler is given and is none.
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
            raise TypeError(f"{system.title} has a schedule of its own; it takes no scheduler")
        own_files = [folder / name / "scheduler_config.json" for name in checkpoint.schedulers]
        own = next((read_json(path) for path in own_files if path.is_file()), None)
        scheduler = as_scheduler(scheduler, own)
        check_training(scheduler.name, own)
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
    return Description(system, models, tokenizer, scheduler, safety_checker, extras)


def _safety(folder: Path) -> Safety | None:
    """Returns the safety checker without values, and its preprocessing; None where the checkpoint has none."""
    name, part = listed(read_json(folder / "model_index.json"), CHECKER), folder / CHECKER
    if name is None:
        return None
    if not part.is_dir():
        warn(f"{folder} names a safety checker that it does not have: pictures go unchecked")
        return None
    try:
        if name != StableDiffusionSafetyChecker.__name__:
            raise ValueError(f"it is {name}, expected {StableDiffusionSafetyChecker.__name__}")
        config = SafetyCheckerConfig.from_dict(read_json(part / "config.json"))
        extractor = FeatureExtractor(folder / "feature_extractor", config.vision_config.image_size)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} has a safety checker that cannot be used; safety_checker=False leaves it out: {error}"
        ) from None
    return Safety(extractor, StableDiffusionSafetyChecker(config))


def fill_pipeline(options: LoadOptions, resolved: Resolved, found: Description) -> Pipeline:
    """Fills a described checkpoint with its weights, LoRAs and new words.

    Raises:
        TypeError, ValueError, CheckpointError: as `load`.
    """
    # Both are read before the weights, which take longer.
    changes = [] if options.lora is None else lora_changes(found.models, options.lora)
    files = options.textual_inversion
    words = [] if files is None else new_words(found.models, found.tokenizer, files)
    networks: dict[str, Any] = dict.fromkeys(found.models._fields)
    sampled, declarations = found.system.sampler.networks(found.models), dict[str, Any]()
    for part, module in found.networks.items():
        if part in resolved.replaced or (part == CHECKER and found.safety is options.safety_checker):
            networks[part] = resolved.devices.place(module)
        else:
            weights, declared = _opened(options, resolved, part, module)
            if module is sampled:  # the files of other networks may declare something about a UNet of their own
                declarations = declared
            networks[part] = filled(weights, module, resolved.dtype, resolved.devices)
    safety = found.safety and found.safety._replace(checker=networks.pop(CHECKER))
    models, tokenizer = added(merged(type(found.models)(**networks), changes), found.tokenizer, words)
    scheduler = found.scheduler
    if scheduler is not None:
        scheduler = _scheduler(options, resolved.source.name, scheduler, declarations)
    pipe = Pipeline(found.system, models, tokenizer, scheduler, resolved.devices, safety, found.extras)
    pipe.source = str(resolved.source.name)
    return pipe


def _opened(options: LoadOptions, resolved: Resolved, part: str, module: Any) -> tuple[Weights, dict[str, Any]]:
    """Opens the weights of a network. Returns them, and what their file declares about the schedule."""
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
    """Returns the scheduler with what the user says of it, or else the weight files. Warns where the two contradict."""
    contradicted = {}
    if isinstance(options.scheduler, schedules.Scheduler):
        # A whole config, not a class that takes the options of another over.
        contradicted = {name: value for name, value in declared.items() if scheduler.options.get(name) != value}
        declared = {}
    if options.prediction_type is not None:
        if declared.get("prediction_type", options.prediction_type) != options.prediction_type:
            contradicted["prediction_type"] = declared["prediction_type"]
        declared["prediction_type"] = options.prediction_type
    if contradicted:
        listed = " and ".join(f"{name}={value!r}" for name, value in contradicted.items())
        warn(f"{source} declares {listed}, which the arguments of load contradict; they are followed")
    if not declared:
        return scheduler
    config = scheduler.config | declared
    if defaults := config.get("_use_default_values"):
        # The user or the file chose these values, so another class of scheduler should take them over.
        config["_use_default_values"] = [name for name in defaults if name not in declared]
    return schedules.from_config(config, strict=False)


def filled(weights: Weights, module: Any, dtype: DTypeLike, devices: Devices) -> Any:
    """Returns a network with its weights on the devices, and closes them.

    Raises:
        CheckpointError: they are broken or do not fit.
    """
    with weights:
        return fill(module, weights, dtype, devices.place, warn)
