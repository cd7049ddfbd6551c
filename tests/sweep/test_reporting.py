"""Tests contact sheets, curves, metrics and reports, with pictures whose colours encode their settings."""

import base64
import io
import re
import sys
import warnings
import xml.dom.minidom
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from support import tiny
from support.drawn_sweeps import draw

from sega_jax import sweep
from sega_jax.cli.main import main
from sega_jax.demo.attributes import WORDS
from sega_jax.demo.judge import load_judge, look
from sega_jax.nn.clip import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from sega_jax.sweep.reporting import sheets
from sega_jax.sweep.reporting.report import _values

pytest.importorskip("pyarrow.parquet")

SCALES, SEEDS, WARMUPS = [4.0, 0.0, -2.0], [3, 1], [1, 2]


def colour(settings):
    """Returns a point's colour: red encodes its scale, green its seed, and blue its warm-up."""
    scale, seed, warmup = settings["hat.scale"], settings["seed"], settings["hat.warmup"]
    return 40 + 60 * SCALES.index(scale), 40 * seed, 100 * warmup


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a sweep with one all-NaN picture and an unfinished last batch."""
    where = tmp_path_factory.mktemp("sweep")
    grid = {"prompt": ["a cat", "a <script>"], "seed": SEEDS, "hat.scale": SCALES, "hat.warmup": WARMUPS}
    ablation = sweep.Sweep(call={"steps": 12, "guidance_scale": 3.0}, edits={"hat": {}}, grid=grid)
    draw(where, ablation, colour, batches=-1, missing=[1])
    return where


@pytest.fixture
def results(folder):
    return sweep.Results(folder)


def test_results_are_selected_by_columns(results):
    assert len(results.rows) == 20
    assert results.axes["hat.scale"] == SCALES
    assert results.axes["seed"] == SEEDS
    (row,) = results.where({"prompt": "a cat", "seed": 1, "hat.scale": -2.0, "hat.warmup": 2})
    assert results.picture(row).getpixel((5, 5)) == colour(row)
    with pytest.raises(ValueError, match=r"there is no column 'hut'; the columns are prompt, seed, hat\.scale"):
        results.where({"hut": 1})
    with pytest.raises(ValueError, match="no picture has seed=2; its values are 3, 1"):
        results.where({"seed": 2})
    results.rows[:] = [row for row in results.rows if row["seed"] != 1 or row["hat.scale"] != 4]
    with pytest.raises(ValueError, match=r"no picture has all of seed=1, hat\.scale=4; leave one of them out"):
        results.where({"seed": 1, "hat.scale": 4})
    with pytest.raises(ValueError, match=r'no picture has all of prompt="a cat", seed=1, hat\.scale=4; leave'):
        results.where({"prompt": "a cat", "seed": "1", "hat.scale": "4e0"})


def test_values_are_named_by_equal_values_and_by_texts(results):
    expected = results.where({"hat.scale": 4.0, "seed": 3})
    assert expected
    for scale, seed in ((4, 3.0), ("4.0", "3"), ("4e0", "03"), (np.float32(4), np.int64(3))):
        assert results.where({"hat.scale": scale, "seed": seed}) == expected
    results.rows[:] = [row | {"revision": "5" if row["seed"] == 1 else 5} for row in results.rows]
    assert {row["seed"] for row in results.where({"revision": "5"})} == {1}
    assert {row["seed"] for row in results.where({"revision": 5})} == {3}
    assert [results.value("revision", text, as_text=True) for text in ("5", "5.0", '"5"')] == [5, 5, "5"]
    results.rows[:] = [row | {"revision": 0.1 + 1e-8 * row["seed"]} for row in results.rows]
    with pytest.raises(
        ValueError, match=re.escape("revision=0.1 could be any of 0.10000003, 0.10000001; write one of")
    ):
        results.value("revision", "0.1", as_text=True)
    assert results.value("revision", "0.10000001", as_text=True) == 0.1 + 1e-8


def places(image, colour):
    """Returns the corners of the only rectangle with this colour."""
    pixels = np.argwhere((np.asarray(image) == colour).all(-1))
    (top, left), (bottom, right) = pixels.min(0), pixels.max(0)
    assert len(pixels) == (bottom - top + 1) * (right - left + 1)
    return left, top, right + 1, bottom + 1


def test_sheets_place_pictures_by_their_axes(results):
    pages = sweep.sheets(results, "hat.scale", "seed", {"prompt": "a cat"}, side=32)
    assert [page.fixed for page in pages] == [{"hat.warmup": 1}, {"hat.warmup": 2}]
    first, second = (page.image for page in pages)
    rows = results.where({"prompt": "a cat"})
    at = {(row["hat.scale"], row["seed"]): places(first, colour(row)) for row in rows if row["hat.warmup"] == 1}
    lefts, tops = sorted({place[0] for place in at.values()}), sorted({place[1] for place in at.values()})
    # Numbers are sorted, regardless of their order in the sweep.
    assert {key: (lefts.index(p[0]), tops.index(p[1])) for key, p in at.items()} == {
        (scale, seed): (i, j) for i, scale in enumerate(sorted(SCALES)) for j, seed in enumerate(sorted(SEEDS))
    }
    assert {(right - left, bottom - top) for left, top, right, bottom in at.values()} == {(48, 32)}
    # The picture with NaN is missing, and its place is grey.
    assert len(at) == 6
    missing = next(row for row in rows if row["file"] is None)
    assert not (np.asarray(second) == colour(missing)).all(-1).any()
    assert (np.asarray(second) == (240, 240, 240)).all(-1).any()


def test_labels_take_space_next_to_the_pictures(results):
    """More labels take more space, and there is no text where labels are missing."""
    fixed = {"hat.warmup": 1, "seed": 3}
    both, across, alone = (
        sweep.sheets(results, *axes, fixed | more, side=100)[0].image
        for axes, more in (
            (("hat.scale", "prompt"), {}),
            (("hat.scale", None), {"prompt": "a cat"}),
            ((None, None), {"prompt": "a cat", "hat.scale": 4.0}),
        )
    )
    left, top, *_ = places(alone, colour(fixed | {"hat.scale": 4.0}))
    assert (np.asarray(alone)[:, :left] == 255).all()
    assert (np.asarray(alone)[:top] < 128).any()
    assert (np.asarray(across)[top:, :left] == 255).all()
    assert (np.asarray(both)[top:, : left + 20] < 128).any()
    assert alone.width < across.width < both.width
    assert alone.height < across.height


@pytest.mark.parametrize(
    ("axes", "fixed", "chosen"),
    [
        ((), {}, ("hat.scale", "seed")),
        (("auto", None), {}, ("hat.scale", None)),
        ((None, "auto"), {}, (None, "hat.scale")),
        (("hat.warmup",), {}, ("hat.warmup", "seed")),
        (("seed",), {}, ("seed", "hat.scale")),
        (("auto", "hat.scale"), {}, ("seed", "hat.scale")),
        ((), {"hat.scale": 4, "seed": "3"}, ("hat.warmup", "prompt")),
        ((), {"hat.scale": 4, "prompt": "a cat", "seed": 1}, ("hat.warmup", None)),
        ((), {"hat.scale": 4, "prompt": "a cat", "seed": 1, "hat.warmup": 2}, (None, None)),
    ],
)
def test_automatic_axes(results, axes, fixed, chosen):
    automatic, explicit = (
        sweep.sheets(results, *axes, fixed=fixed, side=16),
        sweep.sheets(results, *chosen, fixed, side=16),
    )
    assert [page.fixed for page in automatic] == [page.fixed for page in explicit]
    np.testing.assert_array_equal(automatic[0].image, explicit[0].image)


def test_reports_choose_the_same_axes(folder, results):
    results.metrics = []  # because curves contain random identifiers
    assert sweep.report(results) == sweep.report(results, "hat.scale", "seed")
    assert sweep.report(results) != sweep.report(results, "hat.scale", None)


@pytest.mark.parametrize(
    ("axes", "fixed", "message"),
    [
        (
            ("hat.size", None),
            {},
            "'hat.size' is not an axis of this sweep; its axes are prompt, seed",
        ),
        (("seed", "seed"), {}, "'seed' is used twice"),
        (("seed", None), {"seed": 1}, "'seed' is used twice"),
    ],
)
def test_invalid_axes_are_refused(results, axes, fixed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep.sheets(results, *axes, fixed)


def brightness(images, rows):
    return images.mean((1, 2, 3))


def test_metrics_are_measured_and_stored(folder, results):
    seen = []

    def count(images, rows):
        seen.append((images.shape, images.dtype, len(rows)))
        return np.where([row["seed"] == 1 for row in rows], np.nan, 1.0)

    measured = sweep.measure(folder, {"bright": brightness, "some": count})
    assert seen == [((19, 16, 24, 3), np.uint8, 19)]
    assert measured.metrics == ["bright", "some"]
    for row in measured.rows:
        if row["file"] is not None:
            assert row["bright"] == pytest.approx(np.mean(colour(row)))
            assert row["some"] == (None if row["seed"] == 1 else 1.0)
    assert next(row for row in measured.rows if row["file"] is None).get("bright") is None
    with pytest.raises(ValueError, match="'seed' is already a column of the records"):
        sweep.measure(folder, {"seed": brightness})
    with pytest.raises(ValueError, match="should consist of letters"):
        sweep.measure(folder, {"a/b": brightness})
    with pytest.raises(ValueError, match=r"returned shape \(\) for 19 pictures"):
        sweep.measure(folder, {"one": lambda images, rows: 1.0})


def test_distance_to_the_unedited_picture(results):
    rows = results.where({"prompt": "a cat", "seed": 1, "hat.warmup": 2})
    images = np.stack([np.asarray(results.picture(row)) for row in rows])
    values = dict(zip([row["hat.scale"] for row in rows], sweep.distance(results)(images, rows), strict=True))
    # Two unedited pictures match, and either may be used. In a real sweep, the two are equal; here, their blue channels
    # differ.
    assert values[-2.0] == pytest.approx(values[4.0], rel=0.5)
    assert values[-2.0] > 60 / 255 / np.sqrt(3) - 1e-9
    other = results.where({"prompt": "a cat"})[0] | {"prompt": "a bird"}
    assert np.isnan(sweep.distance(results)(images[:1], [other])[0])


def test_judge_metric():
    with pytest.raises(ValueError, match="the demo model's judge does not know 'spoon'"):
        sweep.judge("spoon")
    metric = sweep.judge("glasses")
    with pytest.raises(ValueError, match="128 x 128"):
        metric(np.zeros((1, 16, 24, 3), np.uint8), [{}])
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    expected = look(load_judge(), images, 64).probability[:, list(WORDS).index("glasses")]
    np.testing.assert_array_equal(metric(images, [{}, {}]), expected)


CLIP_TEXT = tiny.TEXT | {"num_hidden_layers": 1, "hidden_act": "gelu"}
CLIP_VISION = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_VISION |= {"image_size": 8, "patch_size": 4}


def test_clip_score(tmp_path, small_folder):
    config = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 10}
    tiny.write_json(tmp_path / "config.json", config)
    tiny.write_json(tmp_path / "preprocessor_config.json", {"size": {"shortest_edge": 8}, "crop_size": 8})
    for path in (small_folder / "tokenizer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = CLIPTextConfig.from_dict(CLIP_TEXT | {"projection_dim": 10})
    weights = tiny.tensors(CLIPModel(text, CLIPVisionConfig.from_dict(CLIP_VISION)))
    # Flip the sign, so that the cosines between these pictures and texts are positive.
    weights["text_projection.weight"] *= -1
    save_file(weights | {"logit_scale": np.ones((), np.float32)}, tmp_path / "model.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), np.uint8)
    rows = [{"prompt": words} for words in ("a cat", "a hat") * 4]
    values, cats, hats = (sweep.clip_score(tmp_path, text)(images, rows) for text in (None, "a cat", "a hat"))
    np.testing.assert_array_equal(values, np.where(np.arange(8) % 2, hats, cats))
    assert (cats != hats).any()
    assert ((values >= 0) & (values <= 100)).all()
    assert values.any()


def test_dollar_signs_are_not_formulas(results, tmp_path):
    texts = {"a cat": r"$\foo$ at 5", "a <script>": r"$\frac$"}
    results.rows[:] = [{**row, "prompt": texts[row["prompt"]]} for row in results.rows]
    results.axes["prompt"] = list(texts.values())
    for x, by in (("hat.scale", "prompt"), ("prompt", None)):
        sweep.plot(results, "seconds", x, by).savefig(tmp_path / "plot.svg")


def test_plots_show_means(folder, results):
    measured = sweep.measure(folder, {"bright": brightness})
    axes = sweep.plot(measured, "bright", "hat.scale", "seed", {"prompt": "a cat"}).axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert axes.get_xlabel() == "hat.scale"
    assert lines.keys() == {"1", "3"}
    grey = {s: [colour({"hat.scale": s, "seed": 1, "hat.warmup": warmup}) for warmup in WARMUPS] for s in SCALES}
    expected = [np.mean(grey[scale]) for scale in sorted(SCALES)]
    np.testing.assert_allclose(lines["1"], np.stack([sorted(SCALES), expected], 1))
    axes = sweep.plot(measured, "bright", "prompt").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a cat", "a <script>"]
    for y, x, message in (("digest", "seed", "not numbers"), ("seconds", "hut", "no column")):
        with pytest.raises(ValueError, match=message):
            sweep.plot(measured, y, x)


class Page(HTMLParser):
    """A parser that collects the tags of a page and the sources of its pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_a_single_file(folder):
    text = sweep.report(sweep.measure(folder, {"bright": brightness}), title="hats & <more>")
    page = Page(text)
    assert text.count("hats &amp; &lt;more&gt;") == 2
    assert "<th>prompt</th><td><bdi>&#34;a cat&#34;</bdi>, <bdi>&#34;a &lt;script&gt;&#34;</bdi></td>" in text
    assert "made by &lt;b&gt;ours&lt;/b&gt; in float32" in text
    assert not {"more", "script", "b"} & set(page.tags)
    assert page.tags.count("h2") == 3
    assert page.sources
    for source in page.sources:
        kind, data = re.fullmatch(r"data:(image/[\w+]+);base64,(.*)", source).groups()
        data = base64.b64decode(data)
        if kind == "image/webp":
            Image.open(io.BytesIO(data)).load()
        else:
            xml.dom.minidom.parseString(data)


