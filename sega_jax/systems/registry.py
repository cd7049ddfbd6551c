"""The registry of families, and functions that recognise a checkpoint's family.

Other packages add families with `register`, or with an entry point that names a `System`, in the group
`sega_jax.systems`:

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
from sega_jax.method.naming import name_of
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
    """Registers a family and returns it; a family with the same name is replaced.

    When a checkpoint is loaded, the families' `recognise` functions are tried in reverse order of registration.

    Raises:
        TypeError: The value is not a `System`, or one of its parts has the wrong type.

    Example:
        >>> import sega_jax
        >>> system = sega_jax.load().system
        >>> sega_jax.register(system._replace(title="my variant of Stable Diffusion")).title
        'my variant of Stable Diffusion'
        >>> sega_jax.register(system).title  # replaces the variant, which has the same name
        'Stable Diffusion 1.x or 2.x'
    """
    if not isinstance(system, System):
        raise TypeError(f"register got {brief(system)}, expected a sega_jax.System")
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
    systems()  # loads installed families first, so that the new family replaces an installed one with the same name
    _registered.pop(system.name, None)
    _registered[system.name] = system
    return system


def unregister(name: str) -> None:
    """Removes a family that `register` added, and restores the built-in family that it replaced, if any."""
    _registered.pop(name, None)


def systems() -> Mapping[str, System]:
    """Returns {name: family} for all built-in, installed and registered families."""
    global _installed_are_known
    if not _installed_are_known:
        _installed_are_known = True
        for entry in importlib.metadata.entry_points(group=GROUP):
            try:
                register(entry.load())
            except Exception as error:  # a broken package must not affect the other families
                warnings.warn(f"the family {entry.name} ({entry.value}) cannot be loaded: {error}", stacklevel=2)
    return {system.name: system for system in _BUILT_IN} | _registered


def named(name: str) -> System:
    """Returns the family with this name.

    Raises:
        ValueError: There is no such family.
    """
    known = systems()
    if name not in known:
        raise ValueError(f"{name!r} is not a known family of checkpoints; the families are {', '.join(known)}")
    return known[name]


def starting_systems() -> list[System]:
    """Returns the families that can be the first stage of a cascade."""
    return [system for system in systems().values() if system.stages]


def recognise(folder: Path, given: Collection[str] = ()) -> System:
    """Returns the family of the checkpoint in a folder, according to its model_index.json.

    The family that was registered last is tried first.

    Args:
        given: Networks that the checkpoint may lack, because they are loaded from elsewhere.

    Raises:
        CheckpointError: The folder has no model_index.json, or the checkpoint belongs to no family or is not supported.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        part = (folder / "config.json").is_file()
        hint = "; it looks like one part of a checkpoint; give its parent folder"
        if not part:
            hint = "; give the folder that contains model_index.json, unet, vae and text_encoder, or a single file"
        raise CheckpointError(f"{folder} has no model_index.json, so it is not a checkpoint in diffusers layout{hint}")
    entries = read_json(index)
    system = next((one for one in reversed(list(systems().values())) if _recognises(one, entries)), None)
    if system is None:
        raise CheckpointError(f"{folder} belongs to no known family; the families are {', '.join(systems())}")
    if reason := system.checkpoint.refuse(entries):
        raise CheckpointError(f"{folder} {reason}")
    for part, network in system.checkpoint.networks.items():
        actual, expected = listed(entries, part), network.module.__name__
        if actual != expected and part not in given and not (actual is None and network.optional):
            raise CheckpointError(
                f"{folder} is a {entries.get('_class_name')} whose {part} is {actual or 'missing'}; expected"
                f" {system.title}, with {expected} in the folder {part}"
            )
    return system


def _recognises(system: System, index: Mapping[str, Any]) -> bool:
    try:
        return bool(system.checkpoint.recognise(index))
    except Exception as error:  # a broken family should not stop the loading of other families' checkpoints
        warnings.warn(f"{system.title} failed to check whether a checkpoint belongs to it: {error!r}", stacklevel=2)
        return False


