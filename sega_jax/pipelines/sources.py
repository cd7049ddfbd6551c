"""Finds checkpoints in folders, in single files and on the hub. From the hub, only the needed files are fetched."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sega_jax.method.naming import assignment, name_of
from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.recommended import FILE as RECOMMENDED
from sega_jax.pipelines.weight_files import check_variant, fetch_weights, open_weights
from sega_jax.systems.base import System, listed
from sega_jax.systems.registry import CHECKER, recognise, recognise_file, weight_stem
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights import hub, single_file
from sega_jax.weights.tensors import Tensors, Weights
from sega_jax.weights.torch_pickle import opened


class Source(NamedTuple):
    """A checkpoint whose model_index.json is local. Its other files are fetched from the hub on demand."""

    name: str | Path
    folder: Path  # the folder that contains model_index.json
    system: System  # the family
    repository: str | None = None  # the repository on the hub that the folder belongs to; None for a local folder
    commit: str | None = None  # the commit of the folder's repository, or of the single file's repository
    file: Path | None = None  # the single file with all weights; None if the weights are in the folder
    description: single_file.SingleFile | None = None  # the family's single-file description
    declared: Mapping[str, Any] = MappingProxyType({})  # scheduler options that the single file declares

    @property
    def model_index(self) -> dict[str, Any]:
        """The contents of model_index.json."""
        return read_json(self.folder / "model_index.json")

    @property
    def parts(self) -> list[str]:
        """The folder names of the networks that the checkpoint should have."""
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
        """Fetches the needed files, and returns the checkpoint's folder.

        Args:
            variant: As for `sega_jax.load`.
            without: The names of networks that are not needed; may include "tokenizer".
            configs_of: The names of networks for which only the config is needed.
            strict: Whether to raise an error if no network has weights in this variant.

        Raises:
            CheckpointError: A part is missing or cannot be fetched. Raised before any weights are read.
        """
        parts = [part for part in self.parts if part not in without]
        weights = [part for part in parts if part not in configs_of and self._has(part)]
        if self.repository is not None:
            self._fetch(parts, weights, variant, without)
        for part in parts:
            if not (self.folder / part).is_dir():
                raise CheckpointError(f"{self.folder} has no folder {part}; give a complete checkpoint")
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
        fetch_weights(self.repository, commit, stems, variant, ["model_index.json", RECOMMENDED, *files])

    def has_config(self, part: str) -> bool:
        """Returns whether the folder contains a network's config. Repositories are assumed to contain it."""
        on_hub = self.repository is not None and self.file is None
        return on_hub or (self.folder / part / "config.json").is_file()

    def _has(self, part: str) -> bool:
        """Returns whether a network's weights are in the folder rather than in the single file."""
        return self.file is None or part not in self.system.checkpoint.networks

    def check(self, variant: str | None, *, ema: bool, given: Collection[str] = ()) -> None:
        """Checks that `variant` and `ema` apply to this checkpoint.

        Args:
            variant, ema: As for `sega_jax.load`.
            given: The names of the networks that are replaced.

        Raises:
            ValueError: An option does not apply.
        """
        if ema and self.description is not None:
            averaged = [part for part, ways in self.description.networks.items() if any(way.ema for way in ways)]
            if averaged and all(part in given for part in averaged):
                raise ValueError(
                    f"{assignment('ema', True)} selects the moving average of the {' and '.join(averaged)} in"
                    f" {self.file}, but this network is replaced; leave out {name_of('ema')} or the replacement"
                )
        if self.file is None:
            if ema:
                raise ValueError(
                    f"{assignment('ema', True)} applies only to single files, but {self.name} is not one; leave it out"
                )
        elif variant is not None:
            raise ValueError(
                f"{assignment('variant', variant)} applies only to folders and repositories, but {self.file} is a"
                " single file; leave it out"
            )

    def vocabulary(self) -> Path | None:
        """Returns a single file's tokenizer folder, or None if the checkpoint's own folder contains the tokenizer.

        Single files contain no vocabulary, so it is fetched from the repository of a published checkpoint with the same
        architecture.

        Raises:
            CheckpointError: The vocabulary is not on this machine and cannot be fetched.
        """
        if self.description is None or (self.folder / "tokenizer").is_dir():
            return None
        repository = self.description.vocabularies.get(self.folder.name)
        why = f"{self.folder} has none"
        if repository is not None:
            try:
                return hub.fetch(repository, ["tokenizer/*"]) / "tokenizer"
            except CheckpointError as error:
                why = f"fetching it failed, because {error}"
        raise CheckpointError(
            f"{self.file} does not contain CLIP's vocabulary: {why}. As {name_of('tokenizer')}, give a"
            " folder with vocab.json and merges.txt, such as the tokenizer folder of any Stable Diffusion checkpoint in"
            f" diffusers layout; or give the folder or name of such a checkpoint as {name_of('config')}"
        )

    def weights(self, part: str, module: Any, variant: str | None = None, *, ema: bool = False) -> Weights:
        """Opens the weights of a network.

        Args:
            part: The name of the network's folder.
            module: The network; only the shapes of its parameters are used.
            variant, ema: As for `sega_jax.load`.

        Raises:
            CheckpointError: The weights are missing or broken.
        """
        if self._has(part):
            return open_weights(self.folder / part, weight_stem(self.system, part), variant, module.rename)
        assert self.file is not None
        assert self.description is not None
        originals = self.description.networks[part]
        return single_file.OriginalWeights(self.file, opened(self.file), originals, part, module, ema=ema)