def test_captions_in_other_scripts(results, tmp_path):
    """Each value in a list has its own direction, long labels are cut, and damaged text can be written to a file."""
    texts = {"a cat": "صورة لقطة, 猫" * 40, "a <script>": "x\ud800" * 100}
    results.rows[:] = [{**row, "prompt": texts[row["prompt"]]} for row in results.rows]
    results.axes["prompt"] = list(texts.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pictures show")
        text = sweep.report(results, "prompt", "seed")
        pages = sweep.sheets(results, "prompt", "seed", {"hat.warmup": 1, "hat.scale": 4.0}, side=64)
        pages += sweep.sheets(results, None, "prompt", {"seed": 3, "hat.scale": 4.0}, side=64)
        pages += sweep.sheets(results, "seed", None, {"hat.warmup": 1, "hat.scale": 4.0}, side=64)
    assert f"<bdi>&#34;{texts['a cat']}&#34;</bdi>, <bdi>&#34;x\\ud800x" in text
    text.encode()
    assert all(page.image.width < 600 and page.image.height < 600 for page in pages)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a cat, asleep", 'a "big" cat', "never"], ['"a cat, asleep"', '"a \\"big\\" cat"', '"never"']),
        ([(), ("hat",), ("hat", "bow")], ["[]", '["hat"]', '["hat", "bow"]']),
        ([(999, 500), (900,)], ["[999, 500]", "[900]"]),
        ([4.0, 2.5, None], ["4", "2.5", "never"]),
        ([f"cat {i}" for i in range(13)], [*(f'"cat {i}"' for i in range(5)), '… "cat 12" (13)']),
    ],
)
def test_reports_list_values_unambiguously(values, words):
    assert _values(values) == words


