"""Reads the tensors of one network from files: first all names and shapes, then the arrays one at a time."""

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

from sega_jax.method.naming import assignment
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.weights import float8
from sega_jax.weights.layout import TORCH, Entry, Layout

# Names of arrays that no module needs: tensors that declare settings (see `declared`), and torch's buffers.
_DECLARES = re.compile(r"^(v_pred|ztsnr)$")
_BUFFERS = re.compile(rf"(^|\.)(position_ids|num_batches_tracked)$|{_DECLARES.pattern}")
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
# Common extensions of weight files.
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# An upper bound on the size of a safetensors header, in bytes. The safetensors library reads at most 100 million bytes.
_LONGEST_HEADER = 2**30
# {kind of file that may be found in place of a safetensors file: remedy}.
_PICKLED = "rename it to .bin, the extension of torch's files, or fetch .safetensors"
_REMEDIES = {
    "a zip file": _PICKLED,
    "a pickle": _PICKLED,
    "a Git LFS pointer": "fetch the file itself (git lfs pull)",
    "a web page": "fetch it again, with an access token if the page asks for one",
}


class Weights(Protocol):
    """The arrays of one network, stored in files. Names and shapes are known; the arrays are read one at a time."""

    folder: Path
    layout: Layout
    shapes: dict[str, tuple[int, ...]]  # {name in the layout: shape}
    keys: dict[str, str]  # {name in the layout: key in torch's files}
    sizes: dict[str, int]  # {name in the layout: size in bytes}

    @property
    def spare(self) -> Collection[str]:
        """Returns the keys (as in torch's files) of arrays that no module needs."""

    def __getitem__(self, name: str) -> np.ndarray: ...

    def buffers(self) -> dict[str, np.ndarray]:
        """Reads the arrays that no module needs and returns {key in torch's files: array}."""

    def __enter__(self) -> "Weights": ...

    def __exit__(self, *_: object) -> None: ...


def declared(spare: Collection[str]) -> dict[str, Any]:
    """Returns the scheduler settings that a UNet's file declares, as entries of a scheduler's config.

    Files of fine-tuned Stable Diffusion XL models may contain two empty tensors: `v_pred` means that the network
    predicts v, and `ztsnr` means that the network was trained with zero terminal SNR.

    Args:
        spare: the names of tensors in the file that no module needs.
    """
    predicts = {"prediction_type": "v_prediction"} if "v_pred" in spare else {}
    return predicts | ({"rescale_betas_zero_snr": True} if "ztsnr" in spare else {})


class Tensors:
    """Reads the tensors in one network's folder. Opening the files reads only the shapes; tensors are read one by one.

    Args:
        folder: the folder that contains `STEM.safetensors`, or `STEM.safetensors.index.json` and its shards.
        stem: the weight file's name in diffusers or transformers, without its extension.
        variant: the variant of the weight file; "fp16" reads `STEM.fp16.safetensors`.
        rename: translates a key in the file to the module's key, or to None for a tensor of a different network.
            Several keys in the file may map to the same key if their tensors are equal.

    Raises:
        CheckpointError: a file is missing or broken.
    """

    layout = TORCH
    ending = "safetensors"

    def __init__(self, folder: Path, stem: str, variant: str | None, rename: Callable[[str], str | None]):
        self._read(folder, _files(folder, stem, variant, self.ending), rename)

    @classmethod
    def of_file(cls, path: Path, rename: Callable[[str], str | None] = str) -> "Tensors":
        """Opens a single file with any name.

        Args:
            path: the file.
            rename: as for the class.

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
        self.entries: dict[str, Entry] = {}  # {key in the module: tensor}
        self._buffers: dict[str, Callable[[], np.ndarray]] = {}
        try:
            entries: dict[str, tuple[Path, Entry]] = {}
            for path in paths:
                for entry in self._open(path):
                    _, other = entries.setdefault(entry.key, (path, entry))
                    if other is not entry and not _are_equal(entry, other):
                        raise CheckpointError(
                            f"{path}: {entry.key} differs from the same tensor in another file; fetch both files again"
                        )
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
                keys = f"{entry.key} and {self.keys[name]}"
                raise CheckpointError(f"{path}: {keys} are the same parameter {name}, but differ; fetch the file again")
            return
        self.keys[name] = entry.key
        self.shapes[name] = entry.shape
        self.sizes[name] = entry.nbytes
        self.entries[name] = entry

    def _open(self, path: Path) -> Iterator[Entry]:
        try:
            file = self._stack.enter_context(safe_open(path, framework="numpy"))
            eight_bit: dict[str, Entry] = {}
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = file.get_slice(key)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if dtype in float8.DTYPES:
                    eight_bit = eight_bit or float8.in_safetensors(path)
                    yield eight_bit[key]
                else:
                    nbytes = math.prod(shape) * _SIZES.get(dtype, 1)
                    yield Entry(key, shape, nbytes, partial(_read_tensor, file, path, key))
        except (SafetensorError, OSError) as error:
            if (kind := looks_like(path)) in _REMEDIES:
                raise CheckpointError(f"{path} is {kind}, expected a safetensors file; {_REMEDIES[kind]}") from None
            raise CheckpointError(
                f"{path} is missing, truncated or not a safetensors file ({error}); fetch it again"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    @property
    def spare(self) -> Collection[str]:
        return self._buffers.keys()

    def buffers(self) -> dict[str, np.ndarray]:
        return {key: read() for key, read in self._buffers.items()}

    def close(self) -> None:
        """Closes the files. Tensors cannot be read afterwards."""
        self._stack.close()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _are_equal(first: Entry, second: Entry) -> bool:
    return first.shape == second.shape and np.array_equal(first.read(), second.read())


def _read_tensor(file: Any, path: Path, key: str) -> np.ndarray:
    try:
        return file.get_tensor(key)
    except (SafetensorError, AttributeError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: cannot read {key} because its dtype {file.get_slice(key).get_dtype()} is not supported; fetch"
            " the weights in a different dtype"
        ) from None


def looks_like(path: Path) -> str | None:
    """Returns the kind of a file, judged by its first bytes, or None if the file is missing or its kind is unknown."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    # This test comes first because the length of a safetensors header may look like the start of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER:
        return "a safetensors file"
    if start[:4] == b"PK\3\4":
        return "a zip file"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return None


