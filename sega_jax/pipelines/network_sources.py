"""Finds single networks outside the checkpoint, such as a better autoencoder or a distilled UNet."""

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.method.naming import assignment
from sega_jax.pipelines.weight_files import fetch_weights, find_weights, open_weights
from sega_jax.systems.base import Network
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights import hub
from sega_jax.weights.layout import leaves
from sega_jax.weights.single_file import Original, OriginalWeights, has_ending
from sega_jax.weights.tensors import Tensors, Weights
from sega_jax.weights.torch_pickle import opened

_CONFIG = "config.json"


class NetworkSource(NamedTuple):
    """The location of one network's weights."""

    config: Mapping[str, Any] | None  # the network's config; None means the config in the checkpoint
    open: Callable[[Any], Weights]  # opens the weights, given a network with shapes instead of parameters
    variant: str | None = None  # the variant that was found
    file: Path | None = None  # the weight file; None for a folder


def find_network(
    part: str,
    source: str | os.PathLike[str],
    network: Network,
    originals: Sequence[Original],
    variant: str | None = None,
) -> NetworkSource:
    """Finds a network in a folder, in a single file or on the hub, and fetches its files.

    Args:
        part: The name of the network's folder in a checkpoint, such as "vae".
        source: A folder with `config.json` and weights; a checkpoint's folder; a single file with diffusers' or the
            original repository's tensor names; or a name on the hub, "owner/name", "owner/name/folder" or
            "owner/name/file".
        network: The family's description of the network.
        originals: The original repositories' layouts, any of which a single file with this network may have.
        variant: The preferred variant of the weights; if it does not exist, weights without a variant are used.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: The source is a web address, but not the address of a model page on the hub.
        CheckpointError: The source does not contain the network, or cannot be fetched.
    """
    where = Path(os.path.expanduser(source))
    address = None if os.path.exists(where) else hub.address(str(source))
    if address is not None and has_ending(address.path):
        config_path = str(Path(address.path).parent / _CONFIG)
        snapshot = hub.fetch(address.repository, list(map(glob.escape, (address.path, config_path))), address.revision)
        where = snapshot / address.path
    elif address is not None:
        where = _fetched(part, address, network, variant)
    if where.is_dir():
        return _in_folder(part, where, network, variant)
    if not where.is_file():
        raise FileNotFoundError(
            f"{assignment(part, str(source))} is neither a file nor a folder; give one that contains the network, or a"
            " name on the hub"
        )
    # If the weight file has another name, the config next to it may belong to a different network.
    has_config = where.name.startswith(network.stem) and (where.parent / _CONFIG).is_file()
    config = _config(where.parent, network) if has_config else None
    return NetworkSource(config, partial(open_network, where, part, originals), file=where)


def _in_folder(part: str, folder: Path, network: Network, variant: str | None) -> NetworkSource:
    for where in (folder, folder / part):
        if (where / _CONFIG).is_file():
            config = _config(where, network)
            choice = find_weights(where, network.stem, variant)
            if choice is None:
                raise CheckpointError(f"{where} has no weights ({network.stem}.safetensors); fetch the entire folder")
            return NetworkSource(config, partial(_opened, where, network.stem, variant), choice.variant)
    raise CheckpointError(f"{folder} has no {_CONFIG}, and no {part} folder that contains one; give a {part} folder")


def _opened(folder: Path, stem: str, variant: str | None, module: Any) -> Weights:
    return open_weights(folder, stem, variant, module.rename)


def _fetched(part: str, address: hub.Address, network: Network, variant: str | None) -> Path:
    """Fetches a network from its own repository or a checkpoint's repository, and returns the local folder."""
    folders = [address.path] if address.path else ["", part]
    configs = [str(Path(folder) / _CONFIG) for folder in folders]
    snapshot = hub.fetch(address.repository, configs, address.revision)
    for folder, config in zip(folders, configs, strict=True):
        if (snapshot / config).is_file():
            # The network's class is checked before its large weights are fetched.
            _config(snapshot / folder, network)
            fetch_weights(address.repository, snapshot.name, {folder: network.stem}, variant)
            return snapshot / folder
    raise CheckpointError(f"{address.name} has no {' and no '.join(configs)}; give a repository with a {part}")


def _config(folder: Path, network: Network) -> dict[str, Any]:
    """Reads a network's config and checks its class.

    Raises:
        CheckpointError: The config is missing or broken, or belongs to a network of a different class.
    """
    config = read_json(folder / _CONFIG)
    architectures = config.get("architectures")
    named = architectures[:1] if isinstance(architectures, list) else []
    name = config.get("_class_name", named[0] if named else None)
    expected = dict.fromkeys((network.module.__name__, *network.also))
    if name is not None and name not in expected:
        raise CheckpointError(f"{folder} is {name}, expected {' or '.join(expected)}")
    return config


