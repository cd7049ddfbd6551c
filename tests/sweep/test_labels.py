"""Labels of plots: they fit, do not overlap, and are drawn in any script."""

import io
import itertools
import warnings

import pytest

Figure = pytest.importorskip("matplotlib.figure").Figure

from sega_jax.sweep.reporting.labels import arrange  # noqa: E402

PROMPTS = [
    "a portrait of a sad woman " * 9,
    "Портрет женщины " * 9,
    "猫" * 200,
    "صورة لقطة " * 20,
    "$x_1$ & <b>",
    "x" * 300,
]


def labelled(categories=(), groups=(), name="hat.scale", resize=True):
    axes = Figure(figsize=(5.4, 3.4), dpi=160, layout="constrained").subplots()
    for group in groups or [None]:
        axes.plot(range(len(categories) or 4), range(len(categories) or 4), label=group)
    axes.set_xlabel(name)
    axes.set_ylabel(name)
    if groups:
        axes.legend(title=name, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    with warnings.catch_warnings():
        # A computer without the fonts shows replacements, for which there is a warning of the library's own.
        warnings.filterwarnings("ignore", message="pictures show")
        arrange(axes, categories, resize=resize)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about missing characters, and about figures without space
        axes.figure.savefig(io.StringIO(), format="svg")
        axes.figure.savefig(io.BytesIO())
    return axes


@pytest.mark.parametrize("count", [2, 6, 40])
@pytest.mark.parametrize(("kind", "resize"), [("categories", True), ("categories", False), ("groups", True)])
def test_labels_do_not_overlap(kind, count, resize):
    texts = [f"{prompt[:10]}{i} {prompt}" for i, prompt in zip(range(count), itertools.cycle(PROMPTS))]
    axes = labelled(**{kind: texts}, resize=resize)
    figure = axes.figure
    labels = axes.get_xticklabels() if kind == "categories" else axes.get_legend().get_texts()
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) == count or (count == 40 and not resize)
    for first, second in itertools.pairwise(boxes):
        assert not first.overlaps(second)
    if resize:
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert axes.get_window_extent().width > 200
        assert axes.get_window_extent().height > 200


def test_names_of_axes_are_wrapped():
    axes = labelled(name="a_very_long_name_of_an_axis." * 9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        assert label.get_text().endswith("…")
        box = label.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= axes.figure.bbox.x1
        assert box.y1 <= axes.figure.bbox.y1


def test_short_labels_are_left_alone():
    axes = labelled(["a cat", "a dog"], ["1", "2"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a cat", "a dog"]
    assert axes.get_xticklabels()[0].get_rotation() == 0
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["1", "2"]
    assert axes.get_xlabel() == axes.get_ylabel() == "hat.scale"
    assert list(axes.figure.get_size_inches()) == [5.4, 3.4]


def test_labels_that_share_their_start_show_the_difference():
    axes = labelled([f"a portrait of a person with a long beard, number {i}" for i in range(20)])
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"…{i}" for i in range(20)]
