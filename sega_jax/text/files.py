"""The JSON files of a checkpoint, and the error for files that cannot be used.

It lives in the lowest package that reads files, so that every other package can raise the same error.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the file, what is wrong and the remedy.

    Example:
        >>> import sega_jax
        >>> try:
        ...     sega_jax.load(".")
        ... except sega_jax.CheckpointError as error:
        ...     print("this folder has no checkpoint")
        this folder has no checkpoint
    """


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable, broken or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a whole checkpoint?") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is no file; correct the path") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def whole_path(path: str | os.PathLike[str], folder: Path) -> str:
    """Returns the whole path of a file that is named relative to a folder, or to a user's home by "~"."""
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