def open_network(path: Path, part: str, originals: Sequence[Original], module: Any) -> Weights:
    """Opens a network's weights in a file that may also contain other tensors.

    The tensors may have diffusers' or the original repository's names, with any prefix.

    Args:
        path: The weight file.
        part, originals: As for `find_network`.
        module: The network; only the shapes of its parameters are used.

    Raises:
        CheckpointError: The file is broken, contains none of the network's tensor names, or contains several
            networks that fit equally well.
    """
    tensors = opened(path)
    candidates = [
        _Candidate(prefix, None, *_count(tensors, module, prefix)) for prefix in _prefixes(tensors, leaves(module))
    ]
    family_prefixes = {original.start for original in originals}
    for original in {one.names: one for one in originals}.values():  # some original layouts differ only in their prefix
        for start in _prefixes(tensors, original.names(module).values()) | family_prefixes:
            moved = original._replace(start=start)
            candidates.append(_Candidate(start, moved, 0, _overlap(moved, tensors, module), start in family_prefixes))
    best = max(candidate.rank for candidate in candidates)
    chosen = [candidate for candidate in candidates if candidate.rank == best]
    if all(one.original is None for one in chosen):
        # If the module itself strips a prefix, the candidates with and without that prefix refer to the same tensors.
        distinct = {_keys(tensors, module, one.prefix): one for one in chosen}
        chosen = list(distinct.values())
    if not best[0] or len(chosen) > 1:
        tensors.close()
        if not best[0]:
            first = ", ".join(list(tensors.shapes)[:3]) or "nothing"
            raise CheckpointError(
                f"{path} has no {part} under diffusers' or the original names; its first tensors are {first[:200]}"
            )
        names = " and ".join(sorted(repr(candidate.prefix) for candidate in chosen))
        raise CheckpointError(
            f"{path} has several networks that may be the {part}, with the prefixes {names}; save the right one"
            " in a separate file"
        )
    (candidate,) = chosen
    if candidate.original is not None:
        return OriginalWeights(path, tensors, [candidate.original], part, module)
    tensors.close()
    prefix = candidate.prefix
    return opened(path, lambda key: module.rename(key.removeprefix(prefix)) if key.startswith(prefix) else None)


class _Candidate(NamedTuple):
    """A possible way to read a network from a file, with a certain prefix and naming scheme."""

    prefix: str
    original: Original | None  # the original layout with this prefix; None for diffusers' names
    fitting: int  # the number of parameters with matching shapes, counted only for diffusers' names
    named: int  # the number of parameters with matching names
    own: bool = False  # whether the family's own files use this prefix

    @property
    def rank(self) -> tuple[bool, bool, int, bool, bool, bool]:
        """The sort key; the best candidate comes last.

        The criteria are, in order: whether any name matches, whether any tensor fits, the number of matches, the
        family's own prefix, no moving average, and diffusers' names.
        """
        diffusers_names, moving_average = self.original is None, "ema" in self.prefix
        fits = self.fitting > 0 or (self.named > 0 and not diffusers_names)
        return (self.named > 0, fits, self.fitting or self.named, self.own, not moving_average, diffusers_names)


def _prefixes(tensors: Tensors, names: Iterable[str]) -> set[str]:
    """Returns the prefixes with which a network's tensor names occur in a file, plus the empty prefix."""
    sample = next((name for name in names if "[" not in name), "")
    return {key.removesuffix(sample) for key in tensors.shapes if sample and key.endswith(sample)} | {""}


def _keys(tensors: Tensors, module: Any, prefix: str) -> frozenset[str]:
    """Selects a network's parameters from a file in which they have diffusers' names after a prefix."""
    names = leaves(module)
    keys = (key for key in tensors.shapes if key.startswith(prefix))
    return frozenset(key for key in keys if module.rename(key.removeprefix(prefix)) in names)


def _count(tensors: Tensors, module: Any, prefix: str) -> tuple[int, int]:
    """Counts a network's parameters in a file in which they have diffusers' names after a prefix.

    Returns:
        The number of parameters with matching shapes, and the number with matching names.
    """
    shapes = leaves(module)
    known = {module.rename(key.removeprefix(prefix)): tensors.shapes[key] for key in _keys(tensors, module, prefix)}
    return sum(known[name] == shapes[name] for name in known), len(known)


def _overlap(original: Original, tensors: Tensors, module: Any) -> int:
    """Counts how many of a network's tensors a file contains under their original names."""
    names = {name.partition("[")[0] for name in original.full_names(module).values()}
    return len({original.full_name(key, module) for key in tensors.shapes} & names)
