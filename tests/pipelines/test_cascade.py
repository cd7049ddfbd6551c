"""Cascades: running the stages, memory, text cleaning, the shell command, and the diffusers interface."""

import dataclasses
import gc
import shlex
import sys
import types
from functools import partial

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support import tiny

from sega_jax import Cascade, CheckpointError, Edit, SemanticIFPipeline, load_cascade
from sega_jax.cli.main import main
from sega_jax.pipelines import loading, pipeline
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import EmbeddingCache

pytestmark = pytest.mark.usefixtures("one_by_default")

EDITS = [Edit("glasses", warmup=0, threshold=0.5), Edit("hat", scale=-4, warmup=1)]
# Most calls have two rows and two concepts, so that they share compiled programs.
TWO = ["a cat", "dog"]
STEPS = {"stage1": {"steps": 3}, "stage2": {"steps": 2, "noise_level": 100}, "upscaler": {"steps": 2}}


@pytest.fixture(autouse=True)
def _fast_garbage_collection():
    """Excludes existing objects from garbage collection, which a cascade runs after every stage."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(stages, first):
    return load_cascade(**stages, devices=first.devices)


def test_a_cascade_equals_its_stages_called_alone(whole, first, second, upscaler):
    words, call = ["a cat", "dog"], {"seed": [5, 9], "negative_prompt": "bad"}
    made = whole(words, EDITS, **call, **STEPS, output="float")
    one = first(words, EDITS, **call, **STEPS["stage1"], output="float")
    two = second(words, image=one.images, **call, **STEPS["stage2"], output="float")
    three = upscaler(words, image=two.images, **call, **STEPS["upscaler"], output="float")
    for found, wanted in zip(made.stages.values(), (one, two, three), strict=True):
        np.testing.assert_array_equal(found.images, wanted.images)
    assert list(made.stages) == ["stage1", "stage2", "upscaler"]
    np.testing.assert_array_equal(made.images, three.images)
    assert made.images.shape == (2, 128, 128, 3)
    assert made.finite.all()
    assert made.seeds == [5, 9]


@pytest.mark.slow
def test_edits_guide_the_chosen_stages(whole):
    call = partial(whole, TWO, output="uint8", **STEPS)
    plain, one, two, upper = (
        call(EDITS, edited=names).stages for names in ([], "stage1", ["stage2"], ("stage2", "upscaler"))
    )
    assert np.any(plain["stage1"].images != one["stage1"].images)
    assert np.all(plain["stage1"].images == two["stage1"].images)
    assert np.any(plain["stage2"].images != two["stage2"].images)
    assert np.all(upper["stage2"].images == two["stage2"].images)
    assert np.any(upper["upscaler"].images != two["upscaler"].images)
    own = whole(TWO, output="uint8", **STEPS | {"stage2": STEPS["stage2"] | {"edits": EDITS}})
    assert np.all(own.stages["stage2"].images == two["stage2"].images)


@pytest.mark.slow
def test_the_first_stage_determines_all_sizes(whole):
    options = STEPS | {"stage1": {"steps": 2, "height": 4, "width": 6}}
    made = whole("a cat", images_per_prompt=2, **options).images
    assert [image.size for image in made] == [(96, 64)] * 2


def test_cascades_of_one_and_two_stages(stages, first):
    two = load_cascade(stages["stage1"], stages["stage2"], devices=first.devices)
    assert two(TWO, EDITS, stage1={"steps": 2}, stage2={"steps": 1}).images[0].size == (32, 32)
    one = load_cascade(stages["stage1"], devices=first.devices, schedulers={"stage1": tiny.DDIM})
    assert one("cat", stage1={"steps": 1}).images[0].size == (8, 8)
    assert one.stages["stage1"].load().scheduler.name == "DDIMScheduler"


def held():
    """Returns the total size, in bytes, of all arrays on the devices."""
    return sum(array.nbytes for array in jax.live_arrays())


def bytes_of(module):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(module))


def test_low_memory_keeps_one_network_at_a_time(stages, first, second, upscaler, whole, monkeypatch):
    """The text encoder is in memory while words are encoded; after that, only the running stage is in memory."""
    sizes = {"text": bytes_of(first.models.text_encoder), "stage1": bytes_of(first.models.unet)}
    sizes |= {"stage2": bytes_of(second.models.unet), "upscaler": bytes_of(upscaler.models)}
    run, encode, call, seen = pipeline.run, EmbeddingCache.__call__, {"output": "uint8"} | STEPS, []
    wanted = whole(["a cat", "dog"], EDITS, **call).images
    before = held()
    monkeypatch.setattr(pipeline, "run", lambda *a: seen.append(held() - before) or run(*a))
    monkeypatch.setattr(EmbeddingCache, "__call__", lambda *a: seen.append(held() - before) or encode(*a))
    small = load_cascade(**stages, devices=first.devices, low_memory=True)
    assert held() == before
    made = small(["a cat", "dog"], EDITS, **call).images
    np.testing.assert_array_equal(made, wanted)
    # The upscaler has its own text encoder.
    slack = 5000
    for found, name in zip(seen, ["text", "stage1", "stage2", "upscaler", "upscaler"], strict=True):
        assert sizes[name] <= found < sizes[name] + slack, name
    assert held() - before < slack
    seen.clear()
    small(["a cat", "dog"], EDITS, **call)
    assert len(seen) == 4, "cached words are encoded again"


@pytest.mark.parametrize("output", ["pil", "uint8", "float", "latent"])
def test_pictures_that_are_not_finite_in_one_stage(whole, output):
    """Pictures that are not finite in one stage are missing from the result even if later stages turn them into finite
    ones; other pictures are unaffected."""

    def broken(pipe):
        def call(**options):
            made = pipe(**options)
            bad = np.arange(len(made.finite)) == 1
            return dataclasses.replace(
                made, images=np.where(bad[:, None, None, None], np.nan, made.images), finite=~bad
            )

        return call

    first = whole.stages["stage1"]
    other = Cascade(whole._encode, whole.stages | {"stage1": first._replace(load=lambda: broken(first.load()))})
    wanted = whole(TWO, EDITS, output=output, **STEPS)
    with pytest.warns(RuntimeWarning, match=r"pictures \[1\] contain NaN"):
        made = other(TWO, EDITS, output=output, **STEPS)
    assert made.finite.tolist() == [True, False]
    assert made.stages["upscaler"].finite.all()
    np.testing.assert_array_equal(made.images[0], wanted.images[0])
    lost = {"pil": lambda image: image is None, "uint8": lambda image: not image.any()}
    assert lost.get(output, lambda image: np.isnan(image).all())(made.images[1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"edited": ["stage3"]}, ValueError, "'stage3' is not a stage of this cascade, which has stage1, stage2, up"),
        ({"stage1": {"image": 3}}, TypeError, "stage1 has image, which the cascade sets"),
        ({"stage1": {"scale": 3}}, TypeError, "scale"),
        ({"stage2": {"noise_level": 1000}}, ValueError, "stage2's noise_level=1000 should be from 0 to 999"),
        ({"upscaler": {"noise_level": 351}}, ValueError, "noise_level=351 should be from 0 to 350"),
        ({"upscaler": {"steps": 0}}, ValueError, "steps=0 should be"),
        ({"stage2": {"height": 16}}, ValueError, "image has 8x8 pixels"),
        ({"stage1": {"height": 7}}, ValueError, "height=7 is not a multiple of 2"),
        ({"prompt": np.zeros((77, 24), np.float32)}, TypeError, "prompt and negative_prompt should be strings"),
        ({"prompt": []}, TypeError, "prompt and negative_prompt should be strings"),
        ({"negative_prompt": 3}, TypeError, "prompt and negative_prompt should be strings"),
        ({"edits": 3}, TypeError, "edits=3 should be a list of strings and Edits"),
        ({"edits": [3]}, TypeError, "edits: 3 should be a string"),
        ({"seed": -1}, ValueError, "seed=-1 should be"),
        ({"output": "png"}, ValueError, "output='png' should be one of"),
    ],
)
@pytest.mark.parametrize("low_memory", [False, True])
def test_invalid_calls(whole, stages, first, monkeypatch, low_memory, options, error, words):
    """The arguments of all stages are checked before the first stage runs."""
    mine = load_cascade(**stages, devices=first.devices, low_memory=True) if low_memory else whole
    monkeypatch.setattr(Devices, "map", lambda *_, **__: pytest.fail("a program ran"))
    monkeypatch.setattr(loading, "fill", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error, match=words):
        mine(**{"prompt": "cat"} | options)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ({"stage1": "stage2"}, CheckpointError, "stage1=.* is DeepFloyd-IF's second stage, expected DeepFloyd-IF's fi"),
        ({"stage2": "stage1"}, CheckpointError, "is DeepFloyd-IF's first stage, expected DeepFloyd-IF's second"),
        ({"upscaler": "stage2"}, CheckpointError, "second stage, expected Stable Diffusion's x4 upscaler"),
        ({"stage2": None}, ValueError, "upscaler is given without stage2"),
    ],
)
def test_checkpoints_of_other_stages(stages, monkeypatch, names, error, words):
    monkeypatch.setattr(loading, "fill", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error, match=words):
        load_cascade(**stages | {name: stages.get(other) for name, other in names.items()})


def test_checkpoints_of_other_families_and_missing_text_encoders(stages, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion 1.x or 2.x, expected DeepFloyd-IF's first stage"):
        load_cascade(folder)
    with pytest.raises(ValueError, match=r"schedulers has stage2; the stages are stage1"):
        load_cascade(stages["stage1"], schedulers={"stage2": tiny.DDIM})
    bare = tiny.stage(tmp_path / "bare", text=None)
    with pytest.raises(CheckpointError, match="without text_encoder, so it cannot encode words; give a complete check"):
        load_cascade(bare, low_memory=True)("cat", stage1={"steps": 1})


def test_an_unsupported_safety_checker_is_warned_about(tmp_path, first):
    named = tiny.stage(tmp_path / "named", safety=True)
    with pytest.warns(
        UserWarning, match="named has DeepFloyd-IF's safety checker, which is not supported: pictures are"
    ):
        load_cascade(named, devices=first.devices, low_memory=True)


@pytest.fixture
def captions(monkeypatch):
    """Replaces the caption-cleaning module with a stub, and returns the list of texts that the stub receives."""
    asked = []
    module = types.ModuleType("captions")
    module.clean = lambda text: asked.append(text) or "cleaned"
    monkeypatch.setitem(sys.modules, "sega_jax.text.caption_cleaning", module)
    monkeypatch.setattr(sys.modules["sega_jax.text"], "caption_cleaning", module, raising=False)
    return asked


def test_clean_cleans_words(whole, first, captions):
    made = whole(["a <b>cat", "dog"], EDITS, clean=True, output="float", **STEPS)
    assert set(captions) == {"a <b>cat", "dog", "glasses", "hat"}
    cleaned = [dataclasses.replace(edit, concept="cleaned") for edit in EDITS]
    wanted = first(["cleaned"] * 2, cleaned, output="float", **STEPS["stage1"])
    np.testing.assert_array_equal(made.stages["stage1"].images, wanted.images)
    assert made.stages["upscaler"].finite.all()


# The diffusers interface


WORDS = {
    "editing_prompt": ["glasses", "hat"],
    "edit_threshold": [0.5, 0.9],
    "edit_guidance_scale": [5, 4],
    "reverse_editing_direction": [False, True],
    "edit_warmup_steps": [0, 1],
}


@pytest.mark.slow
def test_the_first_stage_in_diffusers_names(first, captions):
    face = SemanticIFPipeline.from_pipe(first)
    call = {"num_inference_steps": 3, "seed": 5, "output_type": "np"}
    out = face(TWO, **WORDS, **call, clean_caption=False, return_guidance=True)
    wanted = first(TWO, EDITS, steps=3, seed=5, output="float", record=True)
    np.testing.assert_array_equal(out.images, wanted.images)
    np.testing.assert_array_equal(out.sem_guidance, np.moveaxis(wanted.record.sem_guidance, 1, 0))
    assert out.edit_estimates.shape == (3, 2, 2, 8, 8, 3)
    assert (out.nsfw_detected, out.watermark_detected) == (None, None)
    assert not captions
    np.testing.assert_array_equal(face(TWO, **WORDS, **call).images, face(["cleaned"] * 2, **WORDS, **call).images)
    assert set(captions) == {*TWO, "glasses", "hat", "cleaned"}
    images, *flags = face(TWO, timesteps=[900, 10], clean_caption=False, return_dict=False)
    assert images[0].size == (8, 8)
    assert flags == [None, None]


def test_the_cascade_in_diffusers_names(stages, first, whole):
    one = SemanticIFPipeline.from_pretrained(stages["stage1"], devices=first.devices, safety_checker=None)
    two = SemanticIFPipeline.from_pretrained(stages["stage2"], devices=first.devices, text_encoder=None)
    prompt, negative = one.encode_prompt(TWO)
    text = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "seed": 4, "output_type": "np"}
    small = one(**text, num_inference_steps=3).images
    large = two(image=small, **text, num_inference_steps=2, noise_level=100).images
    wanted = whole(TWO, seed=4, output="float", **STEPS).stages["stage2"].images
    np.testing.assert_array_equal(large, wanted)
    assert two.text_encoder is two.tokenizer is None
    two.scheduler = "DDIMScheduler"
    assert two.scheduler.name == "DDIMScheduler"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"output_type": "pt"}, ValueError, "output_type='pt' .* is not supported; use 'np' for arrays"),
        ({"generator": "3"}, TypeError, "generator='3' should be a seeded torch generator"),
        ({"prompt": None}, TypeError, "prompt=None should be a string or a list of strings"),
        ({"guidance_scale": "7"}, TypeError, "guidance_scale='7' should be a finite number"),
        ({"edit_warmup_steps": [1]}, ValueError, "edit_warmup_steps has 1 entries for 2 concepts"),
        ({"image": np.zeros((8, 8, 3))}, TypeError, "image is not an argument of a call of DeepFloyd-IF's first stage"),
    ],
)
def test_invalid_calls_in_diffusers_names(first, monkeypatch, options, error, words):
    monkeypatch.setattr(Devices, "map", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(error, match=words):
        SemanticIFPipeline.from_pipe(first)(**{"prompt": "cat", "clean_caption": False} | WORDS | options)


def test_diffusers_names_get_advice(whole):
    with pytest.raises(TypeError, match="num_inference_steps is diffusers' name; write steps"):
        whole("a cat", num_inference_steps=3)
    assert repr(whole).startswith("<Cascade: DeepFloyd-IF's first stage, DeepFloyd-IF's second stage, Stable")


def test_the_diffusers_interface_has_no_safety_checker(stages):
    with pytest.raises(TypeError, match="safety_checker is not supported"):
        SemanticIFPipeline.from_pretrained(stages["stage1"], safety_checker=True)


# The shell command


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture
def command(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["edit", "--model", stages["stage1"], "--prompt", "a cat", "--edit", "glasses:warmup=0", "--steps", 2]
    words += ["--edit", "-hat:warmup=1"]
    return partial(run, *words, "--out", tmp_path / "out")


@pytest.mark.slow
def test_the_command(stages, command, tmp_path):
    words = ["--stage2", stages["stage2"], "--upscaler", stages["upscaler"], "--low-memory", "--edited", "stage1"]
    words += ["--edited", "stage2", "--stage2-steps", 3, "--upscaler-steps", 2, "--stage2-noise-level", 99]
    result = command(*words, "--stage2-guidance-scale", 3, "--upscaler-noise-level", 0, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert "Loaded" not in result.output
    made = {name: Image.open(tmp_path / "out" / f"0001-{name}.png") for name in ("original", "edited")}
    assert made["original"].size == (128, 128)
    said = run("info", tmp_path / "out" / "0001-edited.png").output
    for part in ("guidance_scale 7.0", "stage2_steps 3", "edited stage1; stage2", "low_memory True"):
        assert part in " ".join(said.split())
    again = run(*shlex.split(said.splitlines()[-1])[1:], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name, image in made.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again" / f"0001-{name}.png")), image)


def test_options_of_later_stages_reach_the_call(stages, command, tmp_path, monkeypatch):
    called = []

    def call(cascade, *_, **options):
        called.append((cascade, options))
        raise ValueError("enough")

    monkeypatch.setattr(Cascade, "__call__", call)
    tiny.write_json(tmp_path / "scheduler_config.json", tiny.X4_SCHEDULER | {"timestep_spacing": "trailing"})
    words = ["--stage2", stages["stage2"], "--upscaler", stages["upscaler"], "--low-memory", "--edited", "stage2"]
    words += ["--stage2-steps", "fast27", "--stage2-noise-level", 99, "--stage2-noise-anew", "--upscaler-steps", 2]
    words += ["--stage2-scheduler", "DDIMScheduler", "--upscaler-scheduler", tmp_path, "--upscaler-noise-level", 0]
    assert "enough" in command(*words).output
    ((cascade, options),) = called
    assert cascade.stages["stage1"].outline.scheduler.name == "DDPMScheduler"
    assert cascade.stages["stage2"].outline.scheduler.name == "DDIMScheduler"
    assert cascade.stages["upscaler"].outline.scheduler.config["timestep_spacing"] == "trailing"
    assert options["stage2"].items() >= {"steps": "fast27", "noise_level": 99, "noise_anew": True}.items()
    assert options["upscaler"].items() >= {"steps": 2, "noise_level": 0}.items()
    assert not options["upscaler"].get("noise_anew")
    assert "guidance_scale" not in options["upscaler"]
    assert options["edited"] == ("stage2",)


def test_the_command_of_the_first_stage_alone(command, tmp_path):
    result = command()
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "0001-edited.png").size == (8, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stage2", "{stage1}"], "is DeepFloyd-IF's first stage, expected DeepFloyd-IF's second stage"),
        (["--model", "{stage2}"], "enlarges pictures: give it as --stage2"),
        (["--model", "{upscaler}"], "enlarges pictures: give it as --upscaler"),
        (["--upscaler", "{upscaler}"], "--upscaler is given without --stage2"),
        (["--model", "{folder}", "--low-memory"], "--low-memory applies only to DeepFloyd-IF's cascade, but"),
        (["--stage2", "{stage2}", "--stage2-noise-level", "1000"], "--stage2-noise-level 1000 should be from 0 to 999"),
        (["--stage2-steps", "0"], "--stage2-steps 0 should be at least 1"),
        (["--upscaler-guidance-scale", "nan"], "--upscaler-guidance-scale nan should be a finite number"),
        (["--stage2", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_messages(stages, folder, command, tmp_path, options, words):
    result = command(*(option.format(**stages, folder=folder) for option in options))
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("*.png"))
