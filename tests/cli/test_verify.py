"""Tests `sega-jax verify` with a small checkpoint (instead of Stable Diffusion 1.5) and with a picture recorded from
that checkpoint."""

import math
import shutil
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from support import flax_files
from support.checkpoints import edit_tensors
from support.cuda_noise import normal
from support.hub import COMMIT, NAME, Stub

from sega_jax import Pipeline, SemanticStableDiffusionPipeline
from sega_jax.cli.main import main
from sega_jax.diffusers_api import published_pictures
from sega_jax.diffusers_api.published_pictures import SUMS, Picture
from sega_jax.text.files import sha256

pytestmark = pytest.mark.usefixtures("one_by_default")

CALL = {
    "prompt": "a cat",
    "editing_prompt": ["hat"],
    "edit_warmup_steps": 1,
    "edit_threshold": 0.5,
    "guidance_scale": 3,
    "num_inference_steps": 3,
}
RECORDED = (0.4054, 0.3563, 0.6495, 0.5726, 0.2377, 0.4057, 0.0246, 0.4309, 0.5310)
PUBLISHED = published_pictures.PICTURES
STAND_IN = Picture("a cat with a hat", 5, CALL, RECORDED)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Writes the noise that the picture starts from to a folder, and returns the folder."""
    folder = tmp_path_factory.mktemp("noise")
    np.save(folder / "5.npy", np.random.default_rng(5).standard_normal((1, 8, 8, 4), np.float32))
    (folder / SUMS).write_text(f"{'0' * 64}  9.npy\n{sha256(folder / '5.npy')}  5.npy\n")
    return folder


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch, tmp_path):
    monkeypatch.setattr(published_pictures, "PICTURES", (STAND_IN,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(main, ["verify", *map(str, words)])


def test_the_difference_depends_on_the_weights(least, noise):
    """The recorded weights reproduce the recorded picture; weights that are 5 % larger do not."""
    pipe = SemanticStableDiffusionPipeline.from_pipe(least)
    unet = jax.tree.map(lambda weights: 1.05 * weights, pipe.unet)
    other = SemanticStableDiffusionPipeline(**pipe.components | {"unet": unet})
    latents = published_pictures.noise(5, noise)
    assert published_pictures.difference(pipe, STAND_IN, latents) < 1e-3
    assert published_pictures.difference(other, STAND_IN, latents) > 2 * published_pictures.TOLERANCE


@pytest.mark.slow
def test_an_equal_picture_passes(least_folder, noise):
    result = run(least_folder, "--noise", noise, "--devices", 1)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines() if " " in line.strip())
    assert lines["devices"] == f"1 x {jax.devices()[0].device_kind} (cpu)"
    assert lines["dtype"].startswith("float32, ")
    assert lines["checkpoint"] == least_folder.name
    assert str(least_folder) not in result.output
    for name in ("sega_jax", "jax", "jaxlib", "Python"):
        assert f"{name} " in lines["versions"]
    stem = "diffusion_pytorch_model"
    for part, file in (("text_encoder", "model"), ("unet", stem), ("vae", stem)):
        path = f"{part}/{file}.safetensors"
        assert lines[f"{path}:"] == f"sha256 {sha256(least_folder / path)}"
    assert result.output.splitlines()[-1] == "PASSED: equal to the 1 pictures that diffusers published"


@pytest.mark.slow
def test_a_different_picture_fails(least_folder, noise, tmp_path):
    folder = shutil.copytree(least_folder, tmp_path / "copy")

    def change(arrays):
        arrays["conv_out.bias"] += 0.05

    edit_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", change)
    result = run(folder, "--noise", noise)
    assert result.exit_code == 1
    assert "a cat with a hat" in result.output.splitlines()[-1]
    assert result.output.splitlines()[-1].startswith("FAILED: ")
    looser = run(folder, "--noise", noise, "--tolerance", 0.9)
    assert looser.exit_code == 0, looser.output


def test_a_nan_difference_fails(least_folder, noise, monkeypatch):
    monkeypatch.setattr(published_pictures, "difference", lambda *_: math.nan)
    result = run(least_folder, "--noise", noise, "--dtype", "bfloat16", "--devices", 1)
    assert result.exit_code == 1
    assert "nan  different" in result.output
    assert result.output.splitlines()[-1].endswith("run the command with --dtype float32")


def test_the_report_names_the_commit_on_the_hub(least_folder, noise, tmp_path, monkeypatch):
    client = Stub(flax_files.checkpoint(least_folder, tmp_path / "hub"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    monkeypatch.setattr(published_pictures, "difference", lambda *_: 0.0)
    result = run(NAME, "--noise", noise, "--revision", "flax")
    assert result.exit_code == 0, result.output
    assert f"checkpoint  {NAME}, commit {COMMIT}" in result.output
    assert "sha256" not in result.output


def test_missing_or_damaged_noise_is_reported_before_loading(least_folder, noise, tmp_path):
    result = run(least_folder / "missing", "--noise", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / '5.npy'} or {tmp_path / SUMS} is missing; record the noise with python" in result.output
    folder = shutil.copytree(noise, tmp_path / "copy")
    np.save(folder / "5.npy", np.load(folder / "5.npy") + 1)
    result = run(least_folder / "missing", "--noise", folder)
    assert result.exit_code == 1
    assert "5.npy is not in SHA256SUMS" in result.output


def test_other_families_and_unsuitable_options_are_refused(least_xl_folder, least_folder, noise):
    result = run(least_xl_folder, "--noise", noise)
    assert result.exit_code == 1
    assert "is Stable Diffusion XL, expected Stable Diffusion 1.x or 2.x" in result.output
    result = run(least_folder, "--noise", noise, "--scheduler", "DDIMScheduler")
    assert result.exit_code == 2
    assert "--scheduler" in result.output


def test_matrices_are_multiplied_in_float32():
    """By default, GPUs and TPUs round the factors of matrix products."""
    seen = []

    def pipe(**call):
        seen.append(jax.config.jax_default_matmul_precision)
        return np.full((1, 8, 8, 3), 0.25), None

    picture = STAND_IN._replace(blue=(0.25,) * 8 + (0.3,))
    with jax.default_matmul_precision("bfloat16"):
        assert published_pictures.difference(pipe, picture, None) == pytest.approx(0.05)
    assert seen == ["float32"]


def test_the_difference_compares_the_last_blue_values():
    image = np.zeros((1, 8, 8, 3))
    image[0, -3:, -3:, 2] = np.arange(9).reshape(3, 3) / 10
    picture = STAND_IN._replace(blue=tuple(i / 10 for i in range(9)))
    pipe = SimpleNamespace(call=lambda **call: (image, None))
    assert published_pictures.difference(pipe.call, picture, None) == 0


def test_checkpoints_of_another_size_are_refused(least_folder, noise, tmp_path):
    folder = shutil.copytree(noise, tmp_path / "copy")
    np.save(folder / "5.npy", np.zeros((1, 64, 64, 4), np.float32))
    (folder / SUMS).write_text(f"{sha256(folder / '5.npy')}  5.npy\n")
    result = run(least_folder, "--noise", folder)
    assert result.exit_code == 1
    assert "makes latents of shape (8, 8, 4), expected (64, 64, 4): the published pictures are from" in result.output
    assert "sha256" not in result.output


def test_the_recorded_noise_is_the_default(least_folder, monkeypatch):
    """The recorded noise equals noise computed by NumPy, up to the precision of sines on a GPU."""
    seen = []
    monkeypatch.setattr(published_pictures, "PICTURES", PUBLISHED)
    monkeypatch.setattr(published_pictures, "difference", lambda pipe, picture, latents: seen.append(latents) or 0.0)
    monkeypatch.setattr(Pipeline, "latent_shape", lambda *_: (64, 64, 4))
    result = run(least_folder)
    assert result.exit_code == 0, result.output
    assert [picture.seed for picture in PUBLISHED] == [3, 9, 48]
    for picture, latents in zip(PUBLISHED, seen, strict=True):
        assert latents.dtype == np.float32
        computed = np.moveaxis(normal(picture.seed, (1, 4, 64, 64)), 1, -1)
        np.testing.assert_allclose(latents, computed, rtol=0, atol=3e-6)
