"""Metrics: plain functions of pictures and of what is recorded of them, and the numbers that they give, kept."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sega_jax.demo.attributes import WORDS
from sega_jax.demo.judge import load_judge, look
from sega_jax.nn.clip import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from sega_jax.pipelines.safety import FeatureExtractor
from sega_jax.sweep.reporting.results import Results, Row
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import METRICS
from sega_jax.text.files import CheckpointError, read_json
from sega_jax.text.tokenizers import Tokenizer
from sega_jax.weights.pull import fill
from sega_jax.weights.tensors import Tensors

# uint8 pictures [n, height, width, 3], with their rows -> a number each, [n]; NaN for none.
Metric = Callable[[np.ndarray, Sequence[Row]], Any]
_BLOCK = 64


def measure(folder: str | Path, metrics: Mapping[str, Metric]) -> Results:
    """Measures all pictures of a sweep's folder that are there, and keeps the numbers in it, over those before.

    Args:
        metrics: by the names that the numbers will have as a column.

    Returns:
        The results with these numbers.

    Raises:
        ValueError: a name that no file can have, or that is a setting's or a record's; or a metric that gives another
            count of numbers than it got pictures.

    Example:
        >>> from sega_jax import sweep
        >>> def brightness(pictures, rows):
        ...     return pictures.mean((1, 2, 3)) / 255
        >>> results = sweep.measure("sega-jax-out/glasses", {"brightness": brightness})
        >>> 0 < results.rows[0]["brightness"] < 1
        True
    """
    found = Results(folder)
    for name in metrics:
        if not re.fullmatch(r"[\w .-]+", name) or name.startswith("."):
            raise ValueError(f"{name!r} should be of letters, digits, spaces, _, - and .")
        if name in (*records.columns(found.plan.sweep, found.plan.facts), *found.axes):
            raise ValueError(f"{name!r} is a column of the records already; name the metric otherwise")
    store = found.folder.store
    store.begin((METRICS,))
    rows = list({row["name"]: row for row in found.rows if row["file"] is not None}.values())
    values: dict[str, list[float | None]] = {name: [] for name in metrics}
    sizes = sorted({(row["height"], row["width"]) for row in rows})
    rows = [row for size in sizes for row in rows if (row["height"], row["width"]) == size]
    for size in sizes:
        some = [row for row in rows if (row["height"], row["width"]) == size]
        for start in range(0, len(some), _BLOCK):
            block = some[start : start + _BLOCK]
            pictures = np.stack([np.asarray(found.picture(row)) for row in block])
            for name, metric in metrics.items():
                given = np.asarray(metric(pictures, block), np.float64)
                if given.shape != (len(block),):
                    raise ValueError(f"{name}: the metric gave shape {given.shape} for {len(block)} pictures")
                values[name] += [None if np.isnan(value) else float(value) for value in given]
    for name, numbers in values.items():
        store.write(f"{METRICS}/{name}.parquet", records.values([row["name"] for row in rows], numbers))
    return Results(folder)


def judge(word: str) -> Metric:
    """How sure the demo model's judge is of a word, from 0 to 1, in pictures of 128 by 128.

    Raises:
        ValueError: a word that it does not know.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.measure("sega-jax-out/glasses", {"judge glasses": sweep.judge("glasses")})
        >>> results.rows[1]["judge glasses"] > results.rows[0]["judge glasses"]
        True
    """
    if word not in WORDS:
        raise ValueError(f"{word!r} is no word of the demo model's judge, which knows {', '.join(WORDS)}")
    column, model = list(WORDS).index(word), load_judge()

    def metric(pictures: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        if pictures.shape[1:] != (128, 128, 3):
            raise ValueError(f"the judge is of the demo model's pictures, 128 x 128; these are {pictures.shape[1:3]}")
        return look(model, pictures, _BLOCK).probability[:, column]

    return metric


def distance(results: Results) -> Metric:
    """How far a picture is from the one without edits, of the same prompts, seed and numbers of the call: the root of
    the mean square over pixels and channels in [0, 1]. None where the sweep has none: one with `edits = []`, or with
    every scale 0.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> results = sweep.measure("sega-jax-out/glasses", {"distance": sweep.distance(results)})
        >>> results.rows[0]["distance"]  # its scale is 0
        0.0
    """
    names, same = results.plan.sweep.edits, records.columns_without_edits(results.plan.facts)

    def edited(row: Row) -> bool:
        return any(row[f"{edit}.scale"] and row[f"{edit}.weight"] for edit in names)

    plain = {tuple(row[key] for key in same): row for row in results.rows if row["file"] and not edited(row)}

    def metric(pictures: np.ndarray, rows: Sequence[Row]) -> list[float]:
        values = []
        for picture, row in zip(pictures, rows, strict=True):
            other = plain.get(tuple(row[key] for key in same))
            if other is None:
                values.append(np.nan)
                continue
            off = picture / 255 - np.asarray(results.picture(other)) / 255
            values.append(float(np.sqrt(np.mean(off**2))))
        return values

    return metric


def clip_score(folder: str | Path, text: str | None = None) -> Metric:
    """CLIP score (Hessel et al. 2021) in the scale of torchmetrics: 100 times the cosine of picture and words, at
    least 0.

    Args:
        folder: of a CLIP model in transformers' layout, as openai/clip-vit-base-patch32 is on the hub.
        text: the words; None is each picture's prompt.

    Raises:
        CheckpointError: missing or broken files.

    Example:
        >>> from sega_jax import sweep
        >>> score = sweep.clip_score("path/to/clip-vit-base-patch32")  # doctest: +SKIP
        >>> results = sweep.measure("sega-jax-out/glasses", {"CLIP score": score})  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    config = read_json(folder / "config.json")
    try:
        width = {"projection_dim": config.get("projection_dim", 512)}
        of_text = CLIPTextConfig.from_dict(config.get("text_config", {}) | width)
        of_pictures = CLIPVisionConfig.from_dict(config.get("vision_config", {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    with Tensors(folder, "model", None, CLIPModel.rename) as weights:
        model = fill(CLIPModel(of_text, of_pictures), weights, np.float32)
    tokenizer = Tokenizer(folder, of_text.max_position_embeddings, of_text.vocab_size)
    extract, score = FeatureExtractor(folder, of_pictures.image_size), jax.jit(lambda model, *pair: model(*pair))

    def metric(pictures: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        ids = tokenizer([row["prompt"] if text is None else text for row in rows])
        # Of one shape, which compiles once.
        fill_up = [(0, _BLOCK - len(rows))]
        pair = (np.pad(a, fill_up + [(0, 0)] * (a.ndim - 1), "edge") for a in (ids, extract(pictures)))
        return 100 * np.maximum(np.asarray(score(model, *pair))[: len(rows)], 0)

    return metric
