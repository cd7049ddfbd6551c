"""The commands `edit` and `info` with the demo model: its words, its defaults and its descriptions."""

import dataclasses
import warnings

import pytest
from click.testing import CliRunner
from PIL import Image

from sega_jax import Edit
from sega_jax.cli.concepts import check_known
from sega_jax.cli.edit_run import Job, advise
from sega_jax.cli.main import main
from sega_jax.demo.attributes import WORDS
from sega_jax.demo.training.wording import known_words
from sega_jax.pipelines import png


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.mark.parametrize(
    ("concept", "known"),
    [
        ("glasses", True),
        ("Smiling, a smile", True),
        ("gray hair", True),
        ("boat on a river", False),
        ("in the sun", False),
    ],
)
def test_the_demo_model_warns_about_unknown_words(concept, known):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_known(Edit(concept))
    assert len(caught) == (0 if known else 1)
    if not known:
        assert (
            f"not know any word in {concept!r}, so this edit has no reliable effect; known words include glasses"
            in str(caught[0].message)
        )


def test_every_word_of_the_demo_model_is_known():
    for word in WORDS:
        assert not known_words().isdisjoint(word.split())


def test_the_demo_model_has_defaults_of_its_own_in_the_help_page():
    short, full = (" ".join(run("edit", page).output.split()) for page in ("--help", "--help-all"))
    assert "[default: 20 for the demo model; 50 for Stable Diffusion 1.x or 2.x; for others, see --help-all;" in short
    assert "100 for DeepFloyd-IF's first stage; 32 for Paella; range: at least 1]" in full
    assert "[default: 4 for the demo model; 7.5 for Stable Diffusion 1.x or 2.x;" in full
    assert "[default: 0.4 for the demo model, otherwise 0.1; range: 0 to 1]" in full
    for page in (short, full):
        assert "[default: 0.9; for the demo model with 20 steps, 0.7 to add and 0.9 to remove; range: 0 to 1]" in page


STORED = (
    Edit("glasses", threshold=0.9, warmup=8),
    Edit("smile", scale=-5, threshold=0.9, warmup=10, momentum_beta=0.2),
)


def test_a_picture_of_the_demo_model_is_described_completely(tmp_path):
    edits = [dataclasses.asdict(edit) for edit in STORED]
    known = {"picture": "edited", "model": None, "revision": None, "prompt": "a man", "edits": edits, "seed": 1}
    known |= {"steps": 20, "momentum_scale": 0.3, "momentum_beta": 0.4}
    png.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", known)
    lines = run("info", tmp_path / "a.png").output.splitlines()
    assert "model          the demo model" in lines
    assert not any(line.startswith("revision") for line in lines)
    momentum = "weight 1, momentum_scale 0.3, momentum_beta"
    first = lines.index(f"edits          + glasses: scale 5, threshold 0.9, warmup 8, cooldown never, {momentum} 0.4")
    second = f"               - smile: scale 5, threshold 0.9, warmup 10, cooldown never, {momentum} 0.2"
    assert lines[first + 1] == second


def test_the_next_idea_names_the_concept_of_the_command(capsys):
    job = Job("a man", [Edit("red hair"), Edit("smile", scale=-4)], [0], {"model": "other"})
    advise(job)
    assert "a stronger effect, as in --edit 'red hair:scale=8', or" in capsys.readouterr().out
