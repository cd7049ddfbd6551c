"""The tensors of one network in files: names and shapes are known at once, values are read one tensor at a time."""

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights import float8
from sega_jax.weights.layout import TORCH, Entry, Layout

# Arrays in files that no module needs: torch's buffers, and what `declared` knows.
_DECLARES = re.compile(r"^(v_pred|ztsnr)$")
_BUFFERS = re.compile(rf"(^|\.)(position_ids|num_batches_tracked)$|{_DECLARES.pattern}")
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
# The usual endings of files of tensors.
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Bytes of a safetensors header, of which the library that reads them takes 100 million.
_LONGEST_HEADER = 2**30
# What a file may be instead of a safetensors file, and the remedy.
_PICKLED = "give its ending .bin, which torch writes, or fetch .safetensors"
_REMEDIES = {
    "a zip file": _PICKLED,
    "a pickle": _PICKLED,
    "the pointer to a file of Git LFS": "fetch the file itself (git lfs pull)",
    "a web page": "fetch it again, with the token that it may ask for",
}


class Weights(Protocol):
    """The arrays of one network. Names and shapes are known; values are read one array at a time."""

    folder: Path
    layout: Layout
    shapes: dict[str, tuple[int, ...]]  # by the layout's name
    keys: dict[str, str]  # keys in torch's files, by the layout's name
    sizes: dict[str, int]  # bytes, by the layout's name

    @property
    def spare(self) -> Collection[str]:
        """The keys in torch's files of arrays that no module needs."""

    def __getitem__(self, name: str) -> np.ndarray: ...

    def buffers(self) -> dict[str, np.ndarray]:
        """Reads the arrays that no module needs, by their keys in torch's files."""

    def __enter__(self) -> "Weights": ...

    def __exit__(self, *_: object) -> None: ...


def declared(spare: Collection[str]) -> dict[str, Any]:
    """Returns what a UNet's file says of its schedule, as entries of a scheduler's config.

    Fine-tuned files of Stable Diffusion XL have empty tensors named `v_pred`, for a network that predicts v, and
    `ztsnr`, for a training that ended without signal.

    Args:
        spare: the names of tensors in the file that no module needs.
    """
    predicts = {"prediction_type": "v_prediction"} if "v_pred" in spare else {}
    return predicts | ({"rescale_betas_zero_snr": True} if "ztsnr" in spare else {})


class Tensors:
    """The tensors in one network's folder. Shapes are read at once, values one tensor at a time.

    Args:
        folder: contains `STEM.safetensors`, or `STEM.safetensors.index.json` and the shards that it names.
        stem: the name of the weight file without its ending, as diffusers or transformers have it.
        variant: "fp16" reads `STEM.fp16.safetensors`.
        rename: returns the module's key for a key in the file, or None for a tensor of another network. A parameter may
            have several keys in the file if the values are equal.

    Raises:
        CheckpointError: a file is missing or broken.
    """

    layout = TORCH
    ending = "safetensors"

    def __init__(self, folder: Path, stem: str, variant: str | None, rename: Callable[[str], str | None]):
        self._read(folder, _files(folder, stem, variant, self.ending), rename)

    @classmethod
    def of_file(cls, path: Path, rename: Callable[[str], str | None] = str) -> "Tensors":
        """Opens one file of any name.

        Args:
            rename: as of the class.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        self = cls.__new__(cls)
        self._read(path, [path], rename)
        return self

    def _read(self, folder: Path, paths: Iterable[Path], rename: Callable[[str], str | None]) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self._stack = ExitStack()
        self.entries: dict[str, Entry] = {}  # by the module's name
        self._buffers: dict[str, Callable[[], np.ndarray]] = {}
        try:
            entries: dict[str, tuple[Path, Entry]] = {}
            for path in paths:
                for entry in self._open(path):
                    _, other = entries.setdefault(entry.key, (path, entry))
                    if other is not entry and not _are_equal(entry, other):
                        raise CheckpointError(f"{path}: {entry.key} differs from another file's; fetch both again")
            scaled = float8.scaled(folder, [entry for _, entry in entries.values()])
            for key, (path, _) in entries.items():
                if key in scaled and (name := key if _DECLARES.search(key) else rename(key)) is not None:
                    self._add(path, scaled[key], name)
        except BaseException:
            self._stack.close()
            raise

    def _add(self, path: Path, entry: Entry, name: str) -> None:
        if _BUFFERS.search(entry.key):
            self._buffers[entry.key] = entry.read
            return
        if name in self.keys:
            if not _are_equal(entry, self.entries[name]):
                both = f"{entry.key} and {self.keys[name]}"
                raise CheckpointError(f"{path}: {both} are the same parameter {name}, but differ; fetch it again")
            return
        self.keys[name] = entry.key
        self.shapes[name] = entry.shape
        self.sizes[name] = entry.nbytes
        self.entries[name] = entry

    def _open(self, path: Path) -> Iterator[Entry]:
        try:
            file = self._stack.enter_context(safe_open(path, framework="numpy"))
            eighths: dict[str, Entry] = {}
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_slice(key)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if dtype in float8.DTYPES:
                    eighths = eighths or float8.in_safetensors(path)
                    yield eighths[key]
                else:
                    nbytes = math.prod(shape) * _SIZES.get(dtype, 1)
                    yield Entry(key, shape, nbytes, partial(_read_tensor, file, path, key))
        except (SafetensorError, OSError) as error:
            if (kind := looks_like(path)) in _REMEDIES:
                raise CheckpointError(f"{path} is {kind}, expected a safetensors file; {_REMEDIES[kind]}") from None
            raise CheckpointError(
                f"{path} is missing, truncated or no safetensors file ({error}); fetch it again"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    @property
    def spare(self) -> Collection[str]:
        return self._buffers.keys()

    def buffers(self) -> dict[str, np.ndarray]:
        return {key: read() for key, read in self._buffers.items()}

    def close(self) -> None:
        """Closes the files, of which nothing can be read any more."""
        self._stack.close()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _are_equal(one: Entry, other: Entry) -> bool:
    return one.shape == other.shape and np.array_equal(one.read(), other.read())


def _read_tensor(file: Any, path: Path, key: str) -> np.ndarray:
    try:
        return file.get_tensor(key)
    except (SafetensorError, AttributeError, TypeError, ValueError):
        raise CheckpointError(f"{path}: cannot read {key} of type {file.get_slice(key).get_dtype()}") from None


def looks_like(path: Path) -> str | None:
    """Tells by its first bytes what a file is; None if it is missing or of an unknown kind."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    # The length of a safetensors header may begin like a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER:
        return "a safetensors file"
    if start[:4] == b"PK\3\4":
        return "a zip file"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle"
    if start.startswith(b"version https://git-lfs"):
        return "the pointer to a file of Git LFS"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return None


