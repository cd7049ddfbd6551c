"""Fetches checkpoints from the Hugging Face hub into the cache that all clients of the hub share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from sega_jax.weights.pull import CheckpointError

# The options with which the hub's client is called; see `using`.
_options: ContextVar[Mapping[str, Any]] = ContextVar("options", default=MappingProxyType({}))
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_id(source: object) -> TypeGuard[str]:
    """Tells whether `source` can be the name of a repository, "owner/name"."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None


@contextmanager
def using(**options: Any) -> Iterator[None]:
    """Fetches with these options of the hub's client in a block: `cache_dir`, `token`, `local_files_only` and
    `force_download`; None is the client's default."""
    token = _options.set({name: value for name, value in options.items() if value is not None})
    try:
        yield
    finally:
        _options.reset(token)


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
        options: Any = {"revision": revision, "allow_patterns": list(files), **_options.get()}
        return Path(huggingface_hub.snapshot_download(repository, **options))
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
