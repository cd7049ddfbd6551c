"""Where checkpoints are: a folder, a single file, or a repository on the hub, from which what is needed is fetched."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sega_jax.systems.base import System, listed
from sega_jax.systems.registry import CHECKER, recognise, recognise_file, weight_stem
from sega_jax.weights import hub, orbax_reader, single_file
from sega_jax.weights.pull import CheckpointError, Tensors, Weights, read_json, weight_files


class Source(NamedTuple):
    """A checkpoint whose index is here: what is on the hub besides is fetched when it is asked for."""

    name: str | Path
    folder: Path  # has model_index.json
    system: System  # its family
    commit: str | None  # on the hub; None for a folder
    file: Path | None = None  # of all weights, in place of the folder's
    description: single_file.SingleFile | None = None  # of such files
    declared: Mapping[str, Any] = MappingProxyType({})  # what the file says of its schedule
    repository: str = ""  # of the folder, where that is on the hub

    @property
    def model_index(self) -> dict[str, Any]:
        """The contents of model_index.json."""
        return read_json(self.folder / "model_index.json")

    @property
    def parts(self) -> list[str]:
        """The networks that it should have folders of."""
        index, networks = self.model_index, self.system.checkpoint.networks
        return [part for part, one in networks.items() if not one.optional or listed(index, part) is not None]

    def fetch(self, variant: str | None = None, *, without: Sequence[str] = (), configs_of: Sequence[str] = ()) -> Path:
        """Returns the checkpoint's folder, with everything that is needed in it.

        Args:
            variant: as of `sega_jax.load`.
            without: networks that are not needed; or "tokenizer".
            configs_of: networks of which only the config is needed.

        Raises:
            CheckpointError: a part is missing or cannot be fetched; nothing large was read.
        """
        parts = [part for part in self.parts if part not in without]
        if self.commit is not None:
            self._fetch(parts, configs_of, variant, without)
        for part in parts:
            if not (self.folder / part).is_dir():
                raise CheckpointError(f"{self.folder} has no folder {part}; is it a whole checkpoint?")
        return self.folder

    def _fetch(
        self, parts: Sequence[str], configs_of: Sequence[str], variant: str | None, without: Sequence[str]
    ) -> None:
        checkpoint = self.system.checkpoint
        files = [f"{folder}/*.json" for folder in checkpoint.schedulers]
        files += [] if "tokenizer" in without else [f"{folder}/*" for folder in checkpoint.tokenizers]
        if CHECKER not in without and checkpoint.notice(self.model_index) is None:
            parts = [*parts, CHECKER]
            files += ["feature_extractor/*.json"]
        ours = [part for part in parts if part not in configs_of and self._has(part)]
        stems = {part: weight_stem(self.system, part) for part in ours}
        weights = {part: [*weight_files(stems[part], variant), *orbax_reader.FILES] for part in ours}
        files += [f"{part}/{file}" for part in parts for file in ("config.json", *weights.get(part, ()))]
        hub.fetch(self.repository, ["model_index.json", *files], self.commit)
        for part in ours:
            if (self.folder / part).is_dir() and not any(
                path for file in weights[part] for path in self.folder.glob(f"{part}/{file}")
            ):
                raise CheckpointError(
                    f'{self.name} has no {part}/{weights[part][0]}; give another variant ("fp16", or none), or fetch'
                    " the repository and convert its folder with sega-jax-convert, if its weights are .bin"
                )

    def _has(self, part: str) -> bool:
        """Whether the folder has a network's weights, and not the file."""
        return self.file is None or part not in self.system.checkpoint.networks

    def check(self, variant: str | None, *, ema: bool, reads: bool) -> None:
        """Whether what goes with a file goes with this checkpoint, and a file has all that it needs: the vocabulary
        where `reads`.

        Raises:
            CheckpointError, ValueError: it does not.
        """
        if self.file is None:
            if ema:
                raise ValueError(f"ema=True is of single files, and {self.name} is none")
        elif variant is not None:
            raise ValueError(f"variant={variant!r} is of a folder's files, and {self.file} is a single one")
        elif reads and not (self.folder / "tokenizer").is_dir():
            raise CheckpointError(
                f"{self.file} does not hold CLIP's vocabulary; give tokenizer= (in the shell --tokenizer), a folder"
                " with vocab.json and merges.txt such as that of any checkpoint of Stable Diffusion in diffusers"
                " layout, or another pipeline's; or make a folder of both with sega-jax-convert"
            )

    def weights(self, part: str, module: Any, variant: str | None = None, *, ema: bool = False) -> Weights:
        """The weights of a network.

        Raises:
            CheckpointError: they are missing or broken.
        """
        if self._has(part):
            return open_weights(self.folder / part, variant, module.rename, weight_stem(self.system, part))
        assert self.file is not None
        assert self.description is not None
        return single_file.OriginalWeights(
            self.file, single_file.opened(self.file), self.description, part, module, ema=ema
        )