def weight_names(stem: str, variant: str | None, ending: str) -> tuple[str, str]:
    """Returns the names of a weight file and of the index that replaces it if the weights are sharded."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.{ending}", f"{stem}.{ending}.index{dot}.json"


def weight_files(stem: str, variant: str | None, ending: str = "safetensors") -> list[str]:
    """Returns patterns of the names that a network's weight files may have."""
    whole, index = weight_names(stem, variant, ending)
    shards = [whole.replace(f".{ending}", f"-*-of-*.{ending}")]
    shards += [f"{stem}-*-of-*.{variant}.{ending}"] if variant else []
    return [whole, index, *shards]


def has_weights(folder: Path, stem: str, variant: str | None, ending: str = "safetensors") -> bool:
    """Tells whether a folder has a network's weight file, or the index of its shards."""
    return any((folder / name).is_file() for name in weight_names(stem, variant, ending))


def _files(folder: Path, stem: str, variant: str | None, ending: str) -> Iterable[Path]:
    """Returns the paths of a network's weight file or of its shards."""
    whole, index = (folder / name for name in weight_names(stem, variant, ending))
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{index} has no weight_map of names to files")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, a file outside its own folder")
            if not os.path.isfile(folder / name):  # Path.is_file raises on names that are too long
                raise CheckpointError(f"{folder / name} is missing, although {index.name} names it; fetch it again")
        return [folder / name for name in names]
    raise CheckpointError(f"{whole} is missing. {_remedy(folder, stem, ending)}")


def variants(folder: Path, stem: str, ending: str = "safetensors") -> list[str]:
    """Returns the variants of the weights in a folder, "" for no variant."""
    names = [path.name for path in folder.glob(f"{stem}*")] if folder.is_dir() else []
    return sorted({v for name in names if (v := _variant(name, stem, ending)) is not None})


def in_words(variants: Iterable[str]) -> str:
    """Lists variants as they are to be given."""
    return " or ".join("no variant" if one == "" else f'variant="{one}"' for one in variants)


def _remedy(folder: Path, stem: str, ending: str) -> str:
    """Returns a hint for a folder without the requested weight file."""
    if choices := variants(folder, stem, ending):
        return f"The folder has weights for {in_words(choices)}"
    there = sorted(path.name for path in folder.glob(f"{stem}.*")) if folder.is_dir() else []
    if there:
        return f"The folder has {', '.join(there)}, which is not read; fetch .safetensors"
    return f"Is {folder.parent} a whole checkpoint in diffusers layout?"


def _variant(name: str, stem: str, ending: str) -> str | None:
    """Returns the variant in a weight file's name, "" for no variant; None if it is no name of a weight file."""
    stem, ending = re.escape(stem), re.escape(ending)
    match = re.fullmatch(rf"{stem}(?:\.(?P<a>[^.]+))?\.{ending}|{stem}\.{ending}\.index(?:\.(?P<b>[^.]+))?\.json", name)
    return None if match is None else re.sub(r"-\d+-of-\d+$", "", match["a"] or match["b"] or "")