def test_a_report_without_jinja2(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ImportError, match=re.escape('reports need jinja2, but it is not installed; pip install ".[sweep]"')
    ):
        sweep.report(results)


def shell(*words):
    return CliRunner().invoke(main, ["sweep", *map(str, words)])


@pytest.mark.slow
def test_the_shell(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = shell("measure", folder, "--distance")
    assert said.exit_code == 0, said.output
    assert "distance: 17 numbers, mean" in said.output
    said = shell("sheet", folder, "--where", "prompt=a cat", "--side", "16")
    assert said.output == "Wrote sheet-1.png: hat.warmup = 1\nWrote sheet-2.png: hat.warmup = 2\n"
    said = shell("sheet", folder, "--where", "prompt = a cat", "--where", "hat.warmup=1.0", "--side", "16")
    assert said.output == "Wrote sheet.png\n"
    said = shell("plot", folder, "--y", "distance", "--x", "hat.scale", "--out", "curve.svg")
    assert said.output == "Wrote curve.svg\n"
    assert shell("report", folder).output == "Wrote report.html\n"
    names = {"sheet.png", "sheet-1.png", "sheet-2.png", "curve.svg", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    np.testing.assert_array_equal(
        Image.open("sheet-1.png").crop((0, 40, 9, 99)), Image.open("sheet.png").crop((0, 40, 9, 99))
    )
    for words, message in (
        (["sheet", folder, "--out", "a.png", "--where", "seed"], "--where seed should be AXIS=VALUE"),
        (["sheet", folder, "--out", "a.png", "--where", "seed=9"], "no picture has seed=9; its values are 3, 1"),
        (["sheet", folder, "--where", "seed=1", "--where", "seed=3"], "--where seed=3: seed already has a value"),
        (["measure", folder], "nothing to measure; give --judge, --distance or --clip"),
        (["measure", folder, "--distance", "--text", "a"], "--text is given without --clip"),
        (["measure", folder, "--clip", __file__], f"{__file__} is not a folder; give a local folder with a CLIP model"),
        (["report", tmp_path, "--out", "a.html"], "has no plan.json"),
    ):
        result = shell(*words)
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("sheet", "--where", "prompt=a cat"), "sheet-2.png"),
        (("sheet", "--where", "prompt=a cat", "--where", "hat.warmup=1"), "sheet.png"),
        (("plot", "--y", "seconds", "--x", "hat.scale", "--out", "plot"), "plot.png"),
        (("sheet", "--where", "prompt=a cat", "--where", "hat.warmup=1", "--out", "page"), "page.png"),
        (("report",), "report.html"),
        (("report", "--out", "page"), "page.html"),
    ],
)
def test_files_are_replaced_only_with_force(folder, tmp_path, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("kept")
    command = [words[0], folder, *words[1:]]
    with monkeypatch.context() as patch:
        # The command must not do any work before it refuses.
        patch.setattr(sweep.Results, "picture", None)
        patch.setattr(sweep, "plot", None)
        result = shell(*command)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {name} exists; add --force to replace it, or choose a different name with")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
    assert shell(*command, "--force").exit_code == 0
    assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("sheet", "--out", "a.foo"), "--out a.foo should have the extension of a picture, such as .png"),
        (("sheet", "--out", "a.jpg"), "); use .png, a smaller --side, or --where"),
        (("plot", "--y", "seconds", "--x", "hat.scale", "--out", "a.foo"), "); use .png, .svg or .pdf"),
    ],
)
def test_formats_that_cannot_be_written(folder, tmp_path, monkeypatch, words, remedy):
    too_wide = Image.new("RGB", (65501, 1))  # for a JPEG
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sheets.Page, "image", too_wide)
    result = shell(words[0], folder, *words[1:])
    assert result.exit_code == 1
    assert result.output.endswith(f"{remedy}\n")
    assert not list(tmp_path.iterdir())


