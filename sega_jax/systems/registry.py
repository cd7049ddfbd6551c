"""Which families there are, and which of them a checkpoint belongs to.

Other packages add families by `register`, or by an entry point of the group `sega_jax.systems` that names a `System`:

    [project.entry-points."sega_jax.systems"]
    my_family = "my_package:SYSTEM"
"""

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sega_jax.method.arguments import arguments
from sega_jax.method.checks import brief
from sega_jax.systems import deepfloyd, paella, sdxl, stable_diffusion, upscaler
from sega_jax.systems.adapters import AdapterNames
from sega_jax.systems.base import Checkpoint, Sampler, System, TextReader, listed
from sega_jax.systems.call import Call
from sega_jax.systems.lora_kinds import FOREIGN, LoraKind
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights.lora import Families, LayerSizes
from sega_jax.weights.single_file import Shapes, SingleFile, resemblance

GROUP = "sega_jax.systems"
CHECKER = "safety_checker"

_BUILT_IN = (
    stable_diffusion.SYSTEM,
    upscaler.SYSTEM,
    sdxl.SYSTEM,
    deepfloyd.STAGE_1,
    deepfloyd.STAGE_2,
    paella.SYSTEM,
)
_registered: dict[str, System] = {}
_installed_are_known = False


def register(system: System) -> System:
    """Adds a family, or replaces one of the same name. `recognise` asks families that were added later first.

    Raises:
        TypeError: it is no `System`, or a part of it is of another type.
    """
    if not isinstance(system, System):
        raise TypeError(f"register({brief(system)}) should be given a sega_jax.System")
    for name, kind in {
        "name": str,
        "title": str,
        "checkpoint": Checkpoint,
        "text": TextReader,
        "sampler": Sampler,
    }.items():
        if not isinstance(part := getattr(system, name), kind) or part == "":
            raise TypeError(f"the family's {name}={brief(part)} should be a {kind.__name__}")
    if not (isinstance(system.call, type) and issubclass(system.call, Call) and dataclasses.is_dataclass(system.call)):
        raise TypeError(
            f"the family {system.name}'s call={brief(system.call)} should be a dataclass, a subclass of Call"
        )
    systems()  # installed families come first, so that this one replaces one of the same name
    _registered.pop(system.name, None)
    _registered[system.name] = system
    return system


def unregister(name: str) -> None:
    """Removes a family that `register` added; one of the library's that it replaced is there again."""
    _registered.pop(name, None)


def systems() -> Mapping[str, System]:
    """Returns all families by their names: the library's, installed packages', and those that were registered."""
    global _installed_are_known
    if not _installed_are_known:
        _installed_are_known = True
        for entry in importlib.metadata.entry_points(group=GROUP):
            try:
                register(entry.load())
            except Exception as error:  # another package's fault should not stop those who do not use it
                warnings.warn(f"the family {entry.name} of {entry.value} cannot be used: {error}", stacklevel=2)
    return {system.name: system for system in _BUILT_IN} | _registered


def named(name: str) -> System:
    """Returns the family of this name.

    Raises:
        ValueError: there is none.
    """
    known = systems()
    if name not in known:
        raise ValueError(f"{name!r} is no family of checkpoints here; there are {', '.join(known)}")
    return known[name]


def starting_systems() -> list[System]:
    """Returns the families that start a cascade."""
    return [system for system in systems().values() if system.stages]


