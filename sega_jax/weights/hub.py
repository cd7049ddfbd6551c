"""Fetches checkpoints from the Hugging Face hub into the cache that all clients of the hub share."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from sega_jax.weights.pull import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_id(source: object) -> TypeGuard[str]:
    """Tells whether `source` can be the name of a repository, "owner/name"."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None


def fetch(repository: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Returns the local folder of a repository's snapshot, with the files that match these patterns.

    Files in the cache are not fetched again. Without a connection, or with `HF_HUB_OFFLINE=1`, only the cache is used.
    The name of the folder is the commit of the snapshot.

    Args:
        repository: "owner/name".
        files: shell patterns of paths in the repository.
        revision: a branch, tag or commit; None is the main branch.

    Raises:
        CheckpointError: the repository or revision does not exist, needs a login, or is neither on the hub nor in the
            cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError:
        why = (
            f"is gated: accept its conditions at {huggingface_hub.constants.ENDPOINT}/{repository}, then log in with"
            " `hf auth login` or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        why = (
            "is no folder here and no repository on the hub; check the name, or log in with `hf auth login` if it is"
            " private"
        )
    except errors.RevisionNotFoundError:
        why = f"has no revision {revision!r} on the hub; give a branch, a tag or a commit"
    except errors.HFValidationError as error:
        why = f"is no folder here and no name of a repository ({error})"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        why = (
            f"is no folder here, the hub cannot be reached, and its cache {huggingface_hub.constants.HF_HUB_CACHE} does"
            " not have it; connect once (and unset HF_HUB_OFFLINE), or give a folder"
        )
    except Exception as error:  # the client passes on errors of its HTTP client
        why = f"cannot be fetched from the hub: {error}"
    raise CheckpointError(f"{repository} {why}")


def files(repository: str, revision: str | None = None) -> list[str] | None:
    """Returns the paths of all files of a repository; None where the hub does not answer.

    Args:
        repository, revision: as of `fetch`, which explains why the hub does not answer.
    """
    import huggingface_hub

    try:
        return [one.rfilename for one in huggingface_hub.model_info(repository, revision=revision).siblings or ()]
    except Exception:  # the client passes on errors of its HTTP client
        return None
