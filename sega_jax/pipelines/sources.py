"""Where checkpoints are: a folder, a single file, or a repository on the hub, from which only the needed files are
fetched."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.weight_files import check_variant, fetch_weights, open_weights
from sega_jax.systems.base import System, listed
from sega_jax.systems.registry import CHECKER, recognise, recognise_file, weight_stem
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights import hub, single_file
from sega_jax.weights.tensors import Tensors, Weights
from sega_jax.weights.torch_pickle import opened


class Source(NamedTuple):
    """A checkpoint whose index is here: what is on the hub besides is fetched when it is asked for."""

    name: str | Path
    folder: Path  # has model_index.json
    system: System  # its family
    repository: str | None = None  # on the hub, of the folder; None for a folder of this machine
    commit: str | None = None  # of the repository, or of the file's
    file: Path | None = None  # of all weights, in place of the folder's
    description: single_file.SingleFile | None = None  # of such files
    declared: Mapping[str, Any] = MappingProxyType({})  # what the file says of its schedule

    @property
    def model_index(self) -> dict[str, Any]:
        """The contents of model_index.json."""
        return read_json(self.folder / "model_index.json")

    @property
    def parts(self) -> list[str]:
        """The networks that it should have folders of."""
        index, networks = self.model_index, self.system.checkpoint.networks
        return [part for part, one in networks.items() if not one.optional or listed(index, part) is not None]

    def fetch(
        self,
        variant: str | None = None,
        *,
        without: Sequence[str] = (),
        configs_of: Sequence[str] = (),
        strict: bool = True,
    ) -> Path:
        """Returns the checkpoint's folder, with everything that is needed in it.

        Args:
            variant: as of `sega_jax.load`.
            without: networks that are not needed; or "tokenizer".
            configs_of: networks of which only the config is needed.
            strict: whether a variant that no network has is an error.

        Raises:
            CheckpointError: a part is missing or cannot be fetched; nothing large was read.
        """
        parts = [part for part in self.parts if part not in without]
        weights = [part for part in parts if part not in configs_of and self._has(part)]
        if self.repository is not None:
            self._fetch(parts, weights, variant, without)
        for part in parts:
            if not (self.folder / part).is_dir():
                raise CheckpointError(f"{self.folder} has no folder {part}; is it a whole checkpoint?")
        if variant is not None and weights and strict:
            stems = {part: weight_stem(self.system, part) for part in weights}
            if message := check_variant(self.name, {part: self.folder / part for part in weights}, stems, variant):
                warn(message)
        return self.folder

    def _fetch(self, parts: Sequence[str], weights: Sequence[str], variant: str | None, without: Sequence[str]) -> None:
        checkpoint = self.system.checkpoint
        files = [f"{folder}/*.json" for folder in checkpoint.schedulers]
        files += [] if "tokenizer" in without else [f"{folder}/*" for folder in checkpoint.tokenizers]
        if CHECKER not in without and checkpoint.notice(self.model_index) is None:
            parts, weights = [*parts, CHECKER], [*weights, CHECKER]
            files += ["feature_extractor/*.json"]
        files += [f"{part}/config.json" for part in parts]
        stems = {part: weight_stem(self.system, part) for part in weights}
        assert self.repository is not None
        commit = self.commit if self.file is None else self.folder.name
        fetch_weights(self.repository, commit, stems, variant, ["model_index.json", *files])

    def has_config(self, part: str) -> bool:
        """Tells whether the folder has a network's config; of a repository, as far as its index tells."""
        on_hub = self.repository is not None and self.file is None
        return on_hub or (self.folder / part / "config.json").is_file()

    def _has(self, part: str) -> bool:
        """Tells whether the folder has a network's weights, and not the file."""
        return self.file is None or part not in self.system.checkpoint.networks

    def check(self, variant: str | None, *, ema: bool, given: Collection[str] = ()) -> None:
        """Checks that the options for files suit this checkpoint.

        Args:
            given: networks that come from elsewhere.

        Raises:
            ValueError: they do not.
        """
        if ema and self.description is not None:
            averaged = [part for part, ways in self.description.networks.items() if any(way.ema for way in ways)]
            if averaged and all(part in given for part in averaged):
                raise ValueError(
                    f"ema=True is of the {' and '.join(averaged)} in {self.file}, which another one replaces; leave one"
                    " of the two out"
                )
        if self.file is None:
            if ema:
                raise ValueError(f"ema=True is of single files, and {self.name} is none")
        elif variant is not None:
            raise ValueError(f"variant={variant!r} is of a folder's files, and {self.file} is a single one")

    def vocabulary(self) -> Path | None:
        """Returns the folder of the tokenizer that goes with a single file; None where the checkpoint's folder has it.

        A file holds no vocabulary. It is fetched from the repository of the published checkpoint that the file
        resembles.

        Raises:
            CheckpointError: it is neither on this machine nor can it be fetched.
        """
        if self.description is None or (self.folder / "tokenizer").is_dir():
            return None
        repository = self.description.vocabularies.get(self.folder.name)
        why = f"{self.folder} has none"
        if repository is not None:
            try:
                return hub.fetch(repository, ["tokenizer/*"]) / "tokenizer"
            except CheckpointError as error:
                why = f"it would be fetched, but {error}"
        raise CheckpointError(
            f"{self.file} does not hold CLIP's vocabulary: {why}. Give tokenizer= (in the shell --tokenizer), a folder"
            " with vocab.json and merges.txt such as that of any checkpoint of Stable Diffusion in diffusers layout, or"
            " config= (--config), the folder or name of such a checkpoint"
        )

    def weights(self, part: str, module: Any, variant: str | None = None, *, ema: bool = False) -> Weights:
        """Opens the weights of a network.

        Raises:
            CheckpointError: they are missing or broken.
        """
        if self._has(part):
            return open_weights(self.folder / part, weight_stem(self.system, part), variant, module.rename)
        assert self.file is not None
        assert self.description is not None
        originals = self.description.networks[part]
        return single_file.OriginalWeights(self.file, opened(self.file), originals, part, module, ema=ema)


