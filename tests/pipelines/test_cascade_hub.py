"""DeepFloyd-IF's cascade from the hub: which files of published repositories are fetched, and when."""

import json
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file
from support import tiny
from support.hub import Stub, fetched

import convert
from sega_jax import CheckpointError, SemanticIFPipeline, load, load_cascade
from sega_jax.cli.main import main
from sega_jax.text.files import read_json

pytestmark = pytest.mark.usefixtures("one_by_default")

GUIDE = Path(__file__).parents[2] / "notebooks" / "deepfloyd_and_paella.ipynb"
ONE, TWO, X4 = "DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0", "stabilityai/stable-diffusion-x4-upscaler"
NAMES = {"stage1": ONE, "stage2": TWO, "upscaler": X4}
INDEX = {"model_index.json"}
SCHEDULERS = {"scheduler/scheduler_config.json"}
UNET = {"unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"}
SHARDS = {f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)}
T5 = {f"text_encoder/{name}" for name in ("config.json", "model.safetensors.index.fp16.json", *SHARDS)}
SPIECE = {f"tokenizer/{name}" for name in ("spiece.model", "special_tokens_map.json", "tokenizer_config.json")}
CLIP = {f"tokenizer/{name}.json" for name in ("vocab", "special_tokens_map", "tokenizer_config")}
CLIP |= {"tokenizer/merges.txt", "text_encoder/config.json", "text_encoder/model.fp16.safetensors"}
NEEDED = {
    ONE: INDEX | SCHEDULERS | UNET | T5 | SPIECE,
    TWO: INDEX | SCHEDULERS | UNET | {"image_noising_scheduler/scheduler_config.json"},
    X4: INDEX | SCHEDULERS | UNET | CLIP | {"low_res_scheduler/scheduler_config.json"}
    | {"vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"},
}  # fmt: skip


def never(*paths):
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"never read")


def published(folder):
    """Adds half-precision weights, and files that are never read: full-precision weights, pickles, and other
    libraries' files."""
    for path in [*folder.rglob("*.safetensors")]:
        half = {name: array.astype(np.float16) for name, array in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        never(path, path.with_suffix(".bin"), path.with_suffix(".fp16.bin"))
    never(*(folder / name for name in ("README.md", ".gitattributes", "all.ckpt", "all.safetensors")))
    return folder


def stage(folder, unet):
    published(tiny.stage(folder, unet, text=tiny.T5 | {"vocab_size": 160}, safety=True))
    text = folder / "text_encoder"
    index, _ = tiny.shard(text / "model.fp16.safetensors")
    index.rename(text / "model.safetensors.index.fp16.json")
    others = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others += ["pytorch_model.fp16-00001-of-00002.bin", "pytorch_model.bin.index.fp16.json"]
    never(*(text / name for name in others))
    tiny.spiece(folder / "tokenizer", 100)
    for part, stem in (("safety_checker", "model"), ("watermarker", "diffusion_pytorch_model")):
        never(*(folder / part / name for name in ("config.json", f"{stem}.safetensors", f"{stem}.fp16.safetensors")))
    never(folder / "feature_extractor" / "preprocessor_config.json")
    index = read_json(folder / "model_index.json") | {"watermarker": ["deepfloyd_if", "IFWatermarker"]}
    features = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    tiny.write_json(folder / "model_index.json", index | features)
    return folder


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    pytest.importorskip("google.protobuf")
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("hub")
    made = {ONE: stage(folder / "1", tiny.STAGE_1), TWO: stage(folder / "2", tiny.STAGE_2)}
    return made | {X4: published(tiny.upscaler(folder / "x4"))}


class Hub(dict):
    """A stand-in for `snapshot_download` with several repositories, each with its own commit."""

    def __call__(self, repo_id, **options):
        return self[repo_id](repo_id, **options)

    @property
    def fetched(self):
        return {name: fetched(stub) for name, stub in self.items()}


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    stubs = {
        name: Stub(folder, tmp_path / "cache" / folder.name, str(i) * 40)
        for i, (name, folder) in enumerate(repositories.items(), 1)
    }
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made := Hub(stubs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    return made


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.mark.slow
def test_the_command_of_the_guide(hub, tmp_path):
    """The command runs as printed, except for the number of steps."""
    lines = [line.strip() for cell in json.loads(GUIDE.read_text())["cells"] for line in cell["source"]]
    (command,) = (line for line in lines if line.startswith(f"sega-jax edit --model {ONE}"))
    few = ["--steps", "smart27", "--stage2-steps", 2, "--upscaler-steps", 2]
    result = run(*shlex.split(command)[1:], *few, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert hub.fetched == NEEDED
    assert f"{ONE}: DDPMScheduler, float32" in result.output
    pictures = [np.asarray(Image.open(tmp_path / "out" / f"0001-{name}.png")) for name in ("original", "edited")]
    assert pictures[0].shape == (128, 128, 3)
    assert not np.array_equal(*pictures)
    said = run("info", tmp_path / "out" / "0001-edited.png").output.splitlines()[-1]
    for option, revision, name in (
        ("--model", "--revision", ONE),
        ("--stage2", "--stage2-revision", TWO),
        ("--upscaler", "--upscaler-revision", X4),
    ):
        assert f" {option} {name} " in said
        assert f" {revision} {hub[name].commit} " in said


def test_revisions(hub):
    revisions = {"stage1": "a", "upscaler": "b"}
    load_cascade(**NAMES, revisions=revisions, variant="fp16", low_memory=True, safety_checker=False)
    asked = {name: [call[1] for call in stub.calls] for name, stub in hub.items()}
    assert asked == {ONE: ["a", "1" * 40], TWO: [None, "2" * 40], X4: ["b", "3" * 40]}
    assert hub.fetched == NEEDED


@pytest.mark.parametrize("checked", [False, True])
def test_the_safety_checker_of_the_upscaler(hub, repositories, tmp_path, checked):
    other = shutil.copytree(repositories[X4], tmp_path / "x4")
    index = read_json(other / "model_index.json")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    tiny.write_json(other / "model_index.json", index)
    files = {"safety_checker/config.json", "safety_checker/model.fp16.safetensors"}
    files |= {"feature_extractor/preprocessor_config.json"}
    never(*(other / name for name in files))
    hub[X4].folder = other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_cascade(**NAMES, variant="fp16", low_memory=True, safety_checker=checked)
    assert fetched(hub[X4]) == NEEDED[X4] | (files if checked else set())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"stage1": TWO}, "stage1=.* is DeepFloyd-IF's second stage, expected DeepFloyd-IF's first stage"),
        ({"stage2": X4}, "stage2=.* is Stable Diffusion's x4 upscaler, expected DeepFloyd-IF's second"),
        ({"upscaler": ONE}, "upscaler=.* is DeepFloyd-IF's first stage, expected Stable Diffusion's x4"),
    ],
)
def test_only_indices_of_wrong_stages_are_fetched(hub, names, words):
    with pytest.raises(CheckpointError, match=words):
        load_cascade(**NAMES | names)
    assert all(files <= INDEX for files in hub.fetched.values())
    model, *later = (NAMES | names).values()
    words = ["--model", model, "--stage2", later[0], "--upscaler", later[1], "--prompt", "cat", "--edit", "hat"]
    result = run("edit", *words)
    assert result.exit_code == 1
    assert all(files <= INDEX for files in hub.fetched.values())


