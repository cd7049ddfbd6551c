"""Implements `convert_single`, which converts a single-file Stable Diffusion checkpoint to a folder."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from convert.conversion import Source, check_options, destination, tokenizer_files, write
from sega_jax.method.naming import assignment
from sega_jax.pipelines.load_options import PREDICTIONS
from sega_jax.pipelines.loading import describe
from sega_jax.pipelines.sources import find, names_file
from sega_jax.systems.registry import CHECKER, recognise, weight_stem
from sega_jax.text.files import read_json
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights.destination import atomic_folder
from sega_jax.weights.single_file import ENDINGS
from sega_jax.weights.write import as_json

# {path in the checkpoint: path of the file to copy, or content}, for all files except weights.
Files = dict[Path, Path | bytes]


def convert_single(
    source: str | Path,
    dest: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
    dtype: DTypeLike | None = None,
    to: str = "diffusers",
    progress: bool | None = None,
) -> Path:
    """Converts a single-file Stable Diffusion 1.x, 2.x or XL checkpoint to a folder without a safety checker.

    The tensors in the file must have the names that the original repositories use.

    Args:
        source: a `.safetensors` file, a pickle such as `.ckpt` (its code is not run), or a file on the hub,
            "owner/name/file".
        dest: a new or empty folder. It appears only when it is complete.
        tokenizer: a folder with CLIP's vocabulary (vocab.json and merges.txt), which single files do not contain. None
            uses the vocabulary in `config` or, without `config`, the published vocabulary from the hub.
        config, prediction_type, ema: as for `sega_jax.load`.
        dtype: float32, float16 or bfloat16; None keeps the dtype of every weight.
        to: "diffusers" for safetensors files, or "orbax".
        progress: whether to show a progress bar; None shows it in terminals and notebooks.

    Returns:
        The absolute path of the written folder.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        FileExistsError: `dest` exists and is not empty.
        TypeError: `dest` is not a path.
        CheckpointError: the file is broken, hostile or of the wrong kind; it does not fit the configs (the error lists
            every missing, extra and misshapen tensor); there is no vocabulary; or a weight overflows `dtype`.
            Everything except the values of the weights is checked before anything is written.
        ValueError: `source` is not a single file, `dest` is inside the config's folder, or the dtype, format or
            prediction type is unknown.
        OSError: `dest` cannot be written, or the disk is full.
    """
    check_options(to, dtype)
    if prediction_type not in (None, *PREDICTIONS):
        raise ValueError(
            f"{assignment('prediction_type', prediction_type)} should be one of {', '.join(PREDICTIONS)}, or None"
        )
    if not names_file(source):
        raise ValueError(f"{source} is not a single file ({', '.join(ENDINGS)}); use convert() for folders")
    checkpoint = find(source, None, config, prediction_type)
    folder = checkpoint.fetch(without=[CHECKER])
    vocabulary_folder = checkpoint.vocabulary() if tokenizer is None else Path(os.path.expanduser(tokenizer))
    dest = destination(dest, folder)
    with atomic_folder(dest) as partial_folder:
        description = describe(folder, tokenizer=vocabulary_folder, safety_checker=False)
        sources = {
            part: Source(
                network, partial(checkpoint.weights, part, network, ema=ema), weight_stem(description.system, part)
            )
            for part, network in description.models._asdict().items()
        }
        declared = dict(checkpoint.declared) | ({} if prediction_type is None else {"prediction_type": prediction_type})
        others = _others(folder, _tokenizers(folder, vocabulary_folder, description.tokenizer), declared)
        write(partial_folder, sources, others, to=to, dtype=dtype, progress=progress)
    return dest


def _tokenizers(folder: Path, vocabulary_folder: Path | None, tokenizer: Tokenizer | TokenizerPair) -> Files:
    """Returns the tokenizer's files. If a vocabulary folder is given, both tokenizers of a pair use its files."""
    if isinstance(tokenizer, Tokenizer):
        return {**tokenizer_files(vocabulary_folder or folder / "tokenizer")}
    files: Files = {}
    for part, member in (("tokenizer", tokenizer.first), ("tokenizer_2", tokenizer.second)):
        for name, path in tokenizer_files(vocabulary_folder or folder / part).items():
            names_pad = vocabulary_folder and name.name in ("special_tokens_map.json", "tokenizer_config.json")
            files[Path(part, name.name)] = as_json(read_json(path) | {"pad_token": member.pad}) if names_pad else path
    return files


def _others(folder: Path, tokenizers: Files, declared: Mapping[str, Any]) -> Files:
    """Returns all files except weights.

    The index comes last, so that an incomplete folder is not mistaken for a complete checkpoint.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json") | dict(declared)
    index = read_json(folder / "model_index.json")
    system = recognise(folder)
    index |= system.checkpoint.unchecked
    return {
        **{Path(part, "config.json"): folder / part / "config.json" for part in system.checkpoint.networks},
        **tokenizers,
        Path("scheduler", "scheduler_config.json"): as_json(scheduler),
        Path("model_index.json"): as_json(index),
    }