class Counted(dict):
    """A row that counts how often its columns are read."""

    reads = 0

    def __getitem__(self, key):
        Counted.reads += 1
        return super().__getitem__(key)

    def get(self, key, default=None):
        Counted.reads += 1
        return super().get(key, default)


def test_sheets_look_up_each_given_value_once(results, monkeypatch):
    value, columns = sweep.Results.value, []
    monkeypatch.setattr(sweep.Results, "value", lambda *given: (columns.append(given[1]), value(*given))[1])
    assert sweep.sheets(results, fixed={"prompt": "a cat", "seed": "3"})
    assert columns == ["prompt", "seed"]


@pytest.mark.parametrize("report", ["sheets", "plot", "pages"])
def test_work_is_linear_in_the_number_of_pictures(results, report, monkeypatch):
    """A report on twice as many seeds reads about twice as many cells."""
    monkeypatch.setattr(sweep.Results, "picture", lambda *_: None)
    row, reads = results.rows[0], []
    for count in (500, 1000):
        results.rows = [Counted(row | {"seed": seed, "seconds": 1.0}) for seed in range(count)]
        results.axes["seed"] = list(range(count))
        Counted.reads = 0
        if report == "sheets":
            assert [page.image.width for page in sweep.sheets(results, "hat.scale", "seed", side=16)]
        elif report == "plot":
            sweep.plot(results, "seconds", "seed")
        else:
            assert len(list(results.pages((), {}))) == count
        reads.append(Counted.reads)
    assert reads[1] <= 2.1 * reads[0]
