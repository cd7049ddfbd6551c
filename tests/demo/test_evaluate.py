"""Tests the judge, and tests the evaluation with simulated editors whose effects are known."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support import tiny

from sega_jax.demo import judge
from sega_jax.demo.attributes import ATTRIBUTES, COLUMN, WORDS, kind
from sega_jax.demo.evaluate import diffusion, paella, report
from sega_jax.demo.evaluate.evaluation import run
from sega_jax.demo.evaluate.measures import NAMES, effect, having, interval, lacking
from sega_jax.demo.evaluate.methods import phrase
from sega_jax.demo.evaluate.pictures import PictureMaker, Pictures, Request
from sega_jax.demo.training import portraits
from sega_jax.pipelines import loading

pytestmark = pytest.mark.usefixtures("optimised")

# Draws each row separately, so that the choice of variants does not depend on the other rows.
render = jax.jit(jax.vmap(lambda row: portraits.render(row[None], jax.random.key(5))[0]))


def draw(attributes):
    return np.asarray((render(np.asarray(attributes, np.int32)) + 1) * 127.5).round().astype(np.uint8)


class Editor:
    """A simulated pipeline that draws a portrait from a seed and applies edits with scales of at least 2.

    By default its edits are perfect. `spoils` is an attribute that every edit also changes. `ignored` lists words that
    have no effect. With `swaps`, removing a word puts an alternative in its place, such as sunglasses for glasses.
    """

    def __init__(self, spoils=None, ignored=(), swaps=False):
        self.spoils, self.ignored, self.swaps = spoils, ignored, swaps

    def __call__(self, prompt, edits=(), *, seed, negative_prompt=(), replay=None, record=False, output="uint8", **_):
        if record:
            self.recorded = edits.concept
            return SimpleNamespace(record=SimpleNamespace(sem_guidance=np.ones((1, 1, 1, 1, 1))))
        rows = np.stack([np.asarray(portraits.sample(jax.random.key(s), 1))[0] for s in seed])
        for row, text, changes, negative in zip(rows, prompt, edits, negative_prompt, strict=True):
            applied = [(word, 9) for word in WORDS if text.endswith(phrase(word))]
            applied += [(word, -9) for word in negative.split(", ") if word]
            applied += [(edit.concept, edit.scale) for edit in changes if edit.concept]
            applied += [(self.recorded, 9)] if replay is not None else []
            for word, scale in applied:
                if word not in self.ignored and abs(scale) >= 2:
                    self.edit(row, word, scale)
        return SimpleNamespace(images=draw(rows))

    def edit(self, row, word, scale):
        name, value = WORDS[word]
        number = ATTRIBUTES[name].index(value)
        if scale < 0:
            # An attribute that may be absent has the values "none" and two others.
            other = (3 - number) * self.swaps if ATTRIBUTES[name][0] == "none" else (number + 1) % len(ATTRIBUTES[name])
            number = other if row[COLUMN[name]] == number else row[COLUMN[name]]
        row[COLUMN[name]] = number
        if self.spoils and name != self.spoils:
            row[COLUMN[self.spoils]] = (row[COLUMN[self.spoils]] + 1) % len(ATTRIBUTES[self.spoils])


@jax.tree_util.register_pytree_node_class
class Coder:
    """A stand-in for an autoencoder."""

    def encode(self, pictures):
        return pictures[:, ::4, ::4], None

    def decode(self, latents):
        return latents.repeat(4, 1).repeat(4, 2)

    def tree_flatten(self):
        return (), None

    @classmethod
    def tree_unflatten(cls, *_):
        return cls()


@pytest.fixture(scope="module")
def examiner():
    return judge.load_judge()


@pytest.mark.slow
def test_the_judge_does_not_import_training():
    """Sweeps import the judge, so importing it should stay fast."""
    code = "import sega_jax.demo.judge, sys; print([name for name in sys.modules if 'demo.training' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_judge_classifies_portraits(examiner):
    attributes = np.asarray(portraits.sample(jax.random.key(77), 200))
    verdict = judge.look(examiner, draw(attributes), block=64)
    shows = portraits.visible(attributes)
    assert ((verdict.attributes == attributes) & shows).sum(0).tolist() == shows.sum(0).tolist()
    assert (verdict.words == portraits.labels(attributes)).all()
    assert verdict.probability[verdict.words].min() > 0.5


@pytest.mark.slow
def test_training_saving_and_loading_a_judge(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        trained = judge.learn(Coder(), jax.random.key(0), steps=2, batch=4)
    judge.save_judge(trained, tmp_path / "judge.safetensors")
    again = judge.load_judge(tmp_path / "judge.safetensors")
    for old, new in zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-3)
    lines = []
    judge.report(again, Coder(), lines.append, count=20, block=20)
    assert len(lines) == len(ATTRIBUTES)


@pytest.fixture
def evaluation(examiner, tmp_path):
    def make(editor, words=("glasses", "beard", "hat", "red clothes", "dark skin", "hoodie"), seeds=8):
        return diffusion.DiffusionEvaluation(PictureMaker(editor, examiner, 16), tmp_path, seeds, words)

    return make


@pytest.mark.slow
def test_a_perfect_editor_succeeds(evaluation):
    rows = evaluation(Editor()).edits()
    assert {(row["action"], row["method"]) for row in rows} == {
        (action, method) for action, methods in diffusion.METHODS.items() for method in methods
    }
    for row in rows:
        assert row["n"]
        assert row["success"] == row["kept"] == 1
        assert row["low"] < 1 == row["high"]
        assert 0 < row["distance"] < 0.5


@pytest.mark.slow
def test_a_spoilt_background_is_not_kept(evaluation):
    rows = evaluation(Editor(spoils="background"), words=("glasses", "red clothes")).edits()
    # One of the nine other attributes changes. Hidden hair leaves fewer than nine to compare.
    assert all(row["success"] == 1 and 0.8 < row["kept"] < 0.9 for row in rows)


def test_replacing_glasses_by_sunglasses_is_not_removal(evaluation):
    rows = [row for row in evaluation(Editor(swaps=True), ("glasses", "red clothes")).edits() if row["n"]]
    assert {(row["word"], row["success"]) for row in rows if row["action"] == "remove"} == {
        ("glasses", 0), ("red clothes", 1)
    }  # fmt: skip


def test_ignored_words_fail(evaluation):
    rows = evaluation(Editor(ignored=("hat",)), words=("glasses", "hat")).edits()
    assert {row["word"]: row["success"] for row in rows} == {"glasses": 1, "hat": 0}
    assert all(row["kept"] == 1 for row in rows)
    several = evaluation(Editor(ignored=("hat",))).several()
    assert [row["count"] for row in several] == [1, 2, 3, 4, 5]
    assert several[0]["success"] > several[-1]["success"]
    assert all(row["each"] >= row["success"] for row in several)
    assert all(row["success"] == 1 for row in evaluation(Editor()).several())


@pytest.mark.slow
def test_all_studies_and_their_report(evaluation, tmp_path):
    small = evaluation(Editor(), words=("glasses", "red clothes", "dark skin"))
    results = {study: getattr(small, study)() for study in diffusion.STUDIES}
    about = {"seeds": 8, "dtype": "float32", "device": "an editor", "jax": jax.__version__}
    curve = {row["value"]: row["success"] for row in results["curves"] if row["method"] == "sega"}
    assert curve == {value: float(value >= 2) for value in diffusion.STRENGTHS["sega"]}
    assert all(row["correlation"] > 0.7 for row in results["monotonicity"])
    assert {row["prompt"] for row in results["robustness"]} == set(diffusion.PROMPTS)
    assert all(row["success"] == 1 for row in results["uniqueness"] + results["variants"] + results["prompts"])
    assert {row["setting"] for row in results["ablations"]} == set(diffusion.ABLATIONS)
    for setting in diffusion.ABLATIONS:
        assert (tmp_path / f"{setting}.png").is_file()

    written = {study: {"about": about, "found": rows} for study, rows in results.items()}
    (tmp_path / "results.json").write_text(json.dumps(written))
    outcome = CliRunner().invoke(report.main, [str(tmp_path)])
    assert not outcome.exit_code, outcome.output
    text = (tmp_path / "tables.md").read_text()
    for title in ("## Add", "## Remove", "## Several", "## Plain prompts", "## Ablations", "## Robustness"):
        assert title in text
    assert "nan" not in text
    assert "| glasses |" in text


def test_paella_studies(examiner, tmp_path, monkeypatch):
    """Runs the studies of Paella models with an editor that records its calls."""
    calls = []

    class RecordingEditor(Editor):
        dtype, devices = np.dtype("float32"), SimpleNamespace(devices=jax.devices())

        def __call__(self, prompt, edits=(), **call):
            calls.append(call)
            return super().__call__(prompt, edits, **call)

    monkeypatch.setattr(paella, "CHOICES", {"scale": (1.0, 3.0), "support": ("pixel",), "temperature": (1.0,)})
    words = ("glasses", "red clothes")
    small = paella.TokenEvaluation(PictureMaker(RecordingEditor(), examiner, 16, paella.CALL), tmp_path, 8, words)
    run(small, paella.STUDIES, {"model": "an editor"})
    results = {name: study["found"] for name, study in json.loads((tmp_path / "results.json").read_text()).items()}
    assert {(row["word"], row["method"], row["success"], row["kept"]) for row in results["edits"]} == {
        (word, method, 1, 1) for word in words for method in ("sega", "authors", "prompt")
    }
    chosen = {(row["setting"], row["value"]): row["success"] for row in results["choices"]}
    assert chosen == {("scale", "1.0"): 0, ("scale", "3.0"): 1, ("support", "pixel"): 1, ("temperature", "1.0"): 1}
    assert {(call["support"], call["temperature"]) for call in calls} == {
        ("channel", (1.0, 0.2)), ("pixel", (1.0, 0.2)), ("channel", 1.0)
    }  # fmt: skip
    assert Image.open(tmp_path / "pictures.png").width > 8 * 128
    assert not CliRunner().invoke(report.main, [str(tmp_path)]).exit_code
    text = (tmp_path / "tables.md").read_text()
    assert "sega_jax.demo.evaluate.paella" in text
    assert "## Choices" in text


def test_evaluations_refuse_models_of_the_other_kind(tmp_path):
    result = CliRunner().invoke(paella.main, [str(tmp_path / "out"), "--model", str(diffusion.DEMO)])
    assert result.exit_code == 1
    assert "is not a Paella model; evaluate it with sega_jax.demo.evaluate.diffusion" in result.output
    result = CliRunner().invoke(
        diffusion.main, [str(tmp_path / "out"), "--model", str(tiny.paella(tmp_path / "paella"))]
    )
    assert result.exit_code == 1
    assert "is a Paella model; evaluate it with sega_jax.demo.evaluate.paella" in result.output
    assert not (tmp_path / "out").exists()


def test_phrases_of_words():
    known = json.loads((loading.DEMO / "tokenizer" / "vocab.json").read_text())
    for word in WORDS:
        assert all(f"{part}</w>" in known for part in phrase(word).split())
    assert [phrase(word) for word in ("glasses", "smile", "open mouth", "hat", "overalls", "red clothes")] == [
        "with glasses", "with a smile", "with an open mouth", "wearing a hat", "wearing overalls",
        "wearing red clothes",
    ]  # fmt: skip


def test_alternatives_of_words():
    assert kind("glasses") == ("glasses", "sunglasses")
    assert kind("beanie") == ("beanie", "hat")
    assert kind("red clothes") == ("red clothes",)


def test_hidden_attributes_are_not_counted(examiner):
    attributes = np.zeros((3, len(ATTRIBUTES)), int)
    attributes[:, COLUMN["hair"]] = [0, 1, 1]  # bald, short, short below a hat
    attributes[2, COLUMN["hat"]] = 1
    attributes[1, COLUMN["hair colour"]] = 3
    pictures = Pictures(np.zeros((3, 2, 2, 3), np.uint8), judge.Verdict(attributes, np.zeros((3, len(WORDS)))))
    assert having(pictures, "red hair").tolist() == [False, True, False]
    assert lacking(pictures, "red hair").tolist() == [False, False, False]
    assert lacking(pictures, "blue hair").tolist() == [False, True, False]
    assert lacking(pictures, "bald").tolist() == [False, True, False]
    same = effect(pictures, pictures, [["glasses"], ["red hair"], ["hat"]])
    assert same.success.tolist() == [False, True, True]
    assert same.kept.tolist() == [1, 1, 1]
    assert effect(pictures, pictures, [["glasses"]] * 3, removed=True).success.all()
    assert list(WORDS) == NAMES


def test_confidence_interval():
    # The expected values are from tables of Wilson's interval.
    np.testing.assert_allclose(interval(8, 10), (0.490, 0.943), atol=5e-4)
    np.testing.assert_allclose(interval(0, 10), (0, 0.278), atol=5e-4)
    assert interval(0, 0) == (0, 1)


@pytest.mark.slow
def test_batch_size_does_not_change_pictures(examiner):
    requests = [Request("a portrait", seed) for seed in range(5)]
    one, other = (PictureMaker(Editor(), examiner, batch)(requests) for batch in (5, 2))
    np.testing.assert_allclose(one.pixels, other.pixels, atol=1)
    assert (one.verdict.attributes == other.verdict.attributes).all()


def test_unknown_words_and_studies_are_refused(tmp_path):
    for option in ("--words", "--studies"):
        result = CliRunner().invoke(diffusion.main, [str(tmp_path / "out"), option, "monocle"])
        assert result.exit_code == 2
        assert "monocle should be among" in result.output
        assert not (tmp_path / "out").exists()
