"""The safety checker: preprocessing, decisions, flagged pictures, and loading without a checker."""

import json
import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from reference import cases
from safetensors.numpy import load_file, save_file
from support import tiny
from support.recorded import recorded, relative, same_pixels

import sega_jax
from sega_jax import CheckpointError, Output, SemanticStableDiffusionPipeline
from sega_jax.cli.main import main
from sega_jax.nn import safety
from sega_jax.pipelines import pipeline
from sega_jax.pipelines.safety import FeatureExtractor, check

WEIGHTS = "safety_checker/model.safetensors"
FEATURES = "feature_extractor/preprocessor_config.json"
# The flags that the three pictures get with `tiny.thresholds`.
FLAGGED = [True, True, False]


@pytest.fixture(scope="module")
def checked_folder(tmp_path_factory):
    """Returns the folder of a checkpoint with a safety checker."""
    folder = tmp_path_factory.mktemp("checkpoints") / "checked"
    return tiny.checkpoint(folder, unet=tiny.UNET_1, safety=tiny.SAFETY)


@pytest.fixture(scope="module")
def read(one_device):
    return partial(sega_jax.load, devices=one_device)


@pytest.fixture
def copy(checked_folder, tmp_path):
    """Returns a copy of the checkpoint that tests can damage."""
    return shutil.copytree(checked_folder, tmp_path / "copy")


def draw(pipe, **options):
    return pipe("cat", **{"images_per_prompt": 3, "steps": 2, "output": "float"} | options)


@jax.jit
def cosines(checker, pixels):
    return checker.cosines(pixels)


@pytest.fixture(scope="module")
def checked(checked_folder):
    """Returns a pipeline on two devices, with thresholds that flag two of three pictures."""
    pipe = sega_jax.load(checked_folder, devices=jax.local_devices()[:2])
    both, pipe.safety = pipe.safety, None
    pixels = both.feature_extractor(draw(pipe, output="uint8").images)
    care, near = tiny.thresholds(*map(np.asarray, cosines(jax.device_get(both.checker), pixels)))
    both.checker.special_care_embeds_weights[...] = pipe.devices.place(care)
    both.checker.concept_embeds_weights[...] = pipe.devices.place(near)
    pipe.safety = both
    return pipe


@pytest.fixture
def flags(checked):
    """Returns a function that makes three pictures, two of which are flagged, and checks the warning about them."""

    def call(**options):
        with pytest.warns(UserWarning, match=r"safety checker flagged pictures \[0, 1\], which are replaced with"):
            return draw(checked, **options)

    return call


# Preprocessing


@pytest.fixture
def extractor(tmp_path):
    def make(**options):
        config = {"size": 12, "crop_size": 12} | options
        tiny.write_json(tmp_path / "preprocessor_config.json", config)
        return FeatureExtractor(tmp_path, 12)

    return make


def shown(height, width):
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)


def normalised(images):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return (images / 255 - mean) / std


@pytest.mark.parametrize(("height", "width"), [(12, 12), (12, 31), (40, 12)])
def test_the_centre_is_cropped(extractor, height, width):
    images = shown(height, width)
    pixels = extractor()(images)
    top, left = (height - 12) // 2, (width - 12) // 2
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, normalised(images[:, top : top + 12, left : left + 12]), rtol=1e-5, atol=1e-6)


def test_a_picture_smaller_than_the_crop_has_a_black_border(extractor):
    images = shown(7, 7)
    pixels, wanted = extractor(size=7)(images), np.zeros((2, 12, 12, 3))
    wanted[:, 3:10, 3:10] = images
    np.testing.assert_allclose(pixels, normalised(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(5, 90), (33, 32), (224, 12), (1, 1)])
@pytest.mark.parametrize("size", [12, 17, {"shortest_edge": 13}])
def test_one_colour_stays_one_colour(extractor, height, width, size):
    colour = np.array([3, 200, 90], np.uint8)
    pixels = extractor(size=size)(np.broadcast_to(colour, (1, height, width, 3)))
    np.testing.assert_allclose(pixels, np.broadcast_to(normalised(colour), (1, 12, 12, 3)), rtol=1e-5, atol=1e-6)


