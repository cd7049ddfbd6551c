"""`convert`: a checkpoint's folder to one with the same weights in another form."""

import functools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from convert import deepfloyd, pickles, writers
from convert.destination import whole_or_nothing
from sega_jax.pipelines.loading import describe
from sega_jax.pipelines.progress import bar
from sega_jax.pipelines.sources import find, open_weights
from sega_jax.systems.registry import CHECKER, entry, weight_stem
from sega_jax.weights.pull import CheckpointError, Weights, check, fill, flax_name, read_json
from sega_jax.weights.single_file import is_one
from sega_jax.weights.torch_pickle import PickledTensors

DTYPES = ("float32", "float16", "bfloat16")
# Beside the folders that model_index.json names.
_DOCUMENTS = ("README*", "LICENSE*")
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: DTypeLike | None = None,
    to: str = "orbax",
    variant: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Writes a checkpoint of Stable Diffusion, also XL, its x4 upscaler or a stage of DeepFloyd-IF in another form.

    Both forms are diffusers' folders. For Orbax, the weight files of a network's folder give way to `orbax`, a
    checkpoint of {dotted path of a parameter in our module: array with our axes, channels last}, which `load` and
    any Orbax checkpointer restore, and `orbax.json`, the names that torch's files have for them. A source that
    has the wanted form already is written again. Weights are checked as `load` checks them, so what is written
    loads; unless cast, they keep their dtype and come back from Orbax equal to the last bit.

    Args:
        source: a folder in either form. Weights of diffusers layout are safetensors, or where there are none,
            pickles (`.bin`), which are read without running what they hold. Or a stage of DeepFloyd-IF
            as its own repository has it, `config.yml` and `pytorch_model.bin`: what is written is diffusers' pipeline
            of that stage, but without the text encoder, which such a folder does not hold, and a safety checker.
        dest: the folder to write, new or empty. It appears when it is whole: until then everything is in a hidden
            folder beside it, and what a killed conversion leaves there is removed by the next one.
        dtype: float32, float16 or bfloat16; None keeps every weight's own.
        to: "orbax" or "diffusers".
        variant: "fp16" reads the files that are named so; what is written has no variant.
        progress: whether to show a bar of bytes; None is in terminals and notebooks.

    Returns:
        The written folder.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: dest is there and not empty.
        TypeError: source or dest is no path.
        CheckpointError: the source is no checkpoint, or a file is missing, broken, hostile or does not fit, or a
            weight overflows `dtype`; all but values are checked before anything is written.
        ValueError: an unknown dtype or form, or dest lies inside the source.
        OSError: dest cannot be written to, or its disk is full.
    """
    check_options(to, dtype)
    folder = _folder(source, variant)
    dest = destination(dest, folder)
    with whole_or_nothing(dest) as partial:
        sources, others = _describe(folder, variant)
        write(partial, sources, others, to=to, dtype=dtype, progress=progress)
    return dest


class Source(NamedTuple):
    """A network without values, and what opens its weights."""

    module: Any
    open: Callable[[], Weights]


def check_options(to: str, dtype: DTypeLike | None) -> None:
    """
    Raises:
        ValueError: an unknown form or dtype.
    """
    if to not in list(writers.FORMS):
        raise ValueError(f"to={to!r} should be one of {', '.join(writers.FORMS)}")
    _dtype(dtype)


def destination(dest: str | Path, *sources: Path) -> Path:
    """The whole path of the folder to write.

    Raises:
        TypeError: it is no path.
        ValueError: it lies inside a source.
    """
    if not isinstance(dest, str | os.PathLike):
        raise TypeError(f"dest={dest!r} should be the path of a folder")
    dest = Path(os.path.expanduser(dest)).resolve()
    if any(dest.is_relative_to(source.resolve()) for source in sources):
        raise ValueError(f"{dest} lies inside the source; name a folder elsewhere")
    return dest


def write(
    folder: Path,
    sources: Mapping[str, Source],
    others: Mapping[Path, Path | bytes],
    *,
    to: str,
    dtype: DTypeLike | None,
    progress: bool | None,
) -> None:
    """Writes networks, by their folders' names, and other files, by their paths, in this order; the values are copied
    or are what to write.

    Raises:
        CheckpointError, OSError: as `convert` does.
    """
    dtype = _dtype(dtype)
    size = sum(_size(source, dtype) for source in sources.values())
    sizes = {path: len(what) if isinstance(what, bytes) else what.stat().st_size for path, what in others.items()}
    needed = size + sum(sizes.values())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder.parent} needs {needed:,} bytes and its disk has {free:,} free; name another folder")
    with bar(size + needed, "B", progress, unit_scale=True, unit_divisor=1024) as shown:
        for part, source in sources.items():
            network = _read(source, dtype, shown.update)
            (folder / part).mkdir()
            written = network.nbytes
            writers.FORMS[to](folder / part, network)
            shown.update(written)
        for path, what in others.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(what) if isinstance(what, bytes) else shutil.copyfile(what, folder / path)
            shown.update(sizes[path])


def _folder(source: str | Path, variant: str | None) -> Path:
    if isinstance(source, str | os.PathLike) and str(source):
        folder = Path(os.path.expanduser(source))
        if deepfloyd.is_original(folder):
            return folder
    if is_one(source):
        raise FileNotFoundError(f"{source} is no folder, but a single file, which is for convert_single")
    return find(source).fetch(variant)


def _describe(folder: Path, variant: str | None) -> tuple[dict[str, Source], dict[Path, Path | bytes]]:
    """The networks of a folder, and the other files, as `write` takes them."""
    if not deepfloyd.is_original(folder):
        networks = describe(folder).networks
        sources = {
            part: Source(module, opener(folder / part, weight_stem(part), variant, module.rename))
            for part, module in networks.items()
        }
        files = {path: folder / path for path in _other_files(folder, networks)}
        return sources, files | {Path(path): as_json(content) for path, content in _index(folder).items()}
    if variant is not None:
        raise CheckpointError(f"{folder} is a stage of DeepFloyd-IF, which has no variants; leave {variant!r} out")
    stage = deepfloyd.describe(folder)
    opened = functools.partial(deepfloyd.OriginalTensors, folder, stage.unet)
    documents = {path: folder / path for path in _documents(folder)}
    return {"unet": Source(stage.unet, opened)}, documents | {Path(p): as_json(c) for p, c in stage.files.items()}


def as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def tokenizer_files(folder: Path) -> dict[Path, Path]:
    """The files of a CLIP tokenizer's folder, by where they go in a checkpoint's."""
    return {Path("tokenizer", name): folder / name for name in _TOKENIZER if (folder / name).is_file()}


def _dtype(dtype: DTypeLike | None) -> np.dtype | None:
    try:
        found = dtype if dtype is None else jax.numpy.dtype(dtype)
    except TypeError:
        found = dtype
    if found is not None and getattr(found, "name", None) not in DTYPES:
        raise ValueError(f"dtype={dtype!r} should be one of {', '.join(DTYPES)}, or None to keep every weight's own")
    return found


def opener(folder: Path, stem: str, variant: str | None, rename: Callable[[str], str | None]) -> Callable[[], Weights]:
    """Opens a network's weights, pickles only where there is nothing else."""
    if pickles.is_only_choice(folder, stem, variant):
        return functools.partial(PickledTensors, folder, pickles.stem(stem), variant, rename)
    return functools.partial(open_weights, folder, variant, rename, stem)


