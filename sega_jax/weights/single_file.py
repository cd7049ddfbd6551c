"""Stable Diffusion in one file, with the names of the repositories that it was trained in (`original`).

Beside the networks' tensors such files have others, of training or of what nobody calls, and some of the networks' have
another shape: OpenCLIP's queries, keys and values are one tensor, and the last of its layers in 2.x is not used.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sega_jax.weights.original_names import (
    CLIP,
    CLIP_XL,
    FUSED,
    OPENCLIP,
    OPENCLIP_XL,
    UNET,
    VAE,
    VAE_ATTENTION,
    original_names,
)
from sega_jax.weights.pull import CheckpointError, Entry, Layout, Tensors, from_torch, torch_name, torch_shape
from sega_jax.weights.torch_pickle import CkptTensors

ENDINGS = (".safetensors", ".ckpt")
# Folders in diffusers layout without weights and vocabulary.
_PUBLISHED = Path(__file__).parent / "published"

_STARTS = {
    "unet": (UNET,),
    "vae": (VAE, "vae."),
    "text_encoder": (CLIP, OPENCLIP, CLIP_XL),
    "text_encoder_2": (OPENCLIP_XL,),
}
_EMA = "model_ema."
_REFINER = "conditioner.embedders.0.model."  # its one text encoder is OpenCLIP's
_EDM = {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
# Beside the networks' own tensors: of training, or of what nobody calls.
_OTHERS = {
    "unet": r"$^",
    "vae": r"(?!(encoder|decoder|quant_conv|post_quant_conv)\.)",
    "text_encoder": r".*(position_ids|text_projection(\.weight)?|logit_scale|attn_mask)$",
    "text_encoder_2": r".*(position_ids|logit_scale|attn_mask)$",
}


def is_one(source: Any) -> bool:
    """Whether this names a single file, by its ending."""
    return isinstance(source, str | os.PathLike) and Path(source).suffix in ENDINGS and not Path(source).is_dir()


def opened(path: Path) -> Tensors:
    """All tensors of a file, under its own names.

    Raises:
        CheckpointError: it is missing, broken, or hostile.
    """
    kind = CkptTensors if path.suffix == ".ckpt" else Tensors
    return kind(path.parent, path.stem, None, str)


def check(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a file holds a Stable Diffusion 1.x, 2.x or XL with these names, by the shapes of its tensors.

    Raises:
        CheckpointError: it does not.
    """
    if not any(key.startswith(UNET) for key in shapes):
        raise CheckpointError(f"{path} has no Stable Diffusion's UNet, names that start with {UNET}: {_hint(shapes)}")
    if any(key.startswith(_REFINER) for key in shapes):
        raise CheckpointError(
            f"{path} is Stable Diffusion XL's refiner, which goes on with pictures of the base model: only the base is"
            " supported"
        )
    if not _EDM.isdisjoint(shapes):
        raise CheckpointError(f"{path} is of Stable Diffusion XL with EDM's preconditioning, which is not supported")
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", ())[1:2]
    if channels not in ((), (4,)):
        raise CheckpointError(
            f"{path} takes {channels[0]} channels, as models that fill in, enlarge or know of depth do: only"
            " text-to-image checkpoints are supported, which take 4"
        )