def test_other_means_deviations_and_factors(extractor):
    numbers = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 0.01}
    images = shown(12, 12)
    wanted = (images * 0.01 - numbers["image_mean"]) / numbers["image_std"]
    pixels = extractor(**numbers, crop_size={"height": 12, "width": 12})(images)
    np.testing.assert_allclose(pixels, wanted, rtol=1e-5, atol=1e-5)


# The decision


def by_hand(special, concepts, special_thresholds, thresholds):
    """Computes the flags concept by concept, with scalars."""
    flags = []
    for row in range(len(special)):
        more = 0.0
        for cosine, least in zip(special[row], special_thresholds.tolist(), strict=True):
            if round(cosine - least + more, 3) > 0:
                more = 0.01
        scores = [round(c - least + more, 3) for c, least in zip(concepts[row], thresholds.tolist(), strict=True)]
        flags.append(max(scores) > 0)
    return np.array(flags)


@cache
def decisions():
    """Returns cosines close to their thresholds, the thresholds, and the expected flags."""
    rng = np.random.default_rng(0)
    thresholds = [rng.uniform(0.1, 0.3, n).astype(np.float32) for n in (3, 17)]
    near = [
        (least + np.round(rng.uniform(-0.013, 0.0008, (2000, len(least))), 4)).astype(np.float32)
        for least in thresholds
    ]
    wanted = by_hand(*near, *thresholds)
    assert 0.2 < wanted.mean() < 0.8
    return *near, *thresholds, wanted


def test_the_decision_equals_a_plain_loop():
    *given, wanted = decisions()
    assert np.array_equal(jax.jit(safety.too_near)(*given), wanted)


def test_half_precision_decides_in_float32(read, checked_folder):
    half = read(checked_folder, dtype="bfloat16")
    assert half.safety.checker.concept_embeds[...].dtype == jnp.bfloat16
    special, concepts = cosines(half.safety.checker, recorded("safety")["pixels"])
    assert special.dtype == concepts.dtype == np.float32
    assert relative(np.asarray(concepts), recorded("safety")["concepts"]) < 0.03


# Pictures


def test_flagged_pictures_are_black(checked, flags, monkeypatch):
    floats, bytes_, pictures = (flags(output=output) for output in ("float", "uint8", "pil"))
    monkeypatch.setattr(checked, "safety", None)
    plain = draw(checked)
    assert plain.flagged is None
    for out in (floats, bytes_, pictures):
        assert out.flagged.tolist() == FLAGGED
        assert out.finite.all()
        assert not any(np.any(image) for image in out.images[:2])
    assert floats.images.dtype == np.float32
    assert np.array_equal(floats.images[2:], plain.images[2:])
    assert np.array_equal(bytes_.images, (floats.images * 255).round())
    assert all(np.array_equal(*pair) for pair in zip(pictures.images, bytes_.images, strict=True))


def test_latents_are_not_checked(checked, monkeypatch):
    out = draw(checked, output="latent")
    monkeypatch.setattr(checked, "safety", None)
    assert out.flagged is None
    assert np.array_equal(out.images, draw(checked, output="latent").images)


def test_unflagged_pictures_do_not_warn(checked, recwarn):
    out = draw(checked, seed=[2, 2, 2])
    assert out.flagged.tolist() == [False] * 3
    assert not recwarn


def test_a_picture_that_is_not_finite_is_not_flagged(checked, monkeypatch):
    monkeypatch.setitem(checked.devices._programs, (check, (None, 0)), lambda *_: np.ones((2, 2), bool))
    with pytest.warns(RuntimeWarning, match=r"pictures \[1\] contain"), pytest.warns(UserWarning, match=r"\[0, 2\]"):
        out = draw(checked, guidance_scale=[7.5, 1e38, 7.5], output="pil")
    assert out.finite.tolist() == [True, False, True]
    assert out.flagged.tolist() == [True, False, True]
    assert out.images[1] is None
    assert not np.any(out.images[0])


