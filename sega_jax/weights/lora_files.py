"""Where LoRAs are: a file, a folder with one, or a repository on the hub.

A name on the hub is "owner/name", "owner/name/path/to/file.safetensors", or with a revision "owner/name@revision" and
"owner/name@revision/path/to/file.safetensors". What exists on this machine comes first.
"""

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sega_jax.text.files import CheckpointError, sha256
from sega_jax.weights import hub
from sega_jax.weights.lora_settings import CONFIG, settings_file
from sega_jax.weights.tensors import ENDINGS
from sega_jax.weights.torch_pickle import opened

# The names that diffusers and peft give their files; the first that is there is read.
_DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names that an error lists; it counts the others.
_LISTED = 20


def find(lora: str | os.PathLike[str]) -> Path:
    """Returns the file of a LoRA on this machine, which is fetched if it is on the hub.

    Raises:
        CheckpointError: there is no such file, or a folder or repository has none or several; the error lists them.
    """
    path = Path(os.path.expanduser(lora))
    name = on_hub(lora)
    if name is not None:
        return _fetched(name)[0]
    if os.fspath(lora) and os.path.isdir(path):
        return path / _chosen(str(path), _files(path))
    if not os.path.isfile(path):  # `Path.is_file` raises an error for names that are too long
        what = path if os.fspath(lora) else "lora=''"
        raise CheckpointError(f"{what} is missing; give a file, a folder, or owner/name on the hub")
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path} should have one of the endings {', '.join(ENDINGS)}; rename it if it is a LoRA")
    return path


def on_hub(lora: str | os.PathLike[str]) -> hub.Address | None:
    """Returns the repository and file that a name on the hub stands for; None for paths.

    Raises:
        ValueError: a web address of something else.
    """
    return None if os.path.exists(lora) else hub.address(os.fspath(lora))


def pinned(lora: str | os.PathLike[str], folder: Path = Path()) -> str:
    """Returns the whole path of a LoRA's file, or its name on the hub with commit and file, which stays the same LoRA
    wherever it is used later. A path at which there is nothing stays a path.

    Args:
        folder: relative paths start from it.

    Raises:
        CheckpointError: a folder or repository has no file, or several, or cannot be fetched.
    """
    path = Path(os.path.abspath(os.path.join(folder, os.path.expanduser(lora))))
    if os.path.isdir(path):
        return str(find(path))
    name = None if os.path.exists(path) else on_hub(lora)
    if name is None:
        return str(path)
    if name.path and _COMMIT.fullmatch(name.revision or ""):
        return str(name)
    return str(_fetched(name)[1])


def digest(path: str) -> str:
    """Returns the SHA-256 of a file that is here or on the hub, in hexadecimal digits. If peft's settings are next to a
    LoRA, it is of both.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be read.
    """
    file = Path(path) if on_hub(path) is None else find(path)
    own = sha256(file)
    if not (file.parent / CONFIG).is_file() or file.suffix not in ENDINGS:
        return own
    try:
        settings = settings_file(file, opened(file).shapes)
    except CheckpointError:  # it is no LoRA
        return own
    return own if settings is None else hashlib.sha256(f"{own} {sha256(settings)}".encode()).hexdigest()


def _fetched(name: hub.Address) -> tuple[Path, hub.Address]:
    """Returns the file that a name on the hub stands for, and its name with commit and file."""
    if name.path:
        return _fetched_file(name)
    known = [*_DIFFUSERS, *_PEFT, CONFIG]
    snapshot = hub.fetch(name.repository, known, name.revision)
    file = _named([one for one in known if (snapshot / one).is_file()])
    if file is None:
        there = hub.files(name.repository, snapshot.name)
        if there is None:
            there = _files(snapshot)
            if not any(one.endswith(ENDINGS) for one in there):
                raise CheckpointError(
                    f"{name}: the hub cannot be reached, and its cache has no LoRA of this repository; connect once"
                    " (and unset HF_HUB_OFFLINE), or give a file"
                )
        file = _chosen(str(name), there)
    return _fetched_file(hub.Address(name.repository, file, snapshot.name))


def _fetched_file(name: hub.Address) -> tuple[Path, hub.Address]:
    """Returns a file of a repository with the settings next to it, and its name with the commit."""
    if not name.path.endswith(ENDINGS):
        raise CheckpointError(f"{name} should have one of the endings {', '.join(ENDINGS)}")
    snapshot = hub.fetch(name.repository, [glob.escape(name.path), str(Path(name.path).parent / CONFIG)], name.revision)
    if not (snapshot / name.path).is_file():
        there = [one for one in hub.files(name.repository, name.revision) or () if one.endswith(ENDINGS)]
        listed = f"; it has {_list(there)}" if there else ", or it is not in the cache"
        raise CheckpointError(f"{name.repository} has no {name.path}{listed}; correct the name")
    return snapshot / name.path, name._replace(revision=snapshot.name)


def _files(folder: Path) -> list[str]:
    """Returns the names of the files in a folder and in its folders.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        own = [one.name for one in folder.iterdir() if one.is_file()] if folder.is_dir() else []
        return own + [str(one.relative_to(folder)) for one in folder.glob("*/*") if one.is_file()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from None


def _named(files: Sequence[str]) -> str | None:
    """Returns the file that diffusers or peft wrote, or None."""
    known = [*_DIFFUSERS, *(_PEFT if CONFIG in files else ())]
    return next((one for one in known if one in files), None)


def _chosen(where: str, files: Sequence[str]) -> str:
    """Returns the file with a LoRA in a folder or repository. Those in folders inside it are only listed in errors.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    weights = sorted(one for one in files if one.endswith(ENDINGS))
    outermost = [one for one in weights if "/" not in one]
    chosen = _named(files) or (outermost[0] if len(outermost) == 1 else None)
    if chosen is not None:
        return chosen
    if outermost:
        what = f"has several files that may be the LoRA, {_list(outermost)}"
    elif weights:
        what = f"has such files in its folders only, {_list(weights)}"
    else:
        what = f"has no file with a LoRA; it has {_list(files) or 'nothing'}"
    raise CheckpointError(f"{where} {what}; name the file, as in {where}/{(weights or ['style.safetensors'])[0]}")


def _list(names: Sequence[str]) -> str:
    """Returns the first names in words, and how many others there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more