def weight_names(stem: str, variant: str | None, ending: str) -> tuple[str, str]:
    """Returns the name of a weight file, and the name of the index that replaces it if the weights are sharded."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.{ending}", f"{stem}.{ending}.index{dot}.json"


def weight_files(stem: str, variant: str | None, ending: str = "safetensors") -> list[str]:
    """Returns shell patterns for the names of a network's weight files."""
    file, index = weight_names(stem, variant, ending)
    shards = [file.replace(f".{ending}", f"-*-of-*.{ending}")]
    shards += [f"{stem}-*-of-*.{variant}.{ending}"] if variant else []
    return [file, index, *shards]


def has_weights(folder: Path, stem: str, variant: str | None, ending: str = "safetensors") -> bool:
    """Returns whether a folder contains a network's weight file, or the index of its shards."""
    return any((folder / name).is_file() for name in weight_names(stem, variant, ending))


def _files(folder: Path, stem: str, variant: str | None, ending: str) -> Iterable[Path]:
    """Returns the path of a network's weight file, or the paths of its shards."""
    file, index = (folder / name for name in weight_names(stem, variant, ending))
    if file.is_file():
        return [file]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{index}: weight_map should be an object that maps names to files; fetch it again")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} lists {name!r}, which is not in its folder; fetch the index again")
            if not os.path.isfile(folder / name):  # `Path.is_file` raises an error if a name is too long
                raise CheckpointError(f"{folder / name} is missing, although {index.name} lists it; fetch it again")
        return [folder / name for name in names]
    raise CheckpointError(f"{file} is missing. {_remedy(folder, stem, ending)}")


def variants(folder: Path, stem: str, ending: str = "safetensors") -> list[str]:
    """Returns the variants of the weights in a folder. "" means weights without a variant."""
    names = [path.name for path in folder.glob(f"{stem}*")] if folder.is_dir() else []
    return sorted({v for name in names if (v := _variant(name, stem, ending)) is not None})


def in_words(variants: Iterable[str]) -> str:
    """Lists variants as text, each in the form of the argument that selects it."""
    return " or ".join("no variant" if variant == "" else assignment("variant", variant) for variant in variants)


def _remedy(folder: Path, stem: str, ending: str) -> str:
    """Returns text that suggests a remedy for a folder without the requested weight file."""
    if choices := variants(folder, stem, ending):
        return f"The folder has weights for {in_words(choices)}"
    others = sorted(path.name for path in folder.glob(f"{stem}.*")) if folder.is_dir() else []
    if others:
        return f"The folder has {', '.join(others)}, which is not supported; fetch .safetensors"
    return f"Is {folder.parent} a complete checkpoint in diffusers' layout?"


def _variant(name: str, stem: str, ending: str) -> str | None:
    """Returns the variant in a weight file's name ("" for none), or None if the file is not a weight file."""
    stem, ending = re.escape(stem), re.escape(ending)
    match = re.fullmatch(rf"{stem}(?:\.(?P<a>[^.]+))?\.{ending}|{stem}\.{ending}\.index(?:\.(?P<b>[^.]+))?\.json", name)
    return None if match is None else re.sub(r"-\d+-of-\d+$", "", match["a"] or match["b"] or "")
