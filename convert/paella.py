"""Paella's published files, each one network's, to one folder in the layout of the others."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jax.typing import DTypeLike

from convert.conversion import Source, check_options, destination, tokenizer_files, write
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.paella import Paella, PaellaConfig
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.pipelines.weight_files import open_weights
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.text.tokenizers import Tokenizer
from sega_jax.weights.destination import atomic_folder
from sega_jax.weights.torch_pickle import PickledTensors
from sega_jax.weights.write import as_json

# Each network's published file without ending, its class and its config.
NETWORKS: dict[str, tuple[str, type[Any], Any]] = {
    "denoiser": ("paella_v3", Paella, PaellaConfig),
    "vqgan": ("vqgan_f4", VQModel, VQConfig),
    "prior": ("prior_v1", PriorModel, PriorConfig),
}


class PublishedTensors(PickledTensors):
    """The tensors of a published file `STEM.pt`, or of one that the training script left, which has them as its
    `state_dict` and, smoothed, `ema_state_dict`.

    Raises:
        CheckpointError: as of `PickledTensors`.
    """

    ending = "pt"

    def _within(self, found: Any) -> Any:
        for key in ("ema_state_dict", "state_dict"):
            if isinstance(found, dict) and isinstance(found.get(key), dict):
                return found[key]
        return found


def is_published(source: str | Path) -> bool:
    """Whether a folder has one of the published files."""
    return any(Path(os.path.expanduser(source), f"{stem}.pt").is_file() for stem, _, _ in NETWORKS.values())


def convert_paella(
    source: str | Path,
    dest: str | Path,
    *,
    byt5: str | Path | None = None,
    openclip: str | Path | None = None,
    dtype: DTypeLike | None = None,
    to: str = "diffusers",
    configs: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    progress: bool | None = None,
) -> Path:
    """Writes Paella's published files, and the text encoders it was trained with, as one checkpoint.

    It has a folder a network, each with weights in the form `to` and config.json: `denoiser`, `vqgan` and `prior`;
    where they are given also `byt5`, ByT5's encoder, and `clip`, OpenCLIP's text encoder with its projection, beside
    `tokenizer`. Without `clip` the prior is not loaded, since it goes from its embeddings. `model_index.json` names
    the class of each, of a `PaellaPipeline`.

    Args:
        source: a folder with `paella_v3.pt`, `vqgan_f4.pt` and `prior_v1.pt`, pickles, which are read without running
            what they hold.
        dest: the folder to write, new or empty, which appears when it is whole.
        byt5: the folder of google/byt5-xl, or of its encoder alone.
        openclip: the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K in transformers' layout, or of its text encoder.
        dtype: float32, float16 or bfloat16; None keeps every weight's own.
        to: "orbax" or "diffusers", which is safetensors.
        configs: what of the first three networks is not as published, by name.
        progress: whether to show a bar of bytes; None is in terminals and notebooks.

    Returns:
        The written folder.

    Raises:
        FileNotFoundError: a folder that is none.
        FileExistsError: dest is there and not empty.
        TypeError: dest is no path.
        CheckpointError: a file is missing, broken, hostile or does not fit, with every missing, extra and misshapen
            tensor, or a weight overflows `dtype`; all but values are checked before anything is written.
        ValueError: an unknown dtype, form or network, a config that is not supported, or dest lies inside a source.
        OSError: dest cannot be written to, or its disk is full.
    """
    check_options(to, dtype)
    if unknown := configs.keys() - NETWORKS.keys():
        raise ValueError(f"configs has {', '.join(sorted(unknown))}, expected of {', '.join(NETWORKS)}")
    folder = _folder(source)
    texts = [None if path is None else _folder(path) for path in (byt5, openclip)]
    missing = [f"{stem}.pt" for stem, _, _ in NETWORKS.values() if not (folder / f"{stem}.pt").is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}; fetch all three files into one folder")
    dest = destination(dest, folder, *(text for text in texts if text))

    with atomic_folder(dest) as partly:
        sources: dict[str, Source] = {}
        others: dict[Path, Path | bytes] = {}
        index: dict[str, Any] = {"_class_name": "PaellaPipeline"}
        index |= {part: [None, None] for part in ("byt5", "clip", "tokenizer")}
        for part, (stem, kind, config_kind) in NETWORKS.items():
            config = config_kind.from_dict(configs.get(part, {}))
            module = kind(config)
            sources[part] = Source(module, partial(PublishedTensors, folder, stem, None, module.rename))
            others[Path(part, "config.json")] = as_json({"_class_name": kind.__name__} | config._asdict())
            index[part] = ["sega_jax", kind.__name__]
        for part, text, read in zip(("byt5", "clip"), texts, (_byt5, _clip), strict=True):
            if text is not None:
                sources[part], config, files = read(text)
                others[Path(part, "config.json")] = as_json(config)
                others |= files
                index[part] = ["transformers", type(sources[part].module).__name__]
        if texts[1] is None:
            # It goes from CLIP's embeddings, and waits for them.
            index["prior"] = [None, None]
        else:
            index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        others[Path("model_index.json")] = as_json(index)
        write(partly, sources, others, to=to, dtype=dtype, progress=progress)
    return dest


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{path!r} should be the path of a folder")
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    return folder


def _byt5(folder: Path) -> tuple[Source, dict[str, Any], dict[Path, Path]]:
    """ByT5's encoder, its config, and no files."""
    config = read_json(folder / "config.json")
    module = _built(folder, lambda: T5EncoderModel(T5Config.from_dict(config)))

    source = Source(module, partial(open_weights, folder, "model", None, module.rename), "model")
    return source, config | {"architectures": ["T5EncoderModel"]}, {}


def _clip(folder: Path) -> tuple[Source, dict[str, Any], dict[Path, Path]]:
    """OpenCLIP's text encoder, its config, and the files of its tokenizer."""
    whole = read_json(folder / "config.json")
    config = whole.get("text_config") or whole
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: text_config={config!r} should be an object of settings")
    config = config | {
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": whole.get("projection_dim", config.get("projection_dim")),
    }
    module = _built(folder, lambda: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)))
    Tokenizer(folder, module.config.max_position_embeddings, module.config.vocab_size)

    def rename(key: str) -> str | None:
        other = key.startswith(("vision_model.", "visual_projection.")) or key == "logit_scale"
        return None if other else module.rename(key)

    source = Source(module, partial(open_weights, folder, "model", None, rename), "model")
    return source, config, tokenizer_files(folder)


def _built(folder: Path, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
