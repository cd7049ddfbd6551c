"""`sega-jax edit` for every family: LoRAs, learned words, sizes and devices have the same effect as in Python."""

import functools
import shlex

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from support import loras, sdxl_files, tiny

from sega_jax import Edit, load, load_cascade
from sega_jax.cli.main import main

T5_LAYER, UNET_LAYER = "encoder.block.0.layer.0.SelfAttention.q", "time_embedding.linear_1"
EDIT = Edit("hat", warmup=0)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _three_devices(monkeypatch, tmp_path):
    """Provides three devices to the shell, and gives each test its own compilation cache."""
    three = jax.devices()[:3]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: three)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(first, second, upscaler, least_xl, tmp_path_factory):
    """Writes textual inversions and LoRAs for all families, and returns the folder that contains them."""
    where = tmp_path_factory.mktemp("files")
    both = {"unet": [UNET_LAYER], "text_encoder": [T5_LAYER]}
    loras.write(where / "1.safetensors", first.models, both)
    loras.write(where / "2.safetensors", second.models, {"unet": [UNET_LAYER]}, 1)
    loras.write(where / "x4.safetensors", upscaler.models, {"unet": [UNET_LAYER]}, 2)
    loras.write(where / "xl.safetensors", least_xl.models, {"unet": [UNET_LAYER]}, 3)
    save_file({"<toy>": RNG.standard_normal((2, 16)).astype(np.float32)}, where / "toy.safetensors")
    vectors = {"clip_l": (2, 16), "clip_g": (2, 20)}
    both_encoders = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in vectors.items()}
    save_file(both_encoders, where / "toy_xl.safetensors")
    return where


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def edit(out, model, *words, prompt="a <toy>"):
    settings = ["--prompt", prompt, "--edit", "hat:warmup=0", "--seed", 7, "--out", out]
    result = run("edit", "--model", model, *settings, *words)
    assert result.exit_code == 0, result.output
    return result


def pictures(out):
    return [np.asarray(Image.open(out / f"0001-{name}.png")) for name in ("original", "edited")]


def command(out):
    """Returns the command that reproduces the picture, split into words."""
    result = run("info", out / "0001-edited.png")
    assert result.exit_code == 0, result.output
    return shlex.split(result.output.splitlines()[-1])[1:]


def pairs(*prompt, **options):
    return {"prompt": list(prompt) * 2, "edits": [[], [EDIT]], "seed": [7, 7], "output": "uint8"} | options


def has(words, *part):
    """Returns whether the words of `part` occur consecutively in a list of words."""
    return any(tuple(words[i : i + len(part)]) == tuple(map(str, part)) for i in range(len(words)))


SIZES = {"height": 16, "width": 8, "original_size": (32, 16), "crops_top_left": (2, 4), "target_size": (24, 8)}


@pytest.mark.slow
def test_stable_diffusion_xl(files, least_xl_folder, tmp_path):
    """Runs on two of the three devices. `info` omits the devices, because they are specific to one machine."""
    words = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", shown(value))]
    given = [
        "--lora",
        f"{files / 'xl.safetensors'}:0.5",
        "--textual-inversion",
        f"<toy>={files / 'toy_xl.safetensors'}",
    ]
    result = edit(tmp_path / "out", least_xl_folder, *words, *given, "--steps", 2, "--devices", "0,2")
    assert "float32 on 2 x cpu" in result.output
    pipe = load(
        least_xl_folder,
        lora={files / "xl.safetensors": 0.5},
        textual_inversion={"<toy>": files / "toy_xl.safetensors"},
        devices=[jax.devices()[0], jax.devices()[2]],
    )
    np.testing.assert_array_equal(pictures(tmp_path / "out"), pipe(**pairs("a <toy>", steps=2, **SIZES)).images)
    again = command(tmp_path / "out")
    for given_word, option in zip(words[1::2], words[::2], strict=True):
        assert has(again, option, given_word)
    assert has(again, *given[:2])
    assert has(again, *given[2:])
    assert "--devices" not in again