def find(
    source: str | Path,
    revision: str | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
) -> Source:
    """A checkpoint in a folder, in a single file, or on the hub, from which its index alone is fetched: it says the
    commit, and whether the rest is worth fetching.

    Args:
        source, revision, config, prediction_type: as of `sega_jax.load`.

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
    if single_file.is_one(folder):
        return _find_file(folder, revision, config, prediction_type)
    if config is not None:
        raise ValueError(
            f"config={str(config)!r} is for single files ({', '.join(single_file.ENDINGS)}), not for {source}"
        )
    if not folder.exists() and hub.is_id(source):
        folder = hub.fetch(source, ["model_index.json"], revision)
        return Source(source, folder, recognise(folder), folder.name, repository=source)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the hub, but {folder} is a folder")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give one in diffusers layout (with model_index.json, unet, vae, text_encoder,"
            " tokenizer and scheduler), or owner/name on the hub, with revision= for a branch or commit"
        )
    return Source(source, folder, recognise(folder), None)


def _find_file(path: Path, revision: str | None, config: str | Path | None, prediction_type: str | None) -> Source:
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the hub, but {path} is a file")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file; give one, or a folder in diffusers layout, or owner/name on the hub"
        )
    with single_file.opened(path) as tensors:
        return of_file(path, tensors.shapes, config, prediction_type)


def of_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], config: str | Path | None, prediction_type: str | None
) -> Source:
    """The checkpoint in a single file, by the shapes of its tensors.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: the file or the config is none.
    """
    file, declared = recognise_file(path, shapes), single_file.declared(path, shapes)
    predicts = prediction_type or declared.get("prediction_type")
    found = find(file.published(path, shapes, predicts) if config is None else config)
    if found.system.checkpoint.single_file is not file:
        raise CheckpointError(f"config={str(config)!r} is {found.system.title}, expected {file.name}, as {path} is")
    return found._replace(name=path, file=path, description=file, declared=declared)


def place(source: Source) -> tuple[str, str | None]:
    """Returns a checkpoint's whole path and None, or its name on the hub and its commit."""
    here = source.file or (source.folder if source.commit is None else None)
    return (str(source.name), source.commit) if here is None else (str(here.resolve()), None)


def open_weights(
    folder: Path, variant: str | None, rename: Callable[[str], str | None], stem: str
) -> Tensors | orbax_reader.OrbaxTensors:
    """Returns the weights of the network whose folder this is, in diffusers layout or from Orbax; `stem` is the weight
    file's name without ending.

    Raises:
        CheckpointError: they are missing or broken.
    """
    if not (folder / orbax_reader.ARRAYS).is_dir():
        return Tensors(folder, stem, variant, rename)
    if variant is not None:
        raise CheckpointError(f"{folder} holds an Orbax checkpoint, which has no variants; leave {variant!r} out")
    return orbax_reader.OrbaxTensors(folder, rename)
