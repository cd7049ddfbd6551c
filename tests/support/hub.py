"""A stub of the hub's client."""

import fnmatch
import shutil
from types import SimpleNamespace

NAME, COMMIT = "owner/tiny", "c" * 40


class Stub:
    """A stand-in for `snapshot_download` that copies the matching files of a folder to a cache, or raises `error`.

    With `offline`, it returns the snapshot that was copied earlier.
    """

    def __init__(self, folder, cache, commit=COMMIT):
        self.folder, self.cache, self.commit, self.calls, self.error = folder, cache, commit, [], None
        self.offline = False

    def __call__(self, repo_id, *, revision=None, allow_patterns):
        self.calls.append((repo_id, revision, allow_patterns))
        snapshot = self.cache / self.commit
        if self.error is not None and not (self.offline and snapshot.is_dir()):
            raise self.error
        if self.offline:
            return str(snapshot)
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    def model_info(self, repo_id, *, revision=None, token=None):
        """Returns the list of the repository's files, or raises `error`."""
        if self.error is not None:
            raise self.error
        names = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


def fetched(client):
    return {str(path.relative_to(client.cache / client.commit)) for path in client.cache.rglob("*") if path.is_file()}
