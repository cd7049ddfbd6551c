"""Computes and stores metrics. A metric is one number for each picture, computed from the picture's pixels and
record."""

import dataclasses
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

# A metric maps uint8 pictures [n, height, width, 3] and their rows in the results to numbers [n]. NaN means "no value".
Metric = Callable[[np.ndarray, Sequence[Row]], Any]
_BLOCK = 64
_ROUNDING = 1e-5  # the amount by which rounding may move a probability out of [0, 1]


@dataclasses.dataclass(frozen=True)
class Probability:
    """A metric whose numbers are probabilities or shares, which are in [0, 1]. `plot` then draws confidence intervals
    that stay in this range.

    Args:
        metric: a metric. NaN means "no value".

    Raises:
        ValueError: (in a call) a number is outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from sega_jax import sweep
        >>> bright = sweep.Probability(lambda pictures, rows: (pictures > 127).mean((1, 2, 3)))
        >>> bright(np.full((1, 8, 8, 3), 200, np.uint8), [{}])
        array([1.])
    """

    metric: Metric

    def __call__(self, pictures: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        """Returns the metric's numbers, after a check of their range."""
        numbers = np.asarray(self.metric(pictures, rows), np.float64)
        if outside := numbers[(numbers < -_ROUNDING) | (numbers > 1 + _ROUNDING)].tolist():
            raise ValueError(
                f"the metric returned {outside[0]:g}, but a probability should be from 0 to 1; scale the numbers, or"
                " pass the metric without sweep.Probability"
            )
        return numbers.clip(0, 1)


def measure(folder: str | Path, metrics: Mapping[str, Metric]) -> Results:
    """Measures all finished pictures of a sweep, and stores the numbers in its folder. Earlier numbers are replaced.

    Args:
        folder: the sweep's folder, or an address that fsspec supports.
        metrics: {column: function}. A function gets at most 64 uint8 pictures of the same size, [n, height, width, 3],
            and the pictures' rows in the results. It returns n numbers, with NaN where there is no value. If the
            numbers are probabilities, wrap the function in `Probability`.

    Returns:
        The results, including the new numbers.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: the folder contains no sweep, a metric's name is not a valid file name or is the name of an existing
            column, or a metric does not return one number per picture.

    Example:
        >>> from sega_jax import sweep
        >>> def brightness(pictures, rows):
        ...     return pictures.mean((1, 2, 3)) / 255
        >>> results = sweep.measure("sega-jax-out/glasses", {"brightness": brightness})
        >>> 0 < results.rows[0]["brightness"] < 1
        True
    """
    results = Results(folder)
    for name in metrics:
        if not re.fullmatch(r"[\w .-]+", name) or name.startswith("."):
            raise ValueError(
                f"the metric name {name!r} should consist of letters, digits, spaces, _, - and ., and not start with ."
            )
        if name in (*records.columns(results.plan.sweep, results.plan.facts), *results.axes):
            raise ValueError(f"{name!r} is already a column of the records; choose a different name for the metric")
    store = results.folder.store
    store.begin((METRICS,))
    rows = list({row["name"]: row for row in results.rows if row["file"] is not None}.values())
    values: dict[str, list[float | None]] = {name: [] for name in metrics}
    measured_names: list[str] = []
    sizes = sorted({(row["height"], row["width"]) for row in rows})
    rows = [row for size in sizes for row in rows if (row["height"], row["width"]) == size]
    for size in sizes:
        members = [row for row in rows if (row["height"], row["width"]) == size]
        for start in range(0, len(members), _BLOCK):
            images = {row["name"]: results.picture(row) for row in members[start : start + _BLOCK]}
            # Damaged pictures are left out.
            block = [row for row in members[start : start + _BLOCK] if images[row["name"]] is not None]
            if not block:
                continue
            measured_names += [row["name"] for row in block]
            pictures = np.stack([np.asarray(images[row["name"]]) for row in block])
            for name, metric in metrics.items():
                measured = np.asarray(metric(pictures, block), np.float64)
                if measured.shape != (len(block),):
                    raise ValueError(
                        f"{name}: the metric returned shape {measured.shape} for {len(block)} pictures; it should"
                        " return one number per picture"
                    )
                values[name] += [None if np.isnan(value) else float(value) for value in measured]
    for name, metric in metrics.items():
        numbers = dict(zip(measured_names, values[name], strict=True))
        data = records.metric(records.Numbers(numbers, isinstance(metric, Probability)))
        store.write(f"{METRICS}/{name}.parquet", data)
    return Results(folder)


def judge(word: str) -> Metric:
    """Returns a metric: the probability, in [0, 1], that the demo model's judge assigns to a word.

    Args:
        word: one of `sega_jax.demo.attributes.WORDS`, such as "glasses".

    Returns:
        A `Probability` that accepts pictures of 128x128 pixels and raises ValueError for other sizes.

    Raises:
        ValueError: the judge does not know the word.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.measure("sega-jax-out/glasses", {"judge glasses": sweep.judge("glasses")})
        >>> results.rows[1]["judge glasses"] > results.rows[0]["judge glasses"]
        True
    """
    if word not in WORDS:
        raise ValueError(f"the demo model's judge does not know {word!r}; it knows {', '.join(WORDS)}")
    column, model = list(WORDS).index(word), load_judge()

    def metric(pictures: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        if pictures.shape[1:] != (128, 128, 3):
            raise ValueError(
                "the judge needs pictures of 128 x 128 pixels, the size of the demo model's pictures, not"
                f" {pictures.shape[1:3]}"
            )
        return look(model, pictures, _BLOCK).probability[:, column]

    return Probability(metric)


def distance(results: Results) -> Metric:
    """Returns a metric: the distance between a picture and the unedited picture with otherwise equal settings.

    The distance between pictures a and b is sqrt(mean((a - b)^2)) over all pixels and RGB channels, whose values are
    scaled from [0, 255] to [0, 1]. The distance therefore has no unit: 0 means equal pictures, and 1 is the distance
    between black and white. A picture is unedited if its point has `edits = []`, or a scale or weight of 0 in every
    edit. A picture without an unedited counterpart in the sweep has no distance.

    Args:
        results: the sweep's results, which contain the unedited pictures.

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

    unedited = {tuple(row[key] for key in same): row for row in results.rows if row["file"] and not edited(row)}

    def metric(pictures: np.ndarray, rows: Sequence[Row]) -> list[float]:
        values = []
        for picture, row in zip(pictures, rows, strict=True):
            unedited_row = unedited.get(tuple(row[key] for key in same))
            if unedited_row is None:
                values.append(np.nan)
                continue
            reference = results.picture(unedited_row)
            if reference is None:
                values.append(np.nan)
                continue
            difference = picture / 255 - np.asarray(reference) / 255
            values.append(float(np.sqrt(np.mean(difference**2))))
        return values

    return metric


def clip_score(folder: str | Path, text: str | None = None) -> Metric:
    """Returns a metric: the CLIP score (Hessel et al. 2021) on torchmetrics' scale.

    The score is 100 times the cosine similarity of picture and text, or 0 if the similarity is negative. It is
    therefore in [0, 100].

    Args:
        folder: a local folder with a CLIP model in transformers' layout, such as a copy of
            openai/clip-vit-base-patch32.
        text: the text to compare with; if None, each picture is compared with its prompt.

    Raises:
        FileNotFoundError: the folder does not exist.
        CheckpointError: a file of the model is missing or broken.

    Example:
        >>> from sega_jax import sweep
        >>> score = sweep.clip_score("path/to/clip-vit-base-patch32")  # doctest: +SKIP
        >>> results = sweep.measure("sega-jax-out/glasses", {"CLIP score": score})  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give a local folder with a CLIP model, such as a copy of"
            " openai/clip-vit-base-patch32"
        )
    config = read_json(folder / "config.json")
    try:
        width = {"projection_dim": config.get("projection_dim", 512)}
        text_config = CLIPTextConfig.from_dict(config.get("text_config", {}) | width)
        vision_config = CLIPVisionConfig.from_dict(config.get("vision_config", {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    with Tensors(folder, "model", None, CLIPModel.rename) as weights:
        model = fill(CLIPModel(text_config, vision_config), weights, np.float32)
    tokenizer = Tokenizer(folder, text_config.max_position_embeddings, text_config.vocab_size)
    extract, score = FeatureExtractor(folder, vision_config.image_size), jax.jit(lambda model, *pair: model(*pair))

    def metric(pictures: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        ids = tokenizer([row["prompt"] if text is None else text for row in rows])
        # Pad to one shape, so that the model compiles once.
        padding = [(0, _BLOCK - len(rows))]
        pair = (np.pad(a, padding + [(0, 0)] * (a.ndim - 1), "edge") for a in (ids, extract(pictures)))
        return 100 * np.maximum(np.asarray(score(model, *pair))[: len(rows)], 0)

    return metric
