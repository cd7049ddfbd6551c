"""Fetches checkpoints from the Hugging Face hub into the cache that all clients of the hub share."""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import unquote, urlsplit

from sega_jax.text.files import CheckpointError
from sega_jax.weights.tensors import ENDINGS

# The options with which the hub's client is called; see `using`.
_options: ContextVar[Mapping[str, Any]] = ContextVar("options", default=MappingProxyType({}))
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADDRESS = re.compile(
    rf"(?P<repository>{_ID.pattern})(?:@(?P<revision>[\w.%-]+))?(?:/(?P<path>[^/*?\\](?:[^*?\\]*[^/*?\\])?))?"
)
# The hub's pages, besides those of the endpoint that the environment may name.
_HOSTS = ("huggingface.co", "hf.co")
# The second part of a page's address, after the repository, where a revision follows.
_PAGES = ("tree", "blob", "resolve", "raw")


class Address(NamedTuple):
    """A repository on the hub, or a file or folder in it."""

    repository: str  # "owner/name"
    path: str = ""  # in the repository; "" is all of it
    revision: str | None = None  # None where the address names none

    @property
    def name(self) -> str:
        """The address without its revision."""
        return str(self._replace(revision=None))

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"{self.repository}{revision}/{self.path}".rstrip("/")


def address(source: object) -> Address | None:
    """Returns what a name means on the hub: "owner/name" or "owner/name/path", either with "@revision" after the
    repository, or the address of a page.

    Returns None for other names, such as absolute paths and "folder/model.safetensors".

    Raises:
        ValueError: a web address of something else.
    """
    if not isinstance(source, str):
        return None
    if "://" in source:
        return _page(source)
    match = _ADDRESS.fullmatch(source)
    if match is None or ".." in source.split("/") or (not match["path"] and match["repository"].endswith(ENDINGS)):
        return None
    revision = match["revision"]
    return Address(match["repository"], match["path"] or "", None if revision is None else unquote(revision))


def _page(source: str) -> Address:
    from huggingface_hub import constants

    hosts = (urlsplit(constants.ENDPOINT).netloc, *_HOSTS)
    parts = urlsplit(source)
    words = [unquote(word) for word in parts.path.split("/") if word]
    repository, inner = "/".join(words[:2]), "/".join(words).split("/")
    if parts.scheme not in ("http", "https") or parts.netloc not in hosts:
        raise ValueError(f"{source} is no address on {hosts[0]}; download the file, and give its path")
    if not is_id(repository) or (len(words) > 2 and (words[2] not in _PAGES or len(words) < 4)) or ".." in inner:
        raise ValueError(f"{source} is no page of a model on {hosts[0]}; give owner/name, or owner/name/file")
    return Address(repository, "/".join(words[4:]), words[3] if len(words) > 2 else None)


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


def fetch_file(repository: str, path: str, revision: str | None = None) -> Path:
    """Returns the local path of one file of a repository; its parents end with the commit and `path`.

    Raises:
        CheckpointError: the repository has no such file; or as `fetch`.
    """
    folder = fetch(repository, [glob.escape(path)], revision)
    if not (folder / path).is_file():
        raise CheckpointError(f"{repository} has no file {path} at revision {revision or 'main'}; correct its name")
    return folder / path


def files(repository: str, revision: str | None = None) -> list[str] | None:
    """Returns the paths of all files of a repository; None where the hub does not answer.

    Args:
        repository, revision: as of `fetch`, which explains why the hub does not answer.
    """
    import huggingface_hub

    try:
        if _options.get().get("local_files_only"):
            return None
        token = _options.get().get("token")
        info = huggingface_hub.model_info(repository, revision=revision, token=token)
        return [one.rfilename for one in info.siblings or ()]
    except Exception:  # the client passes on errors of its HTTP client
        return None
