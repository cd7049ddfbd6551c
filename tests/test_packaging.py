"""Tests the built packages and their dependencies, and the sizes of the published networks."""

import importlib.metadata
import math
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.published import BYT5_XL, IF_1_XL, IF_2_L, SD_1, SD_2, T5_XXL, VIT_H, X4, X4_VAE

import sega_jax
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems.stable_diffusion import Models
from sega_jax.weights.layout import leaves

ROOT = Path(sega_jax.__file__).parents[1]
MOST_BYTES = 60_000_000
# Files that no package may contain: caches, builds, editors' backup copies, and output of the library and its tests.
CACHES = r"__pycache__|\.py[co]$|\.(pytest|ruff|mypy)_cache|\.egg-info"
JUNK = re.compile(rf"{CACHES}|(^|/)(build|dist|sega-jax-out)/|~$|\.log$")


def test_the_package_depends_on_no_torch():
    dependencies, waiting = set(), ["sega_jax"]
    while waiting:
        name = waiting.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            needed = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and needed not in dependencies:
                dependencies.add(needed)
                waiting.append(needed)
    assert {"jax", "flax", "optax", "safetensors", "numpy"} <= dependencies
    assert not {"torch", "diffusers", "accelerate"} & dependencies


def parameters(module):
    return sum(map(math.prod, leaves(module).values()))


@pytest.mark.parametrize(
    ("configs", "totals"),
    [
        (SD_1, Models(text_encoder=123_060_480, unet=859_520_964, vae=83_653_863)),
        (SD_2, Models(text_encoder=340_387_840, unet=865_910_724, vae=83_653_863)),
    ],
    ids=["Stable Diffusion 1.5", "Stable Diffusion 2.1"],
)
def test_parameters_of_the_published_networks(configs, totals):
    assert Models(*map(parameters, Models.build(**configs))) == totals


@pytest.mark.parametrize(
    ("config", "total"), [(T5_XXL, 4_762_310_656), (BYT5_XL, 2_614_091_264)], ids=["T5 v1.1 XXL", "ByT5 XL"]
)
def test_parameters_of_the_published_text_encoders(config, total):
    assert parameters(T5EncoderModel(T5Config.from_dict(config))) == total


def test_parameters_of_openclips_text_encoder():
    assert parameters(CLIPTextModelWithProjection(CLIPTextConfig.from_dict(VIT_H))) == 354_032_640


@pytest.mark.parametrize(
    ("config", "total", "tensors"),
    [(IF_1_XL, 4_304_695_110, 775), (IF_2_L, 1_243_277_190, 939), (X4, 473_398_020, 687)],
    ids=["IF-I-XL", "IF-II-L", "x4 upscaler"],
)
def test_parameters_of_the_published_unets(config, total, tensors):
    unet = UNet2DConditionModel(UNetConfig.from_dict(config))
    assert (parameters(unet), len(leaves(unet))) == (total, tensors)


def test_parameters_of_the_upscalers_autoencoder():
    assert parameters(AutoencoderKL(AutoencoderConfig.from_dict(X4_VAE))) == 55_325_927


def run(*command, **options):
    """Runs a command and returns its output. PYTHONPATH is removed, so the checkout is not imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= options.pop("env", {})
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wheel_files(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Builds the sdist, the wheel from the sdist, and the wheel from the checkout, and returns their paths."""
    folder = tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "build", "--outdir", folder / "both", ROOT)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "wheel", ROOT)
    [sdist], [wheel] = (list((folder / "both").glob(name)) for name in ("*.tar.gz", "*.whl"))
    return sdist, wheel, next((folder / "wheel").glob("*.whl"))


@pytest.mark.slow
def test_packages_contain_what_belongs_to_them(packages):
    """The sdist contains the checkout's files. The wheel contains the files of both packages except the evaluation
    report."""
    sdist, wheel, from_checkout = packages
    assert max(sdist.stat().st_size, wheel.stat().st_size) <= MOST_BYTES
    with tarfile.open(sdist) as file:
        source = {name.partition("/")[2] for name in file.getnames()}
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    assert source == {*listed, "PKG-INFO"}
    files = wheel_files(wheel)
    assert [name for name in (*source, *files) if JUNK.search(name)] == []
    metadata = {name for name in files if ".dist-info/" in name}
    ours = {name for name in listed if name.startswith(("convert/", "sega_jax/"))}
    assert files.keys() - metadata == {name for name in ours if not name.startswith("sega_jax/demo/evaluation/")}
    licenses = {name.partition(".dist-info/licenses/")[2] for name in metadata} - {""}
    assert licenses == {"LICENSE", "sega_jax/demo/LICENSE.md"}
    assert files == wheel_files(from_checkout)


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(packages, tmp_path):
    """The environment is outside the checkout and has only the dependencies that the wheel declares."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    # Without --no-compile, pip would compile all modules of all dependencies, most of which the test never imports.
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", packages[1])
    settings = {"cwd": tmp_path, "env": {"XDG_CACHE_HOME": str(tmp_path / "cache")}}
    version = f"from importlib.metadata import version; print(version('{sega_jax.__name__}'))"
    assert run(programs / "python", "-c", version, **settings).split() == [sega_jax.__version__]
    assert sega_jax.__version__ in run(programs / "sega-jax", "--version", **settings)
    assert "diffusers" in run(programs / "sega-jax-convert", "--help", **settings)
    run(programs / "python", "-c", "import convert; assert 'venv' in convert.__file__", **settings)
    words = ["--prompt", "a portrait of a woman", "--edit", "glasses", "--steps", 2, "--out", tmp_path / "pictures"]
    run(programs / "sega-jax", "edit", *words, **settings)
    assert (tmp_path / "pictures" / "0001-edited.png").is_file()