def test_the_diffusers_interface(checked):
    face = SemanticStableDiffusionPipeline.from_pipe(checked)
    call = {"prompt": "cat", "num_images_per_prompt": 3, "num_inference_steps": 2, "output_type": "np"}
    with pytest.warns(UserWarning, match="safety checker"):
        out, (images, flagged) = face(**call), face(**call, return_dict=False)
    assert out.nsfw_content_detected == flagged == FLAGGED
    assert np.array_equal(out.images, images)
    assert face(**call | {"output_type": "latent"}).nsfw_content_detected is None


@pytest.mark.filterwarnings("ignore:the safety checker")
def test_more_calls_compile_nothing(checked, compilations):
    draw(checked)
    compilations.clear()
    draw(checked, seed=7, guidance_scale=3)
    assert not compilations


# Loading without a safety checker


@pytest.mark.parametrize("value", [False, None])
def test_files_of_an_omitted_checker_are_not_read(copy, read, value):
    (copy / WEIGHTS).write_bytes(b"")
    (copy / FEATURES).write_text("{")
    (copy / "safety_checker/config.json").unlink()
    assert read(copy, safety_checker=value).safety is None
    face = SemanticStableDiffusionPipeline.from_pretrained(
        copy, safety_checker=value, feature_extractor=None, requires_safety_checker=False
    )
    assert face.safety_checker is None


def test_checkpoints_without_a_checker(read, folder, copy):
    assert read(folder).safety is None
    index = json.loads((copy / "model_index.json").read_text())
    del index["safety_checker"]
    tiny.write_json(copy / "model_index.json", index)
    assert read(copy).safety is None


def test_a_missing_folder_warns(read, copy):
    shutil.rmtree(copy / "safety_checker")
    with pytest.warns(UserWarning, match="lists a safety checker but has no folder for it, so pictures are not"):
        assert read(copy).safety is None


def test_turning_it_off_by_diffusers_names(read, checked_folder):
    face = SemanticStableDiffusionPipeline.from_pretrained(checked_folder, devices=jax.local_devices()[:1])
    assert face.safety_checker is face.pipeline.safety.checker
    with pytest.raises(TypeError, match="cannot be replaced"):
        face.safety_checker = lambda *_: None
    face.safety_checker = None
    assert face.safety_checker is face.pipeline.safety is None


@pytest.mark.parametrize("value", ["none", 0, lambda images, **_: (images, [False])])
def test_other_checkers_are_rejected(read, checked_folder, value):
    with pytest.raises(TypeError, match=r"safety_checker=.* should be True \(the checkpoint's own\)"):
        read(checked_folder, safety_checker=value)
    with pytest.raises(TypeError, match="feature_extractor needs the safety_checker"):
        SemanticStableDiffusionPipeline.from_pretrained(checked_folder, feature_extractor=value)


# Broken checkpoints


def refused(read, copy, *words):
    with pytest.raises(CheckpointError) as caught:
        read(copy)
    missing = [word for word in (str(copy), *words) if word not in str(caught.value)]
    assert not missing, str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS, FEATURES, "safety_checker/config.json"])
def test_missing_and_broken_files(read, copy, name):
    (copy / name).write_bytes(b"{")
    refused(read, copy, name, "fetch it again")
    (copy / name).unlink()
    refused(read, copy, name, "is missing")