def test_a_first_stage_without_text_encoder_is_rejected_by_its_index(hub, tmp_path):
    hub[ONE].folder = tiny.stage(tmp_path / "bare", text=None)
    with pytest.raises(CheckpointError, match=rf"{ONE} is DeepFloyd-IF's first stage without text_encoder"):
        load_cascade(**NAMES)
    assert hub.fetched == {ONE: INDEX, TWO: INDEX, X4: INDEX}


def test_networks_of_other_families_are_rejected_by_the_index(hub, small):
    with pytest.raises(ValueError, match="vae is given, but DeepFloyd-IF's first stage has no such network"):
        load(ONE, vae=small.models.vae)
    assert hub.fetched == {ONE: INDEX, TWO: set(), X4: set()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--upscaler", X4], "--upscaler is given without --stage2"),
        (["--stage2-noise-anew"], "--stage2-noise-anew is given without --stage2"),
        (["--upscaler-revision", "main"], "--upscaler-revision is given without --upscaler"),
        (["--edited", "stage1", "--edited", "stage2"], "--edited stage2 is given without --stage2"),
        (
            ["--stage2", TWO, "--stage2-steps", "smart5"],
            "--stage2-steps smart5 should be a whole number, or one of fast27",
        ),
        (["--stage2", TWO, "--stage2-noise-level", "-1"], "--stage2-noise-level -1 should be at least 0"),
        (["--steps", "many"], "--steps many should be a whole number, or one of fast27"),
        (["--scheduler", "Mine"], "--scheduler Mine is neither a folder nor a"),
        (["--stage2", TWO, "--stage2-scheduler", "Mine"], "--stage2-scheduler Mine is neither a folder nor a"),
        (["--clean-captions"], 'caption cleaning needs bs4; run pip install "sega_jax[if]", or turn cleaning off'),
    ],
    ids=str,
)
def test_invalid_commands_are_rejected_before_files_are_fetched(hub, monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "bs4", None)
    result = run("edit", "--model", ONE, "--prompt", "cat", "--edit", "hat", *options)
    assert result.exit_code
    assert words in result.output
    assert not any(hub.fetched.values())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "int8"}, ValueError, "dtype='int8' should be one of"),
        ({"attention": "flash"}, ValueError, "attention='flash' should be"),
        ({"stage2": None}, ValueError, "upscaler is given without stage2"),
        (
            {"revisions": {"stage3": "main"}},
            ValueError,
            "revisions has stage3; the stages are stage1, stage2, upscaler",
        ),
        ({"schedulers": {"stage2": "Mine"}}, ValueError, "scheduler='Mine' is neither a folder"),
        ({"schedulers": {"stage2": 3}}, TypeError, "scheduler=3 should be a class name"),
        ({"safety_checker": "no"}, TypeError, "safety_checker='no' should be True"),
    ],
)
def test_invalid_options_are_rejected_before_files_are_fetched(hub, options, error, words):
    with pytest.raises(error, match=words):
        load_cascade(**NAMES | options)
    assert not any(hub.fetched.values())


def test_missing_caption_cleaning_is_reported_before_files_are_fetched(hub, first, monkeypatch):
    monkeypatch.setitem(sys.modules, "bs4", None)
    words = r'pip install "sega_jax\[if\]", or turn cleaning off'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=words):
            SemanticIFPipeline.from_pretrained(ONE)
    assert not any(hub.fetched.values())
    with pytest.raises(ImportError, match=words):
        SemanticIFPipeline.from_pipe(first)("a cat")


def test_the_index_of_a_conversion_lists_its_folders(hub, tmp_path):
    with pytest.warns(UserWarning, match="has no feature_extractor, safety_checker, watermarker"):
        made = convert.convert(TWO, tmp_path / "made", to="diffusers", variant="fp16")
    index = read_json(made / "model_index.json")
    assert not index["requires_safety_checker"]
    named = {part for part, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    assert named == {path.name for path in made.iterdir() if path.is_dir()}
    assert read_json(hub[TWO].folder / "model_index.json").keys() == index.keys()
