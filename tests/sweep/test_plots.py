"""Tests plots over words and numbers, with metrics whose means are known."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.drawn_sweeps import draw

from sega_jax import sweep

pytest.importorskip("pyarrow.parquet")

EDITS = [(), ("hat",), ("bow",), ("hat", "bow")]
SCALES, SEEDS = [0.0, 2.0, 8.0], [3, 4, 5]


def chance(pictures, rows):
    """Returns numbers that depend on the edits, the scale and the seed, and are close to 0 and 1."""
    return np.array([("hat" in row["edits"]) * (1 - 1e-3 * row["seed"]) for row in rows])


def partial(pictures, rows):
    """Returns a number only for pictures with both edits and a cool-down."""
    return np.array([row["seed"] if len(row["edits"]) == 2 and row["hat.cooldown"] else np.nan for row in rows])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    grid = {"seed": SEEDS, "edits": EDITS, "hat.scale": SCALES, "hat.cooldown": [11, "never"], "tiled": [False, True]}
    ablation = sweep.Sweep(call={"prompt": "a cat", "steps": 12}, edits={"hat": {}, "bow": {}}, grid=grid)
    draw(folder, ablation)
    metrics = {"chance": sweep.Probability(chance), "bare": chance, "partial": partial}
    return sweep.measure(folder, metrics | {"constant": lambda pictures, rows: np.full(len(rows), 1e9)})


def intervals(axes):
    """Returns the ends of the intervals that are drawn, [intervals, (low, high)]."""
    ends = [segment[:, 1] for lines in axes.collections for segment in lines.get_segments() if len(segment)]
    ends = np.array(ends).reshape(-1, 2)
    return ends[~np.isnan(ends).any(1)]


def drawn(line):
    """Returns the points of a line in pixels, and the places of its data."""
    axes = line.axes
    axes.figure.draw_without_rendering()
    return line.get_transform().transform(line.get_xydata()), axes.transData.transform(line.get_xydata())


def test_words_have_bars(results):
    axes = sweep.plot(results, "chance", "edits", "hat.scale", {"tiled": False}).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["none", "hat", "bow", "hat + bow"]
    assert [bars.get_label() for bars in axes.containers] == ["0", "2", "8"]
    for bars in axes.containers:
        np.testing.assert_allclose([bar.get_height() for bar in bars], [0, 0.996, 0, 0.996])
    # The bars of a value are next to each other, and closer to its tick than to other ticks.
    ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bars in axes.containers for bar in bars)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert [round((start + end) / 2) for start, end in ends] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("x", "labels"), [("hat.cooldown", ["11", "never"]), ("tiled", ["False", "True"]), ("prompt", ["a cat"])]
)
def test_values_that_are_not_all_numbers_have_bars(results, x, labels):
    axes = sweep.plot(results, "seconds", x).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == labels
    assert [bar.get_height() for bar in axes.containers[0]] == [0.5] * len(labels)


def test_probabilities_have_intervals_within_their_range(results):
    fixed = {"tiled": False, "hat.cooldown": None}
    for x in ("hat.scale", "edits"):
        ends = intervals(sweep.plot(results, "chance", x, "edits" if x == "hat.scale" else "hat.scale", fixed).axes[0])
        assert ends.min() >= 0
        assert ends.max() <= 1
        assert (np.diff(ends) > 0.3).all()  # of three pictures with equal numbers
    bare = intervals(sweep.plot(results, "bare", "hat.scale", "edits", fixed).axes[0])
    assert (np.diff(bare) < 0.01).all()


def test_columns_of_true_and_false_are_probabilities(results):
    ends = intervals(sweep.plot(results, "finite", "hat.scale").axes[0])
    assert len(ends) == 3
    assert ends.max() == 1
    assert (np.diff(ends) > 0.01).all()


def test_a_single_picture_has_no_interval(results):
    fixed = {"seed": 3, "tiled": False, "hat.cooldown": "never"}
    assert len(intervals(sweep.plot(results, "chance", "hat.scale", "edits", fixed).axes[0])) == 0
    assert len(intervals(sweep.plot(results, "chance", "edits", "hat.scale", fixed).axes[0])) == 0
    # Without the edit "hat", points with different scales describe the same picture.
    axes = sweep.plot(results, "chance", "hat.cooldown", None, fixed | {"edits": ["bow"]}).axes[0]
    assert len(intervals(axes)) == 0


def test_equal_lines_are_drawn_next_to_each_other(results):
    axes = sweep.plot(results, "constant", "hat.scale", "edits").axes[0]
    lines = axes.get_lines()
    assert len({line.get_marker() for line in lines}) == len(lines) == 4
    assert len({str(line._dash_pattern) for line in lines}) == 4
    shifts = []
    for line in lines:
        np.testing.assert_array_equal(line.get_xydata(), [[scale, 1e9] for scale in SCALES])
        moved, places = drawn(line)
        shift, up = (moved - places).T
        np.testing.assert_allclose(up, 0, atol=1e-6)
        np.testing.assert_allclose(shift, shift[0])
        shifts.append(shift[0])
        gap = np.diff(places[:, 0]).min()
    assert sum(shifts) == pytest.approx(0, abs=1e-6)
    assert min(np.diff(shifts)) > 2
    # Every marker is much closer to its own value than to the next.
    assert max(shifts) < gap / 4
    left, right = axes.get_window_extent().intervalx
    assert left < drawn(lines[0])[0][0, 0]
    assert drawn(lines[-1])[0][-1, 0] < right


def test_groups_without_numbers_are_named(results):
    for x in ("hat.scale", "tiled"):
        axes = sweep.plot(results, "partial", x, "edits").axes[0]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["none (no numbers)", "hat (no numbers)", "bow (no numbers)", "hat + bow"]
    axes = sweep.plot(results, "partial", "hat.scale", "hat.cooldown").axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["11", "never (no numbers)"]
    heights = [bar.get_height() for bar in sweep.plot(results, "partial", "hat.cooldown").axes[0].containers[0]]
    np.testing.assert_array_equal(heights, [4, np.nan])
    with pytest.raises(ValueError, match="'partial' has no numbers for these pictures; measure it first"):
        sweep.plot(results, "partial", "hat.scale", fixed={"edits": "bow"})


def test_a_single_value_is_a_point(results):
    for y in ("chance", "constant"):
        figure = sweep.plot(results, y, "hat.scale", "edits", {"hat.scale": "2.0"})
        figure.draw_without_rendering()
        assert [line.get_xdata().tolist() for line in figure.axes[0].get_lines()] == [[2.0]] * 4


def test_plots_with_too_many_groups_or_bars_are_refused(results):
    crowded = sweep.Results(str(results.folder))
    crowded.rows = [row | {"hat.scale": k, "prompt": f"a cat {k}"} for k, row in enumerate(crowded.rows[:120])]
    crowded.axes |= {"hat.scale": list(range(120)), "prompt": [f"a cat {k}" for k in range(120)]}
    with pytest.raises(ValueError, match=r"hat\.scale has 120 values, but a plot can show at most 10 groups; use hat"):
        sweep.plot(crowded, "seconds", "seed", "hat.scale")
    with pytest.raises(
        ValueError, match=r"prompt has 120 values, .* room for bars at most 100 values; choose another x"
    ):
        sweep.plot(crowded, "seconds", "prompt")


def test_infinite_numbers_are_refused(results):
    endless = sweep.Results(str(results.folder))
    endless.rows[0] = endless.rows[0] | {"seconds": np.inf}
    with pytest.raises(ValueError, match="'seconds' is infinite for some pictures, so it has no mean"):
        sweep.plot(endless, "seconds", "hat.scale")


def test_given_axes_keep_their_figure(results):
    figure = Figure(figsize=(3, 3))
    left, right = figure.subplots(1, 2)
    assert sweep.plot(results, "chance", "edits", axes=left) is figure
    assert sweep.plot(results, "chance", "hat.scale", axes=right) is figure
    assert figure.get_size_inches().tolist() == [3, 3]


def test_metrics_that_are_no_probabilities(results):
    for number in (1.7, -0.5):
        metric = sweep.Probability(lambda pictures, rows, number=number: np.full(len(rows), number))
        with pytest.raises(ValueError, match=f"the metric returned {number}, but a probability should be from 0 to 1"):
            sweep.measure(
                str(results.folder),
                {"x": metric},
            )
    assert results.probabilities == {"chance"}
    assert sweep.Probability(lambda pictures, rows: [np.nan, 1 + 1e-7])([], [])[1] == 1