VISION = tiny.SAFETY["vision_config"]


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        (FEATURES, "crop_size", 14, ["crop_size=14", "takes 12 x 12", "from the same checkpoint"]),
        (FEATURES, "crop_size", {"height": 12, "width": 14}, ["crop_size={'height': 12, 'width': 14} should be"]),
        (FEATURES, "crop_size", "12", ["crop_size='12' is invalid; use a value such as 224"]),
        (FEATURES, "size", {"height": 12, "width": 12}, ["size={'height': 12, 'width': 12} should be a size such as"]),
        (FEATURES, "size", {"shortest_edge": 0}, ["should be a size such as 224 or {'shortest_edge': 224}"]),
        (FEATURES, "size", {"shortest_edge": [12]}, ["should be a size such as 224"]),
        (FEATURES, "size", 0, ["size=0 is invalid; use a value such as 224"]),
        (FEATURES, "resample", 2, ["resample=2 is not supported; supported values: 3"]),
        (FEATURES, "do_center_crop", False, ["do_center_crop=False is not supported"]),
        (FEATURES, "image_std", [0.3, 0.3], ["image_std", "is invalid"]),
        (FEATURES, "image_std", [0.3, 0.3, 0], ["image_std", "is invalid"]),
        (
            "safety_checker/config.json",
            "projection_dim",
            "8",
            ["projection_dim='8' is invalid; use a value such as 512"],
        ),
        ("safety_checker/config.json", "projection_dim", 9, ["misshapen  concept_embeds: (17, 8), expected (17, 9)"]),
        ("safety_checker/config.json", "vision_config", [1], ["vision_config=[1] should be a JSON object"]),
        ("safety_checker/config.json", "vision_config", VISION | {"num_channels": 1}, ["supported values: 3"]),
        ("safety_checker/config.json", "vision_config", VISION | {"num_attention_heads": 3}, ["not a multiple of"]),
        ("safety_checker/config.json", "vision_config", VISION | {"hidden_act": "tanh"}, ["supported values: silu"]),
        ("safety_checker/config.json", "vision_config", VISION | {"image_size": 16}, ["takes 16 x 16"]),
        ("safety_checker/config.json", "vision_config_dict", {}, ["takes 224 x 224"]),
        ("model_index.json", "safety_checker", ["x", "Q16SafetyChecker"], ["it is Q16SafetyChecker", "load without"]),
    ],
)
def test_unsupported_configs(read, copy, name, option, value, words):
    tiny.write_json(copy / name, json.loads((copy / name).read_text()) | {option: value})
    refused(read, copy, *words)


def test_names_of_published_files(read, copy, checked_folder):
    """Published files repeat `vision_model` in their tensor names, and include an integer buffer."""
    tensors = load_file(copy / WEIGHTS)
    renamed = {name.replace("vision_model.", "vision_model.vision_model."): t for name, t in tensors.items()}
    renamed["vision_model.vision_model.embeddings.position_ids"] = np.arange(5)[None]
    save_file(renamed, copy / WEIGHTS, {"format": "pt"})
    ours, same = (jax.tree.leaves(read(source).safety.checker) for source in (copy, checked_folder))
    assert len(ours) == len(tensors)
    assert all(map(np.array_equal, ours, same))


# The shell command


def test_the_shell_reports_unsafe_pictures(checked_folder, tmp_path, monkeypatch):
    def made(pipe, batch):
        flagged = None if pipe.safety is None else np.array([False, True])
        return Output([Image.new("RGB", (16, 16))] * 2, np.ones(2, bool), [0, 0], flagged=flagged)

    def run(*words):
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 0, result.output
        return result.stdout

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "run", made)
    words = ["edit", "--model", checked_folder, "--prompt", "cat", "--edit", "hat", "--out", tmp_path]
    assert "Flagged by the safety checker: edited\n" in run(*words)
    assert "lagged" not in run(*words, "--no-safety-checker")
    for name, option in (("0001", False), ("0002", True)):
        *_, command = run("info", tmp_path / f"{name}-edited.png").splitlines()
        assert ("--no-safety-checker" in command) == option
        assert "--safety-checker" not in command
    assert [one["flagged"] for one in json.loads(run(*words, "--json"))["pictures"]] == [False, True]


def test_recorded_results(recorded_pipe):
    """Pixels agree to within one level. For the recorded pixels, cosines agree to within 1e-5, and flags are equal."""
    safety, wanted = recorded_pipe("sd1_checked").safety, recorded("safety")
    pixels = np.concatenate([safety.feature_extractor(images) for images in cases.SHOWN])
    assert same_pixels(pixels, wanted["pixels"])
    pixels = wanted["pixels"]
    special, concepts, flagged = jax.jit(lambda net: (*net.cosines(pixels), check(net, pixels)))(safety.checker)
    assert relative(special, wanted["special"]) < 1e-5
    assert relative(concepts, wanted["concepts"]) < 1e-5
    assert np.array_equal(flagged, wanted["flagged"])
    assert set(wanted["flagged"]) == {True, False}
