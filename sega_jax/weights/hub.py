"""Downloads checkpoints from the Hugging Face hub into the hub's shared cache."""

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

# Options of the hub's client; see `using`.
_options: ContextVar[Mapping[str, Any]] = ContextVar("options", default=MappingProxyType({}))
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADDRESS = re.compile(
    rf"(?P<repository>{_ID.pattern})(?:@(?P<revision>[\w.%-]+))?(?:/(?P<path>[^/*?\\](?:[^*?\\]*[^/*?\\])?))?"
)
# Hosts that serve the hub's pages, in addition to the endpoint that HF_ENDPOINT may set.
_HOSTS = ("huggingface.co", "hf.co")
# The path components that may separate the repository from the revision in a page's web address.
_PAGES = ("tree", "blob", "resolve", "raw")


class Address(NamedTuple):
    """The address of a repository on the hub, or of a file or folder in it."""

    repository: str  # "owner/name"
    path: str = ""  # in the repository; "" means the entire repository
    revision: str | None = None  # None if the address names no revision

    @property
    def name(self) -> str:
        """Returns the address without its revision."""
        return str(self._replace(revision=None))

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"{self.repository}{revision}/{self.path}".rstrip("/")


def address(source: object) -> Address | None:
    """Parses the name of a repository, or of a file or folder in it.

    A name is "owner/name" or "owner/name/path", optionally with "@revision" after the repository's name, or the web
    address of a page on the hub.

    Returns:
        The address, or None for other names, such as absolute paths and "folder/model.safetensors".

    Raises:
        ValueError: `source` is a web address that is not a model's page on the hub.
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
    segments = [unquote(word) for word in parts.path.split("/") if word]
    repository, inner = "/".join(segments[:2]), "/".join(segments).split("/")
    if parts.scheme not in ("http", "https") or parts.netloc not in hosts:
        raise ValueError(f"{source} is not on {hosts[0]}; download the file and give its path")
    if (
        not is_id(repository)
        or (len(segments) > 2 and (segments[2] not in _PAGES or len(segments) < 4))
        or ".." in inner
    ):
        raise ValueError(f"{source} is not the page of a model on {hosts[0]}; give owner/name or owner/name/file")
    return Address(repository, "/".join(segments[4:]), segments[3] if len(segments) > 2 else None)


def is_id(source: object) -> TypeGuard[str]:
    """Returns whether `source` has the form of a repository name, "owner/name"."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None


@contextmanager
def using(**options: Any) -> Iterator[None]:
    """Sets options of the hub's client inside a `with` block.

    Args:
        options: `cache_dir`, `token`, `local_files_only` and `force_download`. None uses the client's default.
    """
    token = _options.set({name: value for name, value in options.items() if value is not None})
    try:
        yield
    finally:
        _options.reset(token)


def fetch(repository: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Downloads files from a repository and returns the local folder of the snapshot.

    Cached files are not downloaded again. Without a connection, or with `HF_HUB_OFFLINE=1`, only the cache is used. The
    folder is named after the commit of the snapshot.

    Args:
        repository: "owner/name".
        files: shell patterns for paths in the repository.
        revision: a branch, tag or commit; None means the main branch.

    Raises:
        CheckpointError: the repository or revision does not exist, the repository needs a login, or the hub cannot be
            reached and the repository is not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        options: Any = {"revision": revision, "allow_patterns": list(files), **_options.get()}
        return Path(huggingface_hub.snapshot_download(repository, **options))
    except errors.GatedRepoError:
        problem = (
            f"is gated: accept its conditions at {huggingface_hub.constants.ENDPOINT}/{repository}, then log in with"
            " `hf auth login` or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        problem = (
            "is neither a local folder nor a repository on the hub; check the name, or log in with `hf auth login` if"
            " it is private"
        )
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the hub; give a branch, a tag or a commit"
    except errors.HFValidationError as error:
        problem = f"is neither a local folder nor a valid repository name ({error})"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        problem = (
            f"is not a local folder, the hub cannot be reached, and the cache {huggingface_hub.constants.HF_HUB_CACHE}"
            " does not contain it; connect to the internet once (and unset HF_HUB_OFFLINE), or give a local folder"
        )
    except Exception as error:  # the client also raises errors from its HTTP library
        problem = f"cannot be fetched from the hub: {error}"
    raise CheckpointError(f"{repository} {problem}")


def fetch_file(repository: str, path: str, revision: str | None = None) -> Path:
    """Downloads one file from a repository and returns its local path, which ends with the commit followed by `path`.

    Raises:
        CheckpointError: the repository has no such file, or `fetch` fails.
    """
    folder = fetch(repository, [glob.escape(path)], revision)
    if not (folder / path).is_file():
        raise CheckpointError(f"{repository} has no file {path} at revision {revision or 'main'}; correct the path")
    return folder / path


def files(repository: str, revision: str | None = None) -> list[str] | None:
    """Returns the paths of all files in a repository, or None if the hub does not answer.

    Args:
        repository, revision: as for `fetch`, whose error messages say why the hub does not answer.
    """
    import huggingface_hub

    try:
        if _options.get().get("local_files_only"):
            return None
        token = _options.get().get("token")
        info = huggingface_hub.model_info(repository, revision=revision, token=token)
        return [file.rfilename for file in info.siblings or ()]
    except Exception:  # the client also raises errors from its HTTP library
        return None