def _size(source: Source, dtype: np.dtype | None) -> int:
    """The bytes that a network will have; all that can be wrong with its weights but their values is found here."""
    with source.open() as weights:
        check(source.module, weights)
        return weights.nbytes if dtype is None else dtype.itemsize * sum(map(math.prod, weights.shapes.values()))


def _read(source: Source, dtype: np.dtype | None, update: Callable[[int], Any]) -> writers.Network:
    def place(array: np.ndarray) -> np.ndarray:
        update(array.nbytes)
        return array

    with source.open() as weights:
        filled = jax.tree_util.tree_leaves_with_path(fill(source.module, weights, dtype, place))
        keys = {flax_name(path): weights.keys[weights.layout.name(path)] for path, _ in filled}
        return writers.Network({flax_name(path): array for path, array in filled}, keys, weights.buffers())


def _other_files(folder: Path, networks: Iterable[str]) -> Iterator[Path]:
    """What is copied as it is: configs, the folders of all other components, what a person should read. The index
    comes last: a folder without it is no checkpoint."""
    yield from (Path(part, "config.json") for part in networks)
    index = read_json(folder / "model_index.json")
    for other in sorted(folder.iterdir()):
        if other.is_dir() and other.name in index and other.name not in networks:
            yield from (path.relative_to(folder) for path in sorted(other.rglob("*")) if path.is_file())
    yield from _documents(folder)
    yield Path("model_index.json")


def _index(folder: Path) -> dict[str, dict[str, Any]]:
    """The index without the parts that are not there, such as those that are not fetched from the hub, so that
    diffusers does not look for them; nothing where all are."""
    index = read_json(folder / "model_index.json")
    absent = {part: [None, None] for part in index if entry(index, part) and not (folder / part).is_dir()}
    if not absent:
        return {}
    warnings.warn(f"{folder} has no {', '.join(absent)}, nor has what is written", stacklevel=4)
    unchecked = {"requires_safety_checker": False} if CHECKER in absent else {}
    return {"model_index.json": index | absent | unchecked}


def _documents(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(path.match(name) for name in _DOCUMENTS):
            yield Path(path.name)
