"""`convert_single`: Stable Diffusion in a single file to a folder."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from convert.conversion import Source, as_json, check_options, destination, tokenizer_files, write
from convert.destination import whole_or_nothing
from sega_jax.pipelines.loading import PREDICTIONS, describe
from sega_jax.pipelines.sources import of_file
from sega_jax.systems.registry import CHECKER, XL, kind_of
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights import single_file
from sega_jax.weights.pull import CheckpointError, read_json
from sega_jax.weights.single_file import OriginalWeights, is_one

# What is written beside the weights: a file to copy, or its content.
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
    """Writes Stable Diffusion 1.x, 2.x or XL from a single file with the names of the original repositories as a
    folder, without a safety checker.

    Args:
        source: the file: `.safetensors`, or `.ckpt`, a pickle, which is read without running what it holds.
        dest: the folder to write, new or empty, which appears when it is whole.
        tokenizer: a folder with CLIP's vocabulary, vocab.json and merges.txt, which the file does not hold; None takes
            that of `config`.
        config, prediction_type, ema: as of `sega_jax.load`.
        dtype: float32, float16 or bfloat16; None keeps every weight's own.
        to: "diffusers", which is safetensors, or "orbax".
        progress: whether to show a bar of bytes; None is in terminals and notebooks.

    Returns:
        The written folder.

    Raises:
        FileNotFoundError: no such file or folder.
        FileExistsError: dest is there and not empty.
        TypeError: a path is none.
        CheckpointError: the file is broken, hostile, or of something else; it does not fit the configs, with every
            missing, extra and misshapen tensor; there is no vocabulary; or a weight overflows `dtype`. All but values
            are checked before anything is written.
        ValueError: an unknown dtype, form or prediction, or dest lies inside the config.
        OSError: dest cannot be written to, or its disk is full.
    """
    check_options(to, dtype)
    if prediction_type not in (None, *PREDICTIONS):
        raise ValueError(f"prediction_type={prediction_type!r} should be one of {', '.join(PREDICTIONS)}, or None")
    if not is_one(source):
        raise ValueError(f"{source} is no single file ({', '.join(single_file.ENDINGS)}); convert is for folders")
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    with single_file.opened(path) as tensors:
        folder = of_file(path, tensors.shapes, config, prediction_type).fetch(without=[CHECKER])
    if tokenizer is None and not (folder / "tokenizer").is_dir():
        raise CheckpointError(
            f"{path} does not hold CLIP's vocabulary; give tokenizer, a folder with vocab.json and merges.txt such as"
            " that of any checkpoint of Stable Diffusion in diffusers layout"
        )
    given = tokenizer and Path(os.path.expanduser(tokenizer))
    dest = destination(dest, folder)
    with whole_or_nothing(dest) as partly:
        found = describe(folder, tokenizer=given, safety_checker=False)
        sources = {
            part: Source(network, partial(_weights, path, part, network, ema))
            for part, network in found.models._asdict().items()
        }
        others = _others(folder, _tokenizers(folder, given, found.tokenizer), prediction_type)
        write(partly, sources, others, to=to, dtype=dtype, progress=progress)
    return dest


def _weights(path: Path, part: str, network: Any, ema: bool) -> OriginalWeights:
    return OriginalWeights(path, single_file.opened(path), part, network, ema=ema)


def _tokenizers(folder: Path, given: Path | None, made: Tokenizer | TokenizerPair) -> Files:
    """The files of the tokenizers, those of a pair from the same folder where one is given."""
    if isinstance(made, Tokenizer):
        return tokenizer_files(given or folder / "tokenizer")
    found: Files = {}
    for part, one in (("tokenizer", made.first), ("tokenizer_2", made.second)):
        for name, path in tokenizer_files(given or folder / part).items():
            pads = given and name.name in ("special_tokens_map.json", "tokenizer_config.json")
            found[Path(part, name.name)] = as_json(read_json(path) | {"pad_token": one.pad}) if pads else path
    return found


def _others(
    folder: Path, tokenizers: dict[Path, Path | bytes], prediction_type: str | None
) -> dict[Path, Path | bytes]:
    """What is beside the weights, the index last: a folder without it is no checkpoint."""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        scheduler |= {"prediction_type": prediction_type}
    index = read_json(folder / "model_index.json")
    kind = kind_of(folder)
    if kind is not XL:
        index |= {CHECKER: [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {
        **{Path(part, "config.json"): folder / part / "config.json" for part in kind.parts},
        **tokenizers,
        Path("scheduler", "scheduler_config.json"): as_json(scheduler),
        Path("model_index.json"): as_json(index),
    }
