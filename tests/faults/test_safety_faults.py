"""Faults in the safety checker: the preprocessing on the host, the vision tower, the cosines and the decision."""

from functools import cache

import numpy as np
import pytest
from PIL import Image
from reference import cases
from support import tiny

from faults.damage import argument, instead, override, result
from faults.views import Fault, View, Views, recorded
from sega_jax.nn import clip, safety
from sega_jax.pipelines.safety import FeatureExtractor

pytestmark = pytest.mark.fault


@cache
def near_thresholds():
    """Draws cosines [pictures, 3] and [pictures, 17] so close to their thresholds that rounding matters.

    Returns:
        The two arrays of cosines, followed by the two arrays of their thresholds.
    """
    rng = np.random.default_rng(0)
    thresholds = [rng.uniform(0.1, 0.3, count).astype(np.float32) for count in (3, 17)]
    cosines = [
        (least + np.round(rng.uniform(-0.013, 0.0008, (2000, len(least))), 4)).astype(np.float32)
        for least in thresholds
    ]
    return *cosines, *thresholds


def decided():
    """Decides concept by concept, with Python floats, which pictures to flag."""
    special, concepts, *thresholds = near_thresholds()
    care_thresholds, other_thresholds = (least.tolist() for least in thresholds)
    flags = []
    for near, others in zip(special, concepts, strict=True):
        care = any(round(cosine - least, 3) > 0 for cosine, least in zip(near, care_thresholds, strict=True))
        adjustment = 0.01 if care else 0.0
        flags.append(
            any(round(c - least + adjustment, 3) > 0 for c, least in zip(others, other_thresholds, strict=True))
        )
    return np.array(flags)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    tiny.write_json(folder / "preprocessor_config.json", tiny.FEATURES)

    def pixels():
        """Prepares pictures of several sizes for the vision tower."""
        return np.concatenate(list(map(FeatureExtractor(folder, 12), cases.SHOWN)))

    def cosines():
        checker = safety.StableDiffusionSafetyChecker(safety.SafetyCheckerConfig.from_dict(tiny.SAFETY))
        return tiny.filled(checker).cosines(recorded("safety")["pixels"])

    return Views(
        {
            "pixels": View(pixels),
            "cosines": View(cosines, lambda: [recorded("safety")[name] for name in ("special", "concepts")], 1e-5),
            "decision": View(lambda: safety.too_near(*near_thresholds()), decided),
        }
    )


FAULTS = {
    "pictures are resized bilinearly": Fault(
        "pixels", Image.Image, "resize", argument(2, lambda filter: Image.Resampling.BILINEAR)
    ),
    "the crop is one pixel off": Fault(
        "pixels", FeatureExtractor, "_centre", result(lambda picture: np.roll(picture, 1, 1))
    ),
    "the vision tower is causal": Fault("cosines", clip.SelfAttention, "__init__", override(causal=True)),
    "embeddings are not normalised": Fault("cosines", safety, "_unit", instead(lambda x: x)),
    "special care makes the checker less strict": Fault("decision", safety, "_ADJUSTMENT", instead(-0.01)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