def names_file(source: object) -> bool:
    """Returns whether a source is the name of a single file, local or on the hub."""
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
    """Finds a checkpoint in a folder, in a single file or on the hub.

    From a repository, only model_index.json is fetched. This determines the commit and the family before any large file
    is fetched. A single file on the hub is fetched in full.

    Args:
        source, revision, config, prediction_type: As for `sega_jax.load`.
        given: The names of networks that the checkpoint may lack, because they are replaced.

    Raises:
        FileNotFoundError: The folder or file does not exist.
        CheckpointError: The source is not a supported checkpoint, or cannot be fetched.
        TypeError, ValueError: An argument has the wrong type, or does not apply to this source.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{assignment('source', source)} should be the path of a folder, or owner/name on the hub")
    if not (revision is None or isinstance(revision, str)):
        raise TypeError(f"{assignment('revision', revision)} should be the name of a branch or tag, or a commit")
    if not str(source):
        raise FileNotFoundError(
            f"{assignment('source', '')} is not a folder; give one in diffusers layout, or owner/name on the hub"
        )
    folder = Path(os.path.expanduser(source))
    is_local = os.path.exists(folder)
    address = None if is_local else hub.address(source)
    if address is not None:
        revision = _revision(revision, address)
        if not address.path and config is None:
            folder = hub.fetch(address.repository, ["model_index.json"], revision)
            return Source(address.repository, folder, recognise(folder, given), address.repository, folder.name)
        if single_file.has_ending(address.path):
            try:
                file = hub.fetch_file(address.repository, address.path, revision)
            except CheckpointError as error:
                raise CheckpointError(f"{source} is not a local file, and on the hub {error}") from None
            commit = file.parents[address.path.count("/")].name
            config = config or _config_beside(address.repository, commit)
            return _find_file(file, config, prediction_type, given)._replace(name=address.name, commit=commit)
        if address.path:
            raise FileNotFoundError(
                f"{source} is not a local folder; on the hub, give a repository, owner/name, or a file in it,"
                f" owner/name/file with the extension {' or '.join(single_file.ENDINGS)}"
            )
    if single_file.is_weight_file(folder):
        if revision is not None:
            raise ValueError(
                f"{assignment('revision', revision)} applies only to the hub, but {folder} is a local file; leave it"
                " out"
            )
        if not folder.is_file():
            raise FileNotFoundError(
                f"{folder} is not a file; give a file, a folder in diffusers layout, or owner/name on the hub"
            )
        return _find_file(folder, config, prediction_type, given)
    if config is not None:
        raise ValueError(
            f"{assignment('config', str(config))} applies only to single files ({', '.join(single_file.ENDINGS)}), but"
            f" {source} is not one; leave it out"
        )
    if revision is not None:
        raise ValueError(
            f"{assignment('revision', revision)} applies only to the hub, but {folder} is a local folder; leave it out"
        )
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{folder} is not a folder; give one in diffusers layout (with model_index.json, unet, vae, text_encoder,"
            f" tokenizer and scheduler), or owner/name on the hub, or owner/name@revision for a branch or commit"
        )
    return Source(source, folder, recognise(folder, given))


def _config_beside(repository: str, commit: str) -> str | None:
    """Returns a single file's repository if it also contains a checkpoint in diffusers layout, otherwise None."""
    snapshot = hub.fetch(repository, ["model_index.json"], commit)
    return f"{repository}@{commit}" if (snapshot / "model_index.json").is_file() else None


def _revision(revision: str | None, address: hub.Address) -> str | None:
    """Returns the revision that the option or the hub address specifies.

    Raises:
        ValueError: The option and the address specify different revisions.
    """
    if revision is not None and address.revision not in (None, revision):
        raise ValueError(
            f"{assignment('revision', revision)} is given, but the address names {address.revision!r}; give only one"
            " of them"
        )
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
    """Recognises the checkpoint in a single file by the shapes of its tensors.

    Args:
        path: The file.
        tensors: The tensors of the opened file.
        config, prediction_type: As for `sega_jax.load`.
        given: As for `find`.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: The file is not a supported checkpoint, or the config
            does not belong to its family.
    """
    file, declared = recognise_file(path, tensors.shapes), single_file.declared(path, tensors.spare)
    predicts = prediction_type or declared.get("prediction_type")
    published = file.published(path, tensors.shapes, predicts) if config is None else config
    config_source = find(published, given=given)
    if config_source.system.checkpoint.single_file is not file:
        raise CheckpointError(
            f"{assignment('config', str(config))} is {config_source.system.title}, expected {file.name}, the family of"
            f" {path}"
        )
    return config_source._replace(name=path, commit=None, file=path, description=file, declared=declared)


def place(source: Source) -> tuple[str, str | None]:
    """Returns (absolute path, None) for a local checkpoint, or (name on the hub, commit)."""
    if source.commit is not None:
        return str(source.name), source.commit
    return str((source.file or source.folder).resolve()), None
