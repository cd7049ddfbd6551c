"""Where checkpoints are: a folder, or a repository on the hub, of which only what is needed is fetched."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sega_jax import hub, orbax
from sega_jax.checkpoint import CheckpointError, read_json, weight_files
from sega_jax.kinds import CHECKER, Kind, entry, has_other_checker, kind_of, optional, weight_stem


class Source(NamedTuple):
    """A checkpoint whose index is here: what is on the hub besides is fetched when it is asked for."""

    name: str | Path
    folder: Path  # has model_index.json
    kind: Kind
    commit: str | None  # on the hub; None for a folder

    @property
    def parts(self) -> list[str]:
        """The networks that it should have folders of."""
        index = read_json(self.folder / "model_index.json")
        return [part for part in self.kind.parts if part not in optional(self.kind) or entry(index, part) is not None]

    def fetch(self, variant: str | None = None, *, without: Sequence[str] = ()) -> Path:
        """The checkpoint's folder.

        Args:
            variant: as of `sega_jax.load`.
            without: networks that are not needed; or "tokenizer".

        Raises:
            CheckpointError: a part is missing or cannot be fetched; nothing large was read.
        """
        parts = [part for part in self.parts if part not in without]
        if self.commit is not None:
            self._fetch(parts, variant, without)
        for part in parts:
            if not (self.folder / part).is_dir():
                raise CheckpointError(f"{self.folder} has no folder {part}; is it a whole checkpoint?")
        return self.folder

    def _fetch(self, parts: Sequence[str], variant: str | None, without: Sequence[str]) -> None:
        files = ["scheduler/*.json"]
        files += [f"{self.kind.noising}/*.json"] if self.kind.noising else []
        files += [] if "tokenizer" in without else ["tokenizer/*"]
        if CHECKER not in without and not has_other_checker(self.folder):
            parts = [*parts, CHECKER]
            files += ["feature_extractor/*.json"]
        weights = {part: [*weight_files(weight_stem(part), variant), *orbax.FILES] for part in parts}
        files += [f"{part}/{file}" for part in parts for file in ("config.json", *weights[part])]
        hub.fetch(str(self.name), ["model_index.json", *files], self.commit)
        for part in parts:
            if (self.folder / part).is_dir() and not any(
                path for file in weights[part] for path in self.folder.glob(f"{part}/{file}")
            ):
                raise CheckpointError(
                    f'{self.name} has no {part}/{weights[part][0]}; give another variant ("fp16", or none), or fetch'
                    " the repository and convert its folder with sega-jax-convert, if its weights are .bin"
                )


def find(source: str | Path, revision: str | None = None) -> Source:
    """A checkpoint in a folder or on the hub, from which its index alone is fetched: it says the commit, and whether
    the rest is worth fetching.

    Args:
        source, revision: as of `sega_jax.load`.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: it is none.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source={source!r} should be the path of a folder, or owner/name on the hub")
    if not (revision is None or isinstance(revision, str)):
        raise TypeError(f"revision={revision!r} should be the name of a branch or tag, or a commit")
    if not str(source):
        raise FileNotFoundError("source='' is no folder; give one in diffusers layout, or owner/name on the hub")
    folder = Path(os.path.expanduser(source))
    if not folder.exists() and hub.is_id(source):
        folder = hub.fetch(source, ["model_index.json"], revision)
        return Source(source, folder, kind_of(folder), folder.name)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the hub, but {folder} is a folder")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give one in diffusers layout (with model_index.json, unet, vae, text_encoder,"
            " tokenizer and scheduler), or owner/name on the hub, with revision= for a branch or commit"
        )
    return Source(source, folder, kind_of(folder), None)
