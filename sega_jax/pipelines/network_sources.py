"""Networks that are published alone, such as a better autoencoder or a distilled UNet."""

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    """Where the weights of one network are."""

    config: Mapping[str, Any] | None  # None where only the checkpoint knows it
    open: Callable[[Any], Weights]  # from the network, without values
    variant: str | None = None  # of the weights
    file: Path | None = None  # that has the weights; None for a folder


def find_network(
    part: str,
    source: str | os.PathLike[str],
    network: Network,
    originals: Sequence[Original],
    variant: str | None = None,
) -> NetworkSource:
    """Finds a network in a folder, in a single file or on the hub, from which its files are fetched.

    Args:
        part: the network's folder in a checkpoint, such as "vae".
        source: a folder with `config.json` and weights, or one of a whole checkpoint; a single file with diffusers' or
            the original repository's names; or a name on the hub, "owner/name", "owner/name/folder" or
            "owner/name/file".
        originals: how single files may have the network.
        variant: is preferred to weights without one.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a web address of something else.
        CheckpointError: it is no network of this kind, or cannot be fetched.
    """
    where = Path(os.path.expanduser(source))
    address = None if os.path.exists(where) else hub.address(str(source))
    if address is not None and has_ending(address.path):
        beside = str(Path(address.path).parent / _CONFIG)
        snapshot = hub.fetch(address.repository, list(map(glob.escape, (address.path, beside))), address.revision)
        where = snapshot / address.path
    elif address is not None:
        where = _fetched(part, address, network, variant)
    if where.is_dir():
        return _in_folder(part, where, network, variant)
    if not where.is_file():
        raise FileNotFoundError(
            f"{part}={str(source)!r} is no file and no folder; give one of the network, or owner/name on the hub"
        )
    # A file without a folder of its own may lie beside another network's config.
    own = where.name.startswith(network.stem) and (where.parent / _CONFIG).is_file()
    config = _config(where.parent, network) if own else None
    return NetworkSource(config, partial(open_network, where, part, originals), file=where)


def _in_folder(part: str, folder: Path, network: Network, variant: str | None) -> NetworkSource:
    for where in (folder, folder / part):
        if (where / _CONFIG).is_file():
            config = _config(where, network)
            choice = find_weights(where, network.stem, variant)
            if choice is None:
                raise CheckpointError(f"{where} has no weights, {network.stem}.safetensors; fetch the whole folder")
            return NetworkSource(config, partial(_opened, where, network.stem, variant), choice.variant)
    raise CheckpointError(f"{folder} has no {_CONFIG}, nor a folder {part} with one; give the folder of a {part}")


def _opened(folder: Path, stem: str, variant: str | None, module: Any) -> Weights:
    return open_weights(folder, stem, variant, module.rename)


def _fetched(part: str, address: hub.Address, network: Network, variant: str | None) -> Path:
    """Fetches a network from its own repository, or from a checkpoint's, and returns the local folder."""
    folders = [address.path] if address.path else ["", part]
    configs = [str(Path(folder) / _CONFIG) for folder in folders]
    snapshot = hub.fetch(address.repository, configs, address.revision)
    for folder, config in zip(folders, configs, strict=True):
        if (snapshot / config).is_file():
            # The class of the network before its weights, which are large.
            _config(snapshot / folder, network)
            fetch_weights(address.repository, snapshot.name, {folder: network.stem}, variant)
            return snapshot / folder
    raise CheckpointError(f"{address.name} has no {' and no '.join(configs)}; name the repository of a {part}")


def _config(folder: Path, network: Network) -> dict[str, Any]:
    """Reads a network's config.

    Raises:
        CheckpointError: it is missing, broken, or of another kind of network.
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
    """Opens the weights of a network in a file that has them alone or among others, under diffusers' or the original
    repository's names, with any prefix.

    Args:
        part, originals: as of `find_network`.
        module: the network, without values.

    Raises:
        CheckpointError: the file is broken, or has none of the network's names.
    """
    tensors = opened(path)
    ways = [_Way(prefix, None, *_count(tensors, module, prefix)) for prefix in _prefixes(tensors, leaves(module))]
    own = {original.start for original in originals}
    for original in {one.names: one for one in originals}.values():  # of which some differ in their prefix alone
        for start in _prefixes(tensors, original.names(module).values()) | own:
            moved = original._replace(start=start)
            ways.append(_Way(start, moved, 0, _overlap(moved, tensors, module), start in own))
    best = max(way.rank for way in ways)
    chosen = [way for way in ways if way.rank == best]
    if all(one.original is None for one in chosen):
        # Modules that know a prefix themselves read the same tensors with and without it.
        same = {_keys(tensors, module, one.prefix): one for one in chosen}
        chosen = list(same.values())
    if not best[0] or len(chosen) > 1:
        tensors.close()
        if not best[0]:
            first = ", ".join(list(tensors.shapes)[:3]) or "nothing"
            raise CheckpointError(f"{path} has no {part} with diffusers' or the original names; it has {first[:200]}")
        names = " and ".join(sorted(repr(way.prefix) for way in chosen))
        raise CheckpointError(f"{path} has several networks that may be the {part}, behind {names}; save one alone")
    (way,) = chosen
    if way.original is not None:
        return OriginalWeights(path, tensors, [way.original], part, module)
    tensors.close()
    prefix = way.prefix
    return opened(path, lambda key: module.rename(key.removeprefix(prefix)) if key.startswith(prefix) else None)


class _Way(NamedTuple):
    """A way to read a network's names in a file."""

    prefix: str
    original: Original | None  # with this prefix; None for diffusers' names
    fitting: int  # parameters whose shapes fit, which is only known of diffusers' names
    named: int  # parameters whose names are there
    own: bool = False  # whether the family's own files have this prefix

    @property
    def rank(self) -> tuple[bool, bool, int, bool, bool, bool]:
        """The higher, the better: names and shapes, then the family's own prefix, then no moving average."""
        ours, average = self.original is None, "ema" in self.prefix
        fits = self.fitting > 0 or (self.named > 0 and not ours)
        return (self.named > 0, fits, self.fitting or self.named, self.own, not average, ours)


def _prefixes(tensors: Tensors, names: Iterable[str]) -> set[str]:
    """Returns what stands before one of the names in a file, and nothing."""
    some = next((name for name in names if "[" not in name), "")
    return {key.removesuffix(some) for key in tensors.shapes if some and key.endswith(some)} | {""}


def _keys(tensors: Tensors, module: Any, prefix: str) -> frozenset[str]:
    """Returns the tensors in a file that are parameters of a network, under diffusers' names behind a prefix."""
    names = leaves(module)
    keys = (key for key in tensors.shapes if key.startswith(prefix))
    return frozenset(key for key in keys if module.rename(key.removeprefix(prefix)) in names)


def _count(tensors: Tensors, module: Any, prefix: str) -> tuple[int, int]:
    """Returns how many of a network's parameters a file has under diffusers' names behind a prefix: with their shapes,
    and in all."""
    shapes = leaves(module)
    known = {module.rename(key.removeprefix(prefix)): tensors.shapes[key] for key in _keys(tensors, module, prefix)}
    return sum(known[name] == shapes[name] for name in known), len(known)


def _overlap(original: Original, tensors: Tensors, module: Any) -> int:
    """Returns how many of a network's tensors a file has under the original's names."""
    names = {name.partition("[")[0] for name in original.full_names(module).values()}
    return len({original.full_name(key, module) for key in tensors.shapes} & names)
