"""Functions that read JSON files, hash files and resolve paths, and the error for unusable checkpoints.

The error is defined here, in the lowest-level package that reads files, so that all other packages can raise it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be used. The message names the file, the problem and the remedy.

    Example:
        >>> import sega_jax
        >>> try:
        ...     sega_jax.load(".")
        ... except sega_jax.CheckpointError as error:
        ...     print("this folder has no checkpoint")
        this folder has no checkpoint
    """


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        CheckpointError: The file is missing, unreadable or broken, or does not contain a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; check that {path.parent} is a complete checkpoint") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} contains a {type(value).__name__}, expected a JSON object; fetch it again")
    return value


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 digest of a file as hexadecimal digits.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; correct the path") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a readable file") from None


def absolute_path(path: str | os.PathLike[str], folder: Path) -> str:
    """Returns the absolute path of a file, given a path that is relative to a folder or starts with "~"."""
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
