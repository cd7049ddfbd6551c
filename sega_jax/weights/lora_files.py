"""Finds a LoRA's file, given its path, a folder that contains it, or a name on the hub.

A name on the hub is "owner/name" or "owner/name/path/to/file.safetensors", optionally with a revision, as in
"owner/name@revision" and "owner/name@revision/path/to/file.safetensors". Local paths take precedence.
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

# The file names that diffusers and peft use. The first file that exists is read.
_DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The maximum number of names that an error message lists. The rest are only counted.
_LISTED = 20


def find(lora: str | os.PathLike[str]) -> Path:
    """Returns the local path of a LoRA's file. Downloads the file if it is on the hub.

    Raises:
        CheckpointError: the file does not exist, or a folder or repository does not contain exactly one LoRA. The error
            message lists the files that were found there.
    """
    path = Path(os.path.expanduser(lora))
    name = on_hub(lora)
    if name is not None:
        return _fetched(name)[0]
    if os.fspath(lora) and os.path.isdir(path):
        return path / _chosen(str(path), _files(path))
    if not os.path.isfile(path):  # `Path.is_file` raises an error if a name is too long
        source = path if os.fspath(lora) else "lora=''"
        raise CheckpointError(f"{source} is missing; give a file, a folder, or owner/name on the hub")
    if path.suffix not in ENDINGS:
        raise CheckpointError(
            f"{path} should have one of the extensions {', '.join(ENDINGS)}; rename it if it is a LoRA"
        )
    return path


def on_hub(lora: str | os.PathLike[str]) -> hub.Address | None:
    """Parses a name on the hub. Returns None for existing local paths and for names of any other form.

    Raises:
        ValueError: `lora` is a web address that is not a model's page on the hub.
    """
    return None if os.path.exists(lora) else hub.address(os.fspath(lora))


def pinned(lora: str | os.PathLike[str], folder: Path = Path()) -> str:
    """Returns a name that always identifies the same LoRA.

    The name is the absolute path of a local file, or "owner/name@commit/file" for a file on the hub. A local path need
    not exist.

    Args:
        lora: a file, a folder or a name on the hub.
        folder: the folder that relative paths start from.

    Raises:
        CheckpointError: a folder or repository does not contain exactly one LoRA, or the LoRA cannot be downloaded.
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
    """Returns the SHA-256 digest of a local file or of a file on the hub, in hexadecimal.

    If peft's settings file is in the same folder as the LoRA, the digest covers both files.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or cannot be read.
    """
    file = Path(path) if on_hub(path) is None else find(path)
    checksum = sha256(file)
    if not (file.parent / CONFIG).is_file() or file.suffix not in ENDINGS:
        return checksum
    try:
        settings = settings_file(file, opened(file).shapes)
    except CheckpointError:  # the file is not a LoRA
        return checksum
    return checksum if settings is None else hashlib.sha256(f"{checksum} {sha256(settings)}".encode()).hexdigest()


def _fetched(name: hub.Address) -> tuple[Path, hub.Address]:
    """Downloads the file that a name refers to. Returns its local path and its full name with commit and path."""
    if name.path:
        return _fetched_file(name)
    known = [*_DIFFUSERS, *_PEFT, CONFIG]
    snapshot = hub.fetch(name.repository, known, name.revision)
    file = _named([candidate for candidate in known if (snapshot / candidate).is_file()])
    if file is None:
        available = hub.files(name.repository, snapshot.name)
        if available is None:
            available = _files(snapshot)
            if not any(file.endswith(ENDINGS) for file in available):
                raise CheckpointError(
                    f"{name}: the hub cannot be reached, and the cache has no LoRA from this repository; connect to the"
                    " internet once (and unset HF_HUB_OFFLINE), or give a local file"
                )
        file = _chosen(str(name), available)
    return _fetched_file(hub.Address(name.repository, file, snapshot.name))


def _fetched_file(name: hub.Address) -> tuple[Path, hub.Address]:
    """Downloads a file and the settings next to it. Returns the file's path, and its name with the commit."""
    if not name.path.endswith(ENDINGS):
        raise CheckpointError(f"{name} should have one of the extensions {', '.join(ENDINGS)}; name a different file")
    snapshot = hub.fetch(name.repository, [glob.escape(name.path), str(Path(name.path).parent / CONFIG)], name.revision)
    if not (snapshot / name.path).is_file():
        available = [file for file in hub.files(name.repository, name.revision) or () if file.endswith(ENDINGS)]
        listed = f"; it has {_list(available)}" if available else ", or it is not in the cache"
        raise CheckpointError(f"{name.repository} has no {name.path}{listed}; correct the name")
    return snapshot / name.path, name._replace(revision=snapshot.name)


def _files(folder: Path) -> list[str]:
    """Returns the relative paths of the files in a folder and in its direct subfolders.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        return names + [str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file()]
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error.strerror}); correct its permissions, or give another folder"
        ) from None


def _named(files: Sequence[str]) -> str | None:
    """Returns the first file with a name that diffusers or peft uses, or None."""
    known = [*_DIFFUSERS, *(_PEFT if CONFIG in files else ())]
    return next((name for name in known if name in files), None)


def _chosen(where: str, files: Sequence[str]) -> str:
    """Returns the LoRA file in a folder or repository. Error messages also list files in subfolders.

    Raises:
        CheckpointError: there is no such file, or there are several.
    """
    weights = sorted(file for file in files if file.endswith(ENDINGS))
    outermost = [file for file in weights if "/" not in file]
    chosen = _named(files) or (outermost[0] if len(outermost) == 1 else None)
    if chosen is not None:
        return chosen
    if outermost:
        problem = f"has several files that could be the LoRA: {_list(outermost)}"
    elif weights:
        problem = f"has weight files only in its subfolders: {_list(weights)}"
    else:
        problem = f"has no LoRA; it contains {_list(files) or 'nothing'}"
    raise CheckpointError(
        f"{where} {problem}; name the file, for example {where}/{(weights or ['style.safetensors'])[0]}"
    )


def _list(names: Sequence[str]) -> str:
    """Returns the first few names as text, followed by the number of remaining names."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more