def recognise(folder: Path, given: Collection[str] = ()) -> System:
    """Returns the family of a folder's checkpoint, by its model_index.json; a family that was registered later is
    asked first.

    Args:
        given: networks that come from elsewhere, which the checkpoint may lack.

    Raises:
        CheckpointError: the folder has no index, or one of another kind of checkpoint.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        part = (folder / "config.json").is_file()
        hint = "; it looks like one part of a checkpoint, give the folder above" if part else ""
        raise CheckpointError(f"{folder} has no model_index.json, so it is no checkpoint in diffusers layout{hint}")
    entries = read_json(index)
    system = next((one for one in reversed(list(systems().values())) if _is_of(one, entries)), None)
    if system is None:
        raise CheckpointError(f"{folder} is of no family here; there are {', '.join(systems())}")
    if reason := system.checkpoint.refuse(entries):
        raise CheckpointError(f"{folder} {reason}")
    for part, network in system.checkpoint.networks.items():
        found, expected = listed(entries, part), network.module.__name__
        if found != expected and part not in given and not (found is None and network.optional):
            raise CheckpointError(
                f"{folder} is a {entries.get('_class_name')} whose {part} is {found or 'missing'}; expected"
                f" {system.title}, with {expected} in the folder {part}"
            )
    return system


def _is_of(system: System, index: Mapping[str, Any]) -> bool:
    try:
        return bool(system.checkpoint.recognise(index))
    except Exception as error:  # a family's fault should not stop those whose checkpoint is another's
        warnings.warn(f"{system.title} cannot tell whether a checkpoint is its own: {error!r}", stacklevel=2)
        return False


def single_files() -> list[SingleFile]:
    """Returns the descriptions of all families' single files; one of a family that was registered later comes first."""
    found = [system.checkpoint.single_file for system in reversed(list(systems().values()))]
    return [file for file in found if file is not None]


def recognise_file(path: Path, shapes: Shapes) -> SingleFile:
    """Returns the description of a single file by the names and shapes of its tensors.

    Raises:
        CheckpointError: no family has such files, or the file is a relative that is not supported.
    """
    known = single_files()
    for file in known:
        if file.recognise(shapes):
            file.refuse(path, shapes)
            return file
    names = " or ".join(file.name for file in reversed(known))
    raise CheckpointError(f"{path} is no single file of {names}: {resemblance(shapes)}")


def adapters_of(models: Any) -> AdapterNames:
    """Returns the names of networks in adapter files, which are empty for families without adapters. Of families with
    adapters whose networks are of one type, the one that was registered last decides."""
    system = _adapted(models)
    return AdapterNames() if system is None else system.checkpoint.adapters


def _adapted(models: Any) -> System | None:
    for system in reversed(list(systems().values())):
        if type(models) is system.checkpoint.models and system.checkpoint.adapters is not None:
            return system
    return None


def lora_families(models: Any) -> Families:
    """Returns how to tell which family a LoRA is of, and which the networks of a checkpoint are of."""
    system = _adapted(models)
    known = [one.checkpoint.adapters for one in systems().values() if one.checkpoint.adapters is not None]
    kinds = [*FOREIGN, *(kind for names in known for kind in names.kinds)]
    own = () if system is None else system.checkpoint.adapters.kinds
    title = "of another family" if system is None else system.title

    def first(kinds: Iterable[LoraKind], sizes: LayerSizes) -> str | None:
        return next((kind.title for kind in kinds if kind.recognise(sizes)), None)

    return Families(lambda sizes: first(kinds, sizes), lambda sizes: first(own, sizes) or title)


def families_with(argument: str) -> list[str]:
    """Returns the titles of the families whose calls have an argument of this name."""
    return [system.title for system in systems().values() if argument in arguments(system.call)]


def in_words(titles: Sequence[str]) -> str:
    """Lists titles in words: "A, B and C"."""
    return " and ".join([", ".join(titles[:-1]), titles[-1]] if len(titles) > 1 else titles)


def adapter_refusal(system: System, option: str) -> str | None:
    """Returns why a family takes no LoRA ("lora") or no new word ("textual_inversion"); None where it takes them."""
    names = system.checkpoint.adapters or AdapterNames()
    if option == "lora" and not names.lora:
        return f"LoRAs have no names for the layers of {system.title}"
    if option == "textual_inversion" and names.words is None:
        return f"textual inversion has no vectors for the text encoder of {system.title}"
    return None


def check_adapters(system: System, given: Mapping[str, Any], what: Callable[[str], str] = str) -> None:
    """Checks that a family takes the adapters that are given, by "lora" and "textual_inversion"; None is none.

    Args:
        what: the name of the option -> its name for people.

    Raises:
        ValueError: it does not take them.
    """
    for option, value in given.items():
        if value is not None and (reason := adapter_refusal(system, option)):
            takers = in_words([one.title for one in systems().values() if adapter_refusal(one, option) is None])
            raise ValueError(f"{what(option)} is given, but {reason}; leave it out. It is for {takers}")


def weight_stem(system: System, part: str) -> str:
    """Returns the name of a network's weight file in diffusers layout, without ending, by its folder."""
    return "model" if part == CHECKER else system.checkpoint.networks[part].stem