def single_files() -> list[SingleFile]:
    """Returns the families' descriptions of their single files; the family that was registered last comes first."""
    files = [system.checkpoint.single_file for system in reversed(list(systems().values()))]
    return [file for file in files if file is not None]


def recognise_file(path: Path, shapes: Shapes) -> SingleFile:
    """Returns the single-file description that fits the names and shapes of a file's tensors.

    Raises:
        CheckpointError: The file belongs to no family, or is an unsupported variant.
    """
    known = single_files()
    for file in known:
        if file.recognise(shapes):
            file.refuse(path, shapes)
            return file
    names = " or ".join(file.name for file in reversed(known))
    raise CheckpointError(f"{path} is not a single-file checkpoint of {names}: {resemblance(shapes)}")


def adapters_of(models: Any) -> AdapterNames:
    """Returns the names that LoRA and textual-inversion files use for a family's networks.

    The result is empty if the family supports neither. If several families with adapters use the same type for
    `models`, the family registered last is chosen.
    """
    system = _family_with_adapters(models)
    return AdapterNames() if system is None else system.checkpoint.adapters


def _family_with_adapters(models: Any) -> System | None:
    for system in reversed(list(systems().values())):
        if type(models) is system.checkpoint.models and system.checkpoint.adapters is not None:
            return system
    return None


def lora_families(models: Any) -> Families:
    """Returns two functions: the first names a LoRA's family, and the second names a checkpoint's family.

    Both take the sizes of all layers.
    """
    system = _family_with_adapters(models)
    adapters = [one.checkpoint.adapters for one in systems().values() if one.checkpoint.adapters is not None]
    kinds = [*FOREIGN, *(kind for names in adapters for kind in names.kinds)]
    own = () if system is None else system.checkpoint.adapters.kinds
    title = "of another family" if system is None else system.title

    def first(kinds: Iterable[LoraKind], sizes: LayerSizes) -> str | None:
        return next((kind.title for kind in kinds if kind.recognise(sizes)), None)

    return Families(lambda sizes: first(kinds, sizes), lambda sizes: first(own, sizes) or title)


def families_with(argument: str) -> list[str]:
    """Returns the titles of the families whose calls take the given argument."""
    return [system.title for system in systems().values() if argument in arguments(system.call)]


def in_words(titles: Sequence[str]) -> str:
    """Joins titles into a phrase such as "A, B and C"."""
    return " and ".join([", ".join(titles[:-1]), titles[-1]] if len(titles) > 1 else titles)


def adapter_refusal(system: System, option: str) -> str | None:
    """Returns a message if a family does not support an option ("lora" or "textual_inversion"), otherwise None."""
    names = system.checkpoint.adapters or AdapterNames()
    if option == "lora" and not names.lora:
        return f"{system.title} does not support LoRA"
    if option == "textual_inversion" and names.words is None:
        return f"{system.title} does not support textual inversion"
    return None


def check_adapters(system: System, given: Mapping[str, Any], what: Callable[[str], str] = name_of) -> None:
    """Checks that a family supports the given adapters.

    Args:
        given: {option: value} for "lora" and "textual_inversion"; None means that the option is not used.
        what: A function from an option's name to the name shown in error messages.

    Raises:
        ValueError: The family does not support an option.
    """
    for option, value in given.items():
        if value is not None and (reason := adapter_refusal(system, option)):
            supporters = in_words([one.title for one in systems().values() if adapter_refusal(one, option) is None])
            raise ValueError(f"{what(option)} is given, but {reason}; leave it out. It is supported by {supporters}")


def weight_stem(system: System, part: str) -> str:
    """Returns the name (without extension) of a network's weight file in diffusers layout."""
    return "model" if part == CHECKER else system.checkpoint.networks[part].stem