def names_file(source: object) -> bool:
    """Tells whether a source names a single file, here or on the hub."""
    if single_file.is_weight_file(source):
        return True
    address = hub.address(source) if isinstance(source, str) and "://" in source else None
    return address is not None and single_file.has_ending(address.path)


def find(
    source: str | Path,
    revision: str | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    given: Collection[str] = (),
) -> Source:
    """Finds a checkpoint in a folder, in a single file, or on the hub. From the hub, only its index or the single file
    is fetched: the index says the commit, and whether the rest is worth fetching.

    Args:
        source, revision, config, prediction_type: as of `sega_jax.load`.
        given: networks that come from elsewhere, which the checkpoint may lack.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: there is none.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source={source!r} should be the path of a folder, or owner/name on the hub")
    if not (revision is None or isinstance(revision, str)):
        raise TypeError(f"revision={revision!r} should be the name of a branch or tag, or a commit")
    if not str(source):
        raise FileNotFoundError("source='' is no folder; give one in diffusers layout, or owner/name on the hub")
    folder = Path(os.path.expanduser(source))
    there = os.path.exists(folder)
    address = None if there else hub.address(source)
    if address is not None:
        revision = _revision(revision, address)
        if not address.path and config is None:
            folder = hub.fetch(address.repository, ["model_index.json"], revision)
            return Source(address.repository, folder, recognise(folder, given), address.repository, folder.name)
        if single_file.has_ending(address.path):
            try:
                file = hub.fetch_file(address.repository, address.path, revision)
            except CheckpointError as error:
                raise CheckpointError(f"{source} is no file here, and on the hub {error}") from None
            commit = file.parents[address.path.count("/")].name
            config = config or _config_beside(address.repository, commit)
            return _find_file(file, config, prediction_type, given)._replace(name=address.name, commit=commit)
        if address.path:
            raise FileNotFoundError(
                f"{source} is no folder here; on the hub, give a repository, owner/name, or a file in it,"
                f" owner/name/file with the ending {' or '.join(single_file.ENDINGS)}"
            )
    if single_file.is_weight_file(folder):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of a repository on the hub, but {folder} is a file")
        if not folder.is_file():
            raise FileNotFoundError(
                f"{folder} is no file; give one, or a folder in diffusers layout, or owner/name on the hub"
            )
        return _find_file(folder, config, prediction_type, given)
    if config is not None:
        raise ValueError(
            f"config={str(config)!r} is for single files ({', '.join(single_file.ENDINGS)}), not for {source}"
        )
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the hub, but {folder} is a folder")
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{folder} is no folder; give one in diffusers layout (with model_index.json, unet, vae, text_encoder,"
            " tokenizer and scheduler), or owner/name on the hub, with revision= for a branch or commit"
        )
    return Source(source, folder, recognise(folder, given))


def _config_beside(repository: str, commit: str) -> str | None:
    """Returns the name of a repository if it has a checkpoint in diffusers layout beside its single files."""
    snapshot = hub.fetch(repository, ["model_index.json"], commit)
    return f"{repository}@{commit}" if (snapshot / "model_index.json").is_file() else None


def _revision(revision: str | None, address: hub.Address) -> str | None:
    """Returns the revision of an address on the hub.

    Raises:
        ValueError: the address names another than the one that is given.
    """
    if revision is not None and address.revision not in (None, revision):
        raise ValueError(f"revision={revision!r} is given, and the address names {address.revision!r}; give one")
    return revision or address.revision


def _find_file(path: Path, config: str | Path | None, prediction_type: str | None, given: Collection[str]) -> Source:
    with opened(path) as tensors:
        return of_file(path, tensors, config, prediction_type, given)


def of_file(
    path: Path,
    tensors: Tensors,
    config: str | Path | None,
    prediction_type: str | None,
    given: Collection[str] = (),
) -> Source:
    """Returns the checkpoint in a single file, by the shapes of its tensors.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: the file or the config is none.
    """
    file, declared = recognise_file(path, tensors.shapes), single_file.declared(path, tensors.spare)
    predicts = prediction_type or declared.get("prediction_type")
    published = file.published(path, tensors.shapes, predicts) if config is None else config
    found = find(published, given=given)
    if found.system.checkpoint.single_file is not file:
        raise CheckpointError(f"config={str(config)!r} is {found.system.title}, expected {file.name}, as {path} is")
    return found._replace(name=path, commit=None, file=path, description=file, declared=declared)


def place(source: Source) -> tuple[str, str | None]:
    """Returns a checkpoint's whole path and None, or its name on the hub and its commit."""
    if source.commit is not None:
        return str(source.name), source.commit
    return str((source.file or source.folder).resolve()), None