def shown(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.slow
def test_a_single_file_of_stable_diffusion_xl(tmp_path):
    """Configs and tokenizers come from a folder. The command that `info` prints reproduces the picture."""
    config = tiny.xl(tmp_path / "xl", unet=sdxl_files.UNET, vae=tiny.VAE_1)
    source = tmp_path / "xl.safetensors"
    save_file(tiny.original(unet=sdxl_files.UNET, vae=tiny.VAE_1, text_2=tiny.TEXT_XL_2), source)
    words = ["--config", config, "--steps", 2, "--devices", 1, "--original-size", "32,16"]
    edit(tmp_path / "out", source, *words, prompt="cat")
    pipe = load(source, config=config, devices=jax.devices()[:1])
    expected = pipe(**pairs("cat", steps=2, original_size=(32, 16))).images
    np.testing.assert_array_equal(pictures(tmp_path / "out"), expected)
    again = command(tmp_path / "out")
    assert run(*again, "--out", tmp_path / "again", "--devices", 1).exit_code == 0
    np.testing.assert_array_equal(pictures(tmp_path / "again"), expected)


def cascade_words(stages, files):
    words = ["--stage2", stages["stage2"], "--upscaler", stages["upscaler"], "--low-memory", "--devices", 2]
    words += ["--steps", 2, "--stage2-steps", 2, "--upscaler-steps", 2, "--height", 4, "--width", 6]
    words += ["--lora", f"{files / '1.safetensors'}:0.5", "--stage2-lora", f"{files / '2.safetensors'}:-0.5"]
    return [
        *words,
        "--upscaler-lora",
        files / "x4.safetensors",
        "--upscaler-textual-inversion",
        files / "toy.safetensors",
    ]


@pytest.mark.slow
def test_the_cascade(stages, files, tmp_path):
    """The first stage's size determines the sizes of later stages."""
    words = cascade_words(stages, files)
    edit(tmp_path / "out", stages["stage1"], *words)
    cascade = load_cascade(
        **stages,
        loras={
            "stage1": {files / "1.safetensors": 0.5},
            "stage2": {files / "2.safetensors": -0.5},
            "upscaler": files / "x4.safetensors",
        },
        textual_inversions={"upscaler": files / "toy.safetensors"},
        devices=jax.devices()[:2],
    )
    steps = {"stage1": {"steps": 2, "height": 4, "width": 6}, "stage2": {"steps": 2}, "upscaler": {"steps": 2}}
    expected = cascade(**pairs("a <toy>", **steps)).images
    assert expected.shape == (2, 64, 96, 3)
    np.testing.assert_array_equal(pictures(tmp_path / "out"), expected)
    again = run(*command(tmp_path / "out"), "--devices", 2, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pictures(tmp_path / "again"), expected)


@pytest.mark.slow
def test_the_first_stage_alone(stages, files, tmp_path):
    """The first stage runs without the later stages, with a LoRA and a given size."""
    words = ["--lora", files / "1.safetensors", "--steps", 2, "--height", 4, "--width", 6, "--devices", 1]
    edit(tmp_path / "out", stages["stage1"], *words, prompt="a cat")
    devices = jax.devices()[:1]
    pipe = load(stages["stage1"], lora=files / "1.safetensors", devices=devices)
    expected = pipe(**pairs("a cat", steps=2, height=4, width=6)).images
    np.testing.assert_array_equal(pictures(tmp_path / "out"), expected)
    assert has(command(tmp_path / "out"), "--lora", f"{files / '1.safetensors'}:1.0")


@pytest.mark.slow
def test_paella(tmp_path, paella_folder):
    edit(tmp_path / "out", paella_folder, "--height", 32, "--width", 16, "--steps", 2, "--devices", "1,", prompt="cat")
    pipe = load(paella_folder, devices=jax.devices()[1:2])
    expected = pipe(**pairs("cat", steps=2, height=32, width=16)).images
    np.testing.assert_array_equal(pictures(tmp_path / "out"), expected)


@pytest.mark.slow
def test_the_upscaler_without_a_cascade(stages, files, tmp_path):
    """The small picture determines the size. The command that `info` prints enlarges the same picture again."""
    image = tmp_path / "small.png"
    Image.fromarray(RNG.integers(0, 256, (8, 4, 3), np.uint8)).save(image)
    words = ["--image", image, "--steps", 2, "--noise-level", 30, "--lora", files / "x4.safetensors", "--devices", 1]
    edit(tmp_path / "out", stages["upscaler"], *words, prompt="cat")
    pipe = load(stages["upscaler"], lora=files / "x4.safetensors", devices=jax.devices()[:1])
    expected = pipe(**pairs("cat", steps=2, image=image, noise_level=30)).images
    assert expected.shape == (2, 32, 16, 3)
    np.testing.assert_array_equal(pictures(tmp_path / "out"), expected)
    again = command(tmp_path / "out")
    assert has(again, "--image", image)
    assert has(again, "--height", 32, "--width", 16)
    assert run(*again, "--out", tmp_path / "again", "--devices", 1).exit_code == 0
    np.testing.assert_array_equal(pictures(tmp_path / "again"), expected)


FAMILIES = {
    "xl": [],
    "paella": ["--height", 32, "--width", 16],
    "upscaler": ["--image", "small.png"],
    "stage1": ["--stage2", "{stage2}", "--stage2-steps", 2, "--low-memory", "--edited", "stage1", "--edited", "stage2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_several_seeds(stages, paella_folder, least_xl_folder, tmp_path, monkeypatch, name):
    """Three devices make pictures from four seeds in two groups; with --low-memory, in one group."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).save("small.png")
    model = {**stages, "xl": least_xl_folder, "paella": paella_folder}[name]
    words = ["--model", model, "--prompt", "a cat", "--edit", "hat:warmup=0", "--steps", 2]
    words += [str(word).format(**stages) for word in FAMILIES[name]]
    for out, seed in (("several", "1-4"), ("one", "3")):
        result = run("edit", *words, "--seed", seed, "--out", out)
        assert result.exit_code == 0, result.output
    for kind in ("original", "edited"):
        first, again = (Image.open(f"{path}-{kind}.png") for path in ("several/0001-seed3", "one/0001"))
        assert abs(np.asarray(first).astype(int) - np.asarray(again)).max() <= 1
    assert len(list((tmp_path / "several").iterdir())) == 4 * 2 + 1


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("paella", ["--lora", "x4.safetensors"], "--lora is given, but Paella does not support LoRA"),
        ("paella", ["--textual-inversion", "toy.safetensors"], "Paella does not support textual inversion; leave"),
        ("paella", ["--config", "."], "applies only to single files"),
        ("paella", ["--original-size", "8,8"], "--original-size applies to Stable Diffusion XL, but"),
        ("stage1", ["--textual-inversion", "toy.safetensors"], "It is supported by Stable Diffusion 1.x or 2.x"),
        ("stage1", ["--stage2-lora", "2.safetensors"], "--stage2-lora is given without --stage2"),
        ("stage1", ["--upscaler-textual-inversion", "toy.safetensors"], "is given without --upscaler"),
        (
            "stage1",
            ["--stage2", "{stage2}", "--stage2-lora", "no.safetensors"],
            "no.safetensors is not a file; correct the path",
        ),
        ("stage1", ["--stage2", "{stage2}", "--stage2-lora", "2.safetensors:x"], "'x' should be a finite number like"),
        ("stage1", ["--stage2-textual-inversion", "toy.safetensors"], "No such option '--stage2-textual-inversion'"),
        ("least", ["--stage2", "{stage2}", "--stage2-lora", "2.safetensors"], "--stage2 applies only to DeepFloyd"),
        ("least", ["--devices", "4"], "--devices 4 should be from 1 to 3, the number of devices"),
        ("least", ["--devices", "0"], "--devices 0 should be from 1 to 3"),
        ("least", ["--devices", "0,3"], "--devices 0,3 should be device numbers from 0 to 2; this host has 3"),
        ("least", ["--devices", "1,1"], "--devices 1,1 lists a device twice"),
        ("least", ["--devices", "all"], "--devices all should be a number of devices, such as 2"),
    ],
)
def test_unsuitable_options_are_refused(
    stages, files, paella_folder, least_folder, tmp_path, monkeypatch, model, words, message
):
    monkeypatch.chdir(files)
    folders = {**stages, "paella": paella_folder, "least": least_folder}
    words = [word.format(**stages) for word in words]
    result = run(
        "edit", "--model", folders[model], "--prompt", "cat", "--edit", "hat", "--out", tmp_path / "out", *words
    )
    assert isinstance(result.exception, SystemExit)  # not a traceback
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())


def test_adapters_of_all_stages_reach_the_cascade(stages, files, tmp_path, monkeypatch):
    """Checks the arguments that `load_cascade` receives, without loading anything."""
    calls = []

    @functools.wraps(load_cascade)
    def load_nothing(*sources, **options):
        calls.append((sources, options))
        raise ValueError("enough")

    monkeypatch.setattr("sega_jax.cli.stages.load_cascade", load_nothing)
    words = cascade_words(stages, files)
    result = run("edit", "--model", stages["stage1"], "--prompt", "a", "--edit", "b", "--out", tmp_path, *words)
    assert "enough" in result.output
    ((sources, options),) = calls
    assert [str(one) for one in sources] == [str(stages["stage1"])]
    assert options["further"] == {name: str(stages[name]) for name in ("stage2", "upscaler")}
    paths = {name: str(files / f"{name}.safetensors") for name in ("1", "2", "x4", "toy")}
    assert options["loras"] == {
        "stage1": {paths["1"]: 0.5},
        "stage2": {paths["2"]: -0.5},
        "upscaler": {paths["x4"]: 1.0},
    }
    assert options["textual_inversions"] == {"upscaler": paths["toy"]}
    assert options["devices"] == jax.devices()[:2]
