"""Implements `convert_paella`, which combines Paella's published files (one network each) into one checkpoint."""

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

# {network: (stem of the published file, network class, config class)}.
NETWORKS: dict[str, tuple[str, type[Any], Any]] = {
    "denoiser": ("paella_v3", Paella, PaellaConfig),
    "vqgan": ("vqgan_f4", VQModel, VQConfig),
    "prior": ("prior_v1", PriorModel, PriorConfig),
}


class PublishedTensors(PickledTensors):
    """Reads the tensors in a published file `STEM.pt`, or in a checkpoint from the training script.

    The training script stores the weights under `state_dict` and their moving average under `ema_state_dict`. The
    moving average is preferred.

    Raises:
        CheckpointError: as for `PickledTensors`.
    """

    ending = "pt"

    def _within(self, content: Any) -> Any:
        for key in ("ema_state_dict", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                return content[key]
        return content


def is_published(source: str | Path) -> bool:
    """Returns whether a folder contains one of the published files."""
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
    """Combines Paella's published files, and optionally its text encoders, into one checkpoint.

    The checkpoint has one folder with weights and config.json for each network: `denoiser`, `vqgan` and `prior`. The
    text encoders, if given, are in `byt5` (ByT5's encoder) and `clip` (OpenCLIP's text encoder with its projection).
    The tokenizer of `clip` is in `tokenizer`. `model_index.json` describes a `PaellaPipeline` and names the class of
    each network. Without `clip`, it marks the prior as absent, because the prior needs the embeddings from `clip`.

    Args:
        source: a folder with `paella_v3.pt`, `vqgan_f4.pt` and `prior_v1.pt`. These are pickles; their code is not run.
        dest: a new or empty folder. It appears only when it is complete.
        byt5: a folder with google/byt5-xl, or only its encoder; None omits it.
        openclip: a folder with laion/CLIP-ViT-H-14-laion2B-s32B-b79K in transformers' layout, or only its text encoder;
            None omits it.
        dtype: float32, float16 or bfloat16; None keeps the dtype of every weight.
        to: "diffusers" for safetensors files, or "orbax".
        configs: {network: config options that differ from the published config}, for `denoiser`, `vqgan` and `prior`.
        progress: whether to show a progress bar; None shows it in terminals and notebooks.

    Returns:
        The absolute path of the written folder.

    Raises:
        FileNotFoundError: a folder does not exist.
        FileExistsError: `dest` exists and is not empty.
        TypeError: `source`, `dest`, `byt5` or `openclip` is not a path.
        CheckpointError: a file is missing, broken or hostile; it does not fit its network (the error lists every
            missing, extra and misshapen tensor); or a weight overflows `dtype`. Everything except the values of the
            weights is checked before anything is written.
        ValueError: the dtype, the format or a network's name is unknown, a config is not supported, or `dest` is inside
            a source.
        OSError: `dest` cannot be written, or the disk is full.
    """
    check_options(to, dtype)
    if unknown := configs.keys() - NETWORKS.keys():
        raise ValueError(f"configs has unknown networks {', '.join(sorted(unknown))}, expected {', '.join(NETWORKS)}")
    folder = _folder(source)
    texts = [None if path is None else _folder(path) for path in (byt5, openclip)]
    missing = [f"{stem}.pt" for stem, _, _ in NETWORKS.values() if not (folder / f"{stem}.pt").is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}; fetch all three files into one folder")
    dest = destination(dest, folder, *(text for text in texts if text))

    with atomic_folder(dest) as partial_folder:
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
            # The prior needs CLIP's embeddings. Its weights are written, but are not loaded without CLIP.
            index["prior"] = [None, None]
        else:
            index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        others[Path("model_index.json")] = as_json(index)
        write(partial_folder, sources, others, to=to, dtype=dtype, progress=progress)
    return dest


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{path!r} should be the path of a folder")
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give an existing folder")
    return folder


def _byt5(folder: Path) -> tuple[Source, dict[str, Any], dict[Path, Path]]:
    """Returns ByT5's encoder, its config, and an empty mapping for its tokenizer's files, because there are none."""
    config = read_json(folder / "config.json")
    module = _built(folder, lambda: T5EncoderModel(T5Config.from_dict(config)))

    source = Source(module, partial(open_weights, folder, "model", None, module.rename), "model")
    return source, config | {"architectures": ["T5EncoderModel"]}, {}


def _clip(folder: Path) -> tuple[Source, dict[str, Any], dict[Path, Path]]:
    """Returns OpenCLIP's text encoder, its config, and the files of its tokenizer."""
    whole = read_json(folder / "config.json")
    config = whole.get("text_config") or whole
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: text_config={config!r} should be a JSON object of options")
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
    """Returns the result of `build`. Adds the config file's path to the messages of errors that `build` raises."""
    try:
        return build()
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
