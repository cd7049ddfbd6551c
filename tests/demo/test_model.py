"""Tests that the packaged demo model is small and that it follows prompts and edits."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import sega_jax
from sega_jax.cli.main import main
from sega_jax.demo.evaluate.measures import NAMES, effect, having, lacking
from sega_jax.demo.evaluate.pictures import PictureMaker, Request
from sega_jax.demo.judge import load_judge, look
from sega_jax.demo.settings import RECOMMENDED
from sega_jax.method.guidance import Edit
from sega_jax.pipelines import stored_settings
from sega_jax.pipelines.loading import DEMO

pytestmark = pytest.mark.usefixtures("one_by_default")

PACKAGE = Path(sega_jax.__file__).parent
STEPS = 10  # half of the recommended number, to save time


@pytest.fixture(scope="module")
def maker(one_device):
    call = {**RECOMMENDED.call, "steps": STEPS}
    return PictureMaker(sega_jax.load(devices=one_device), load_judge(), batch=4, call=call)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def test_the_package_is_small():
    assert size(DEMO) < 30e6
    assert size(PACKAGE) < 40e6


@pytest.mark.slow
def test_prompts_are_followed(maker):
    prompts = {
        "a portrait of a woman with long red hair": ["long hair", "red hair"],
        "a smiling man with a beard and glasses": ["smile", "beard", "glasses"],
        "a sad bald person with dark skin": ["sad", "bald", "dark skin"],
        "a person wearing a blue hoodie on a yellow background": ["hoodie", "blue clothes", "yellow background"],
    }
    pictures = maker([Request(prompt, 0) for prompt in prompts])
    for i, words in enumerate(prompts.values()):
        assert all(having(pictures, word)[i] for word in words)


@pytest.mark.slow
def test_edits_add_and_remove(maker):
    requests = [Request("a portrait of a man with a beard", seed) for seed in range(4)]
    before = maker(requests)
    edits = [Edit(word) for word in ("smile", "red clothes", "blue background")]
    edits.append(Edit("beard", scale=-5))
    words = [edit.concept for edit in edits]
    assert [lacking(before, word)[i].item() for i, word in enumerate(words)] == [True, True, True, False]
    after = maker([request._replace(edits=(edit,)) for request, edit in zip(requests, edits, strict=True)])
    assert all(having(after, word)[i] for i, word in enumerate(words[:3]))
    assert not having(after, "beard")[3]
    effects = effect(before, after, [[word] for word in words])
    assert effects.kept[:3].mean() >= 0.85
    assert effects.distance[:3].max() < 0.2
    assert effects.distance[3] < 0.3


@pytest.mark.slow
def test_the_shell_uses_the_demo_model(tmp_path):
    runner = CliRunner()
    words = ["edit", "--prompt", "a portrait of a woman with brown hair", "--edit", "glasses", "--seed", "3"]
    result = runner.invoke(main, [*words, "--out", str(tmp_path)])
    assert not result.exit_code, result.output
    assert "Loaded the demo model: DDIMScheduler" in result.output
    assert "+ glasses: scale 5, threshold 0.7, from call 8" in result.output
    assert "as the checkpoint recommends: steps 20, guidance_scale 4, momentum_scale 0.4" in result.output
    made = [np.asarray(Image.open(tmp_path / f"0001-{name}.png")) for name in ("original", "edited")]
    assert look(load_judge(), np.stack(made), 2).words[:, NAMES.index("glasses")].tolist() == [False, True]
    # `info` prints a command without a model, since the demo model is the default.
    known = stored_settings.read(tmp_path / "0001-edited.png")
    assert known["model"] is None
    assert known["steps"] == RECOMMENDED.call["steps"]
    output = runner.invoke(main, ["info", str(tmp_path / "0001-edited.png")]).output
    command = output.splitlines()[-1]
    assert "--model" not in command
    assert "--edit glasses:threshold=0.7,warmup=8 " in command
    assert "--steps 20 --guidance-scale 4.0" in command


def test_the_checkpoint_has_diffusers_layout():
    index = json.loads((DEMO / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0]:
            assert (DEMO / part).is_dir()
    vocabulary = json.loads((DEMO / "tokenizer" / "vocab.json").read_text())
    assert json.loads((DEMO / "text_encoder" / "config.json").read_text())["vocab_size"] == len(vocabulary)
