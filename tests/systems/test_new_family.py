"""A new family and a new argument work everywhere without changes to the library."""

import dataclasses
import inspect
import json
import shlex
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file
from support import toy_family

from sega_jax import Edit, Integer, Pipeline, Real, argument, load, load_cascade, register, sweep
from sega_jax.cli.main import main
from sega_jax.method.arguments import REQUIRED, arguments
from sega_jax.pipelines import stored_settings
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.part_loading import load_text
from sega_jax.pipelines.pipeline import pipeline_class
from sega_jax.systems import deepfloyd, registry
from sega_jax.weights.single_file import Original, SingleFile


@pytest.fixture
def family():
    yield register(toy_family.SYSTEM)
    registry.unregister("toy")


@pytest.fixture
def folder(family, tmp_path, monkeypatch):
    """Writes a checkpoint of the toy family, and returns the checkpoint's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, folder = np.random.default_rng(0), tmp_path / "toy"
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False}
    files = {
        "model_index.json": {"_class_name": "Toy", "net": ["toy", "ToyNet"]},
        "net/config.json": {"size": 8},
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    tensors = {"mix.weight": rng.standard_normal((3, 7)), "mix.bias": rng.standard_normal(3)}
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(tensors, folder / "net" / "diffusion_pytorch_model.safetensors")
    return folder


CALL = {"output": "float", "progress": False}


def test_toy_family_loads_from_a_single_file(folder, tmp_path):
    original = Original("toy.", lambda net: {"mix.weight": "w", "mix.bias": "b"})
    file = SingleFile(
        name="the toy family",
        networks={"net": (original,)},
        recognise=lambda shapes: "toy.w" in shapes,
        refuse=lambda path, shapes: None,
        published=lambda path, shapes, prediction_type: folder,
    )
    checkpoint = toy_family.CHECKPOINT._replace(single_file=file)
    register(toy_family.SYSTEM._replace(checkpoint=checkpoint))
    weights = load_file(folder / "net" / "diffusion_pytorch_model.safetensors")
    save_file({"toy.w": weights["mix.weight"], "toy.b": weights["mix.bias"]}, tmp_path / "toy.safetensors")
    (folder / "tokenizer").mkdir()
    expected = load(folder)("a cat", **CALL).images
    np.testing.assert_array_equal(load(tmp_path / "toy.safetensors")("a cat", **CALL).images, expected)


def test_text_is_read_without_the_other_networks(folder):
    pipe = load(folder)
    text = load_text(folder)(["a cat", "a dog"])
    np.testing.assert_array_equal(text.letters, pipe.encode(["a cat", "a dog"]).letters)


def test_toy_family_loads_and_edits(folder):
    pipe = load(folder, devices=jax.local_devices()[:1])
    assert isinstance(pipe, Pipeline)
    assert type(pipe).__name__ == "ToyPipeline"
    plain = pipe("a cat", **CALL)
    edited = pipe("a cat", Edit("hat", warmup=0), **CALL)
    assert plain.images.shape == (1, 8, 8, 3)
    assert plain.finite.all()
    assert np.abs(edited.images - plain.images).max() > 1e-3
    # The family has its own defaults, and its own argument may have one value per row.
    assert (pipe("a cat", guidance_scale=3.0, steps=6, **CALL).images == plain.images).all()
    both = pipe("a cat", images_per_prompt=2, seed=[0, 0], wobble=[0.0, 0.5], **CALL).images
    np.testing.assert_allclose(both[0], plain.images[0], atol=1e-6)
    assert np.abs(both[1] - both[0]).max() > 1e-3
    with pytest.raises(ValueError, match=r"wobble=2\.0 should be a number in \[0, 1\]"):
        pipe("a cat", wobble=2.0)
    with pytest.raises(TypeError, match="wobbel is not an argument of a call of the toy family; did you mean wobble"):
        pipe("a cat", wobbel=0.5)


def test_toy_family_has_its_own_text_type(folder, tmp_path):
    pipe = load(folder, devices=jax.local_devices()[:1])
    text = pipe.encode(["a cat", "a dog"])
    assert repr(text) == "Letters(letters=float32[2, 4])"
    images = pipe(["a cat", "a dog"], **CALL).images
    assert (pipe(text, **CALL).images == images).all()
    mixed = pipe([text[0], "a dog"], Edit(text[1], warmup=0, scale=0.0), **CALL).images
    np.testing.assert_allclose(mixed, images, atol=1e-5)
    text.save(tmp_path / "text.safetensors")
    again = toy_family.Letters.load(tmp_path / "text.safetensors")
    np.testing.assert_array_equal(again.letters, text.letters)


def test_toy_call_as_a_pure_function(folder):
    pipe = load(folder, devices=jax.local_devices()[:1])
    call = {"prompt": "a cat", "edits": Edit("hat", warmup=0), "wobble": 0.5}
    function, arguments = pipe.as_function(**call)
    np.testing.assert_allclose(jax.jit(function)(**arguments), pipe(**call, **CALL).images, atol=1e-5)


def test_toy_family_supports_no_adapters(folder, tmp_path):
    """Adapters are rejected because the family declares none."""
    with pytest.raises(ValueError, match="lora is given, but the toy family does not support LoRA"):
        load(folder, lora="a.safetensors")
    (tmp_path / "a.bin").touch()
    words = ["--prompt", "a", "--edit", "b", "--textual-inversion", str(tmp_path / "a.bin"), "--out", str(tmp_path)]
    result = CliRunner().invoke(main, ["edit", "--model", str(folder), *words])
    assert result.exit_code == 1
    assert "--textual-inversion is given, but the toy family does not support textual inversion" in result.output


def test_toy_family_runs_on_two_devices(folder):
    edits, more = Edit("hat", warmup=0), {"images_per_prompt": 3, "wobble": 0.2}
    one, two = (load(folder, devices=jax.local_devices()[:count]) for count in (1, 2))
    np.testing.assert_allclose(two("a cat", edits, **more, **CALL).images, one("a cat", edits, **more, **CALL).images)


@pytest.mark.slow
def test_sweeps_share_prefixes_of_the_toy_family(folder, tmp_path):
    grid = {"wobble": [0.0, 0.5], "hat.scale": [2.0, 4.0, 8.0]}
    described = sweep.Sweep(
        model={"source": str(folder)}, call={"prompt": "a cat"}, edits={"hat": {"warmup": 4}}, grid=grid
    )
    facts = sweep.Facts.of(described)
    images = {}
    for share in (True, False):
        plan = sweep.plan(described, facts, 4, share=share)
        sweep.run(plan, tmp_path / str(share), progress=False)
        results = sweep.Results(tmp_path / str(share))
        images[share] = {
            (row["wobble"], row["hat.scale"]): np.asarray(results.picture(row), int) for row in results.rows
        }
    shared, apart = (sweep.plan(described, facts, 4, share=share).counts.evaluations for share in (True, False))
    assert shared < apart
    assert images[True].keys() == images[False].keys() == {(w, s) for w in grid["wobble"] for s in grid["hat.scale"]}
    for point, image in images[True].items():
        assert np.abs(image - images[False][point]).max() <= 1
    pipe = load(folder, devices=jax.local_devices()[:1])
    alone = pipe("a cat", Edit("hat", scale=8.0, warmup=4), wobble=0.5, output="uint8", progress=False).images[0]
    assert np.abs(images[True][0.5, 8.0] - alone).max() <= 1


def repeated(folder, tmp_path, words, name):
    """Runs the command `edit`, checks its help, repeats the command that `info` prints, and compares the pictures.

    Returns:
        The picture's settings, and the printed command.
    """
    run = CliRunner().invoke
    assert f"--{name}" in run(main, ["edit", "--help-all"]).output.partition("Only for the toy family:")[2]
    command = ["edit", "--model", str(folder), "--prompt", "a cat", "--edit", "hat:warmup=0", *words]
    result = run(main, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    picture = tmp_path / "out" / "0001-edited.png"
    info = run(main, ["info", str(picture)]).output
    again = run(main, [*shlex.split(info.splitlines()[-1])[1:], "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    images = [np.asarray(Image.open(tmp_path / out / "0001-edited.png")) for out in ("out", "again")]
    np.testing.assert_array_equal(*images)
    return stored_settings.read(picture), info.splitlines()[-1]


@pytest.mark.slow
def test_toy_argument_is_a_shell_option_and_in_png_metadata(folder, tmp_path):
    settings, command = repeated(folder, tmp_path, ["--wobble", "0.5"], "wobble")
    assert settings["wobble"] == 0.5
    assert "--wobble 0.5" in command
    settings, command = repeated(folder, tmp_path / "default", [], "wobble")
    assert settings["wobble"] == 0.0
    assert settings["guidance_scale"] == 3.0
    assert "--wobble" not in command
    words = ["edit", "--prompt", "a cat", "--edit", "hat", "--wobble", "0.5", "--out", str(tmp_path)]
    other = CliRunner().invoke(main, words)
    assert "--wobble applies to the toy family, but the demo model is Stable Diffusion" in other.output


@pytest.mark.slow
def test_new_argument_is_supported_everywhere(family, folder, tmp_path):
    """A newly declared argument is checked and documented, and the shell, sweeps and PNG metadata support it."""

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class NewCall(toy_family.ToyCall):
        humps: Any = argument(1, Integer(1, 9), "how many humps it has", varies="row", sweep=True, shell=True)
        sway: Any = argument(0.0, Real(0, 1), "how far it leans", sweep=True, shell=True)

    register(toy_family.SYSTEM._replace(call=NewCall))
    pipe = load(folder, devices=jax.local_devices()[:1])
    for method in (pipe.__call__, pipe.compile):
        assert list(inspect.signature(method).parameters) == list(arguments(NewCall))
        assert "humps: How many humps it has. A whole number from 1 to 9" in inspect.getdoc(method)
    with pytest.raises(ValueError, match="humps=10 should be from 1 to 9"):
        pipe("a cat", humps=10)
    settings, command = repeated(folder, tmp_path, ["--humps", "3", "--sway", "0.25"], "humps")
    assert (settings["humps"], settings["sway"]) == (3, 0.25)
    assert "--humps 3 --sway 0.25" in command
    described = sweep.Sweep(
        model={"source": str(folder)}, call={"prompt": "a cat"}, grid={"humps": [1, 2], "sway": [0.0, 0.5]}
    )
    sweep.run(sweep.plan(described, sweep.Facts.of(described), 2), tmp_path / "sweep", progress=False)
    rows = sweep.Results(tmp_path / "sweep").rows
    assert {(row["humps"], row["sway"]) for row in rows} == {(1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5)}
    with pytest.raises(ValueError, match="grid: humps=10 should be from 1 to 9"):
        sweep.Sweep(call={"prompt": "a cat"}, grid={"humps": [10]})


def test_signatures_list_the_declared_arguments():
    """Editors show the declared arguments of every family and of `load`."""
    for system in registry.systems().values():
        cls = pipeline_class(Pipeline, system)
        for name in ("__call__", "compile"):
            method = getattr(cls, name)
            own, *shown = inspect.signature(method).parameters.values()
            assert [one.name for one in shown] == list(arguments(system.call)), system.name
            assert (own.name, method.__name__) == ("self", name)
            for one in shown:
                declared = arguments(system.call)[one.name].default
                assert one.default is (inspect.Parameter.empty if declared is REQUIRED else declared)
    assert list(inspect.signature(load).parameters) == list(arguments(LoadOptions))


def test_installed_families_are_found(monkeypatch):
    class Entry:
        name, value = "toy", "toy_family:SYSTEM"

        @staticmethod
        def load():
            return toy_family.SYSTEM

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Entry] * (group == registry.GROUP))
    monkeypatch.setattr(registry, "_installed_are_known", False)
    try:
        assert registry.systems()["toy"] is toy_family.SYSTEM
    finally:
        registry.unregister("toy")


def test_replacement_keeps_the_position_of_the_family(family):
    """Stable Diffusion accepts every checkpoint that no other family accepts, so a replacement is also tried last."""
    register(registry.named("stable_diffusion")._replace(title="mine"))
    try:
        assert next(iter(registry.systems())) == "stable_diffusion"
        assert registry.named("stable_diffusion").title == "mine"
    finally:
        registry.unregister("stable_diffusion")
    assert registry.named("stable_diffusion").title != "mine"


@pytest.mark.parametrize("change", [{"name": 5}, {"name": ""}, {"title": None}, {"text": None}, {"call": None}])
def test_register_rejects_invalid_families(change):
    with pytest.raises(TypeError, match=f"{next(iter(change))}="):
        register(toy_family.SYSTEM._replace(**change))


@pytest.mark.slow
def test_cascade_with_other_stage_names(stages, tmp_path, monkeypatch):
    """The stages of a cascade may have names that differ from those of DeepFloyd-IF."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = deepfloyd.STAGE_1._replace(name="mine", title="my first stage", stages={"refine": deepfloyd.STAGE_2})
    register(own)
    try:
        words = ["--model", stages["stage1"], "--refine", stages["stage2"], "--refine-steps", 2, "--steps", 2]
        words += ["--prompt", "a cat", "--edit", "hat:warmup=0", "--out", tmp_path / "out"]
        result = CliRunner().invoke(main, ["edit", *map(str, words)])
        assert result.exit_code == 0, result.output
        cascade = load_cascade(stages["stage1"], further={"refine": stages["stage2"]})
        expected = cascade("a cat", stage1={"steps": 2}, refine={"steps": 2}, output="uint8").images[0]
        picture = np.asarray(Image.open(tmp_path / "out" / "0001-original.png")).astype(int)
        assert (abs(picture - expected) > 1).mean() < 1e-3
    finally:
        registry.unregister("mine")