def is_xl(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file holds a Stable Diffusion XL: its UNet is told a pooled text and sizes."""
    return f"{UNET}label_emb.0.0.weight" in shapes


def published(path: Path, shapes: Mapping[str, tuple[int, ...]], prediction_type: str | None = None) -> Path:
    """The folder of configs of the published checkpoint that a file is like, by the shapes of its tensors: Stable
    Diffusion 1.5, 2.1, 2.1-base for "epsilon", or XL's base. What a model predicts does not show; None is v for 2.x, as
    in diffusers.

    Raises:
        CheckpointError: it is like none.
    """
    # XL has no attention on its first level.
    block = 4 if is_xl(shapes) else 1
    width = shapes.get(f"{UNET}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight", (0,))[-1]
    names = {768: "sd-1.5", 1024: "sd-2.1-base" if prediction_type == "epsilon" else "sd-2.1"}
    if is_xl(shapes):
        names = {2048: "sdxl-base-1.0"}
    if width not in names:
        raise CheckpointError(
            f"{path} attends to text of width {width}, which is 768 for Stable Diffusion 1.x, 1024 for 2.x and 2048 for"
            " XL; give config=, a folder in diffusers layout with its configs"
        )
    return _PUBLISHED / names[width]


def _hint(keys: Iterable[str]) -> str:
    if any("lora" in key for key in keys):
        return "it is a LoRA, which goes with a checkpoint as lora="
    if any(key.startswith(("down_blocks.", "encoder.", "text_model.")) for key in keys):
        return "it is one network in diffusers layout, give the folder of the whole checkpoint"
    return f"it has {', '.join(key[:80] for key in list(keys)[:3]) or 'nothing'}"


class OriginalWeights:
    """The weights of one network of a single file, under the original's names. Queries, keys and values are apart where
    the original has them in one tensor, and the autoencoder's attention has matrices where that is of 1x1 convolutions.

    Args:
        path: the file's.
        tensors: all of it, closed with this.
        part: "unet", "vae" or "text_encoder".
        module: the network, without values.
        ema: of a UNet, the moving average in place of the last step's weights.

    Raises:
        CheckpointError: the file has none of them.
    """

    def __init__(self, path: Path, tensors: Tensors, part: str, module: Any, *, ema: bool = False):
        self.folder, self._tensors = path, tensors
        try:
            names, rename = _renaming(path, tensors.shapes, part, module, ema)
            self._entries = _entries(path, tensors, rename)
        except BaseException:
            self.__exit__()
            raise
        self.layout = Layout(lambda path: names[torch_name(path)], torch_shape, from_torch)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.keys = {name: key for key, name in names.items()}
        self.nbytes = sum(entry.nbytes for entry in self._entries.values())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].read()

    def buffers(self) -> dict[str, np.ndarray]:
        return {}

    def __enter__(self) -> "OriginalWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.__exit__()


def _renaming(
    path: Path, keys: Iterable[str], part: str, module: Any, ema: bool
) -> tuple[dict[str, str], Callable[[str], str | None]]:
    """`original_names`, and from a file's keys to them; to None for what is of another network."""
    start = next((start for start in _STARTS[part] if any(key.startswith(start) for key in keys)), None)
    if start is None:
        raise CheckpointError(
            f"{path} has no {part}, names that start with {' or '.join(_STARTS[part])}; give {part}=, another"
            f" pipeline's (pipe.models.{part})"
        )
    names = original_names(module, VAE if part == "vae" else start)
    if ema and part == "unet":
        averages = {_average_name(name): name for name in names.values()}
        if averages.keys().isdisjoint(keys):
            raise CheckpointError(f"{path} has no moving average, names that start with {_EMA}; leave ema out")
        return names, averages.get
    # OpenCLIP's last layer is not used in 2.x.
    unused = f"{OPENCLIP}transformer.resblocks.{module.config.num_hidden_layers}." if start == OPENCLIP else None
    return names, partial(_own_name, part=part, start=start, unused=unused)


def _entries(path: Path, tensors: Tensors, rename: Callable[[str], str | None]) -> dict[str, Entry]:
    """The tensors of one network, by the original's names."""
    found: dict[str, Entry] = {}
    for key, entry in tensors.entries.items():
        if (name := rename(key)) is None:
            continue
        for own, piece in _pieces(name, entry):
            if own in found:
                both = f"{entry.key} and {found[own].key}"
                raise CheckpointError(f"{path}: {both} are the same parameter; fetch it again")
            found[own] = piece
    return found


def _own_name(key: str, part: str, start: str, unused: str | None) -> str | None:
    """The original's name of a tensor of this network; None for others."""
    name = key.removeprefix(start)
    if name == key or re.match(_OTHERS[part], name) or (unused and key.startswith(unused)):
        return None
    if part == "vae":
        for ours, (theirs, *others) in VAE_ATTENTION.items():
            for other in (ours, *others):
                name = name.replace(f"mid.attn_1.{other}.", f"mid.attn_1.{theirs}.")
        return VAE + name
    if start in (CLIP, CLIP_XL):
        name = f"text_model.{name.removeprefix('text_model.')}"
    return start + name


def _average_name(name: str) -> str:
    return _EMA + name.removeprefix("model.").replace(".", "")


def _pieces(name: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """The parameters in a tensor."""
    if name.endswith(".text_projection") and len(entry.shape) == 2:
        yield name, entry._replace(shape=entry.shape[::-1], read=partial(_turned, entry.read))
        return
    if ".mid.attn_1." in name and entry.shape[2:] in ((1,), (1, 1)):
        yield name, entry._replace(shape=entry.shape[:2], read=partial(_reshaped, entry.read, entry.shape[:2]))
    elif name.endswith((".in_proj_weight", ".in_proj_bias")) and entry.shape and entry.shape[0] % len(FUSED) == 0:
        rows = entry.shape[0] // len(FUSED)
        shape, nbytes = (rows, *entry.shape[1:]), entry.nbytes // len(FUSED)
        for i, part in enumerate(FUSED):
            read = partial(_rows, entry.read, i * rows, rows)
            yield f"{name}[{part}]", Entry(f"{entry.key}[{part}]", shape, nbytes, read)
    else:
        yield name, entry


def _reshaped(read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return read().reshape(shape)


def _turned(read: Callable[[], np.ndarray]) -> np.ndarray:
    return read().T


def _rows(read: Callable[[], np.ndarray], start: int, count: int) -> np.ndarray:
    return read()[start : start + count]
