"""Replacing schedulers and networks of pipelines, and sharing compiled programs between pipelines."""

import json
import types

import jax
import numpy as np
import pytest
from support import tiny

import sega_jax
from sega_jax import (
    CheckpointError,
    Edit,
    Pipeline,
    SemanticIFPipeline,
    SemanticPaellaPipeline,
    SemanticStableDiffusionPipeline,
    load,
)
from sega_jax.method.schedules import FAMILIES, Scheduler, from_config
from sega_jax.systems.stable_diffusion import Models

CALL = {"prompt": "cat", "edits": [Edit("a", warmup=1)], "steps": 3, "output": "latent"}
WITH_BETAS = [name for name, family in FAMILIES.items() if family.training == "betas"]
MULTISTEP = [name for name in WITH_BETAS if name not in ("DDIMScheduler", "PNDMScheduler", "TCDScheduler")]
EDM = {"_class_name": "EDMEulerScheduler"}


@pytest.fixture
def own(small):
    """Returns a pipeline whose scheduler may be replaced."""
    return Pipeline(**small.components)


def same(first, second):
    assert (first.name, first.options) == (second.name, second.options)


@pytest.mark.parametrize("name", WITH_BETAS)
def test_a_class_name_adopts_the_options(own, name):
    own.scheduler = name
    assert own.scheduler.name == name
    assert own.scheduler.options["beta_end"] == tiny.DDIM["beta_end"]
    assert own.scheduler.options.get("steps_offset", 1) == 1


@pytest.mark.parametrize("value", ["EDMDPMSolverMultistepScheduler", "IPNDMScheduler", EDM, from_config(EDM)])
def test_schedulers_for_networks_with_another_training(own, small_folder, value):
    words = "Scheduler samples networks trained with .* DDIMScheduler, is for networks trained with noise from betas"
    with pytest.raises(ValueError, match=words):
        own.scheduler = value
    with pytest.raises(ValueError, match=words):
        load(small_folder, scheduler=value)


def test_networks_trained_with_edm_take_only_its_schedulers(small):
    edm = Pipeline(**small.components | {"scheduler": EDM | {"sigma_max": 9.0}})
    edm.scheduler = "EDMDPMSolverMultistepScheduler"
    assert edm.scheduler.options["sigma_max"] == 9.0
    with pytest.raises(ValueError, match="use one of EDMEulerScheduler, EDMDPMSolverMultistepScheduler"):
        edm.scheduler = "DDIMScheduler"


def test_the_default_eta_depends_on_the_scheduler(own):
    shares = {}
    for name in ("DDIMScheduler", "TCDScheduler"):
        own.scheduler = name
        shares[name] = own.prepare("cat").settings.own.eta.tolist(), own.prepare("cat", eta=0.0).settings.own.eta[0]
    assert shares == {"DDIMScheduler": ([0.0], 0.0), "TCDScheduler": ([0.3], 0.0)}


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("EulerDiscrete", "EulerDiscreteScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler"),
        ("ddim", "DDIMScheduler"),
        ("PNDMSheduler", "PNDMScheduler"),
        ({"_class_name": "DDIMSchedulr"}, "DDIMScheduler"),
    ],
)
def test_misspelt_schedulers(small_folder, value, meant):
    with pytest.raises(ValueError, match=rf"; did you mean {meant}\?"):
        load(small_folder, scheduler=value)


def test_returning_to_a_class_restores_the_options(own):
    before = own.scheduler
    own.scheduler = "EulerDiscreteScheduler"
    own.scheduler = "DDIMScheduler"
    same(own.scheduler, before)


def test_schedulers_from_configs_folders_files_and_objects(own, tmp_path):
    config = tiny.SCHEDULERS["DPM"] | {"use_karras_sigmas": True}
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(config))
    diffusers_object = type(
        "DPMSolverMultistepScheduler", (), {"config": {k: v for k, v in config.items() if k[0] != "_"}}
    )()
    for value in (config, tmp_path, str(tmp_path), tmp_path / "scheduler", file, diffusers_object, from_config(config)):
        own.scheduler = "LMSDiscreteScheduler"
        own.scheduler = value
        same(own.scheduler, from_config(config))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (
            "EulerScheduler",
            ValueError,
            "'EulerScheduler' is neither a folder nor a scheduler class; did you mean EulerDiscreteScheduler",
        ),
        (3, TypeError, "scheduler=3 should be a class name"),
        (types.SimpleNamespace(config=3), TypeError, "should be a class name"),
        (types.SimpleNamespace(config={}), ValueError, "'SimpleNamespace' is not supported"),
        ({}, ValueError, "the config {} has no _class_name; add one of DDIMScheduler"),
        ({"use_karras_sigmas": True}, ValueError, "has no _class_name"),
        ("", ValueError, "scheduler='' is neither a folder"),
        (dict, TypeError, "should be a class name"),
        ({"_class_name": "DDIMScheduler", "beta_end": 2}, ValueError, "beta_end=2 should be a number between"),
    ],
)
def test_invalid_schedulers(own, value, error, words):
    before = own.scheduler
    with pytest.raises(error, match=words):
        own.scheduler = value
    assert own.scheduler is before


def test_defaults_of_another_class_are_not_adopted(own):
    """The config of a diffusers object marks the options that have their default values."""
    config = {**tiny.SD_BETAS, "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    own.scheduler = type("DDIMScheduler", (), {"config": config})()
    assert own.scheduler.options["timestep_spacing"] == "leading"
    own.scheduler = "EulerDiscreteScheduler"
    assert own.scheduler.options["timestep_spacing"] == "linspace"
    assert own.scheduler.options["beta_end"] == tiny.SD_BETAS["beta_end"]


def test_a_class_name_in_place_of_an_unsupported_scheduler(small_folder, tmp_path, one_device):
    """Options that only the unsupported scheduler has are ignored. Passing a class is equivalent to passing its
    name."""
    (tmp_path / "other").mkdir()
    for path in small_folder.iterdir():
        if path.name != "scheduler":
            (tmp_path / "other" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="no previous config with betas"):
        load(tmp_path / "other", scheduler="EulerDiscreteScheduler")
    (tmp_path / "other" / "scheduler").mkdir()
    config = tiny.SD_BETAS | {"_class_name": "LCMScheduler", "original_inference_steps": 50}
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    kind = type("EulerDiscreteScheduler", (), {})
    for name in ("EulerDiscreteScheduler", kind):
        pipe = load(tmp_path / "other", scheduler=name, devices=one_device)
        assert pipe.scheduler.options["beta_end"] == tiny.SD_BETAS["beta_end"]


def test_configs_are_read_only(own):
    config = own.scheduler.config
    for change in (
        lambda: config.update(use_karras_sigmas=True),
        lambda: config.__setitem__("use_karras_sigmas", True),
        lambda: setattr(config, "use_karras_sigmas", True),
    ):
        with pytest.raises(TypeError, match=r"is read-only; give the pipeline a new config, as in\s+pipe\.scheduler ="):
            change()
    assert {**config, "use_karras_sigmas": True} == config | {"use_karras_sigmas": True}
    with pytest.raises(TypeError):
        own.scheduler.options["beta_end"] = 0.1


@pytest.mark.parametrize(
    ("components", "error", "words"),
    [
        ({"models": 3}, TypeError, "models=int should be the Models of a "),
        ({"devices": 3}, TypeError, "devices=3 should be a list of JAX devices"),
        ({"safety": True}, TypeError, "safety=True should be another pipeline's"),
        ({"scheduler": "EulerDiscreteScheduler"}, ValueError, "give a config"),
        ({"scheduler": 3}, TypeError, "scheduler=3 should be a class name"),
    ],
)
def test_invalid_components(small, components, error, words):
    with pytest.raises(error, match=words):
        Pipeline(**small.components | components)
    with pytest.raises(TypeError, match="models=int should be the Models of a "):
        Pipeline(**small.components).models = 3


def test_networks_are_replaced_by_diffusers_names(small):
    face = SemanticStableDiffusionPipeline(**SemanticStableDiffusionPipeline.from_pipe(small).components)
    call = {"prompt": "cat", "num_inference_steps": 2, "output_type": "latent"}
    before = face(**call).images
    face.unet = jax.tree.map(lambda leaf: leaf / 2, face.unet)
    assert not np.array_equal(face(**call).images, before)
    assert face.feature_extractor is None
    with pytest.raises(TypeError, match="vae=int should be a AutoencoderKL"):
        face.vae = 3


def test_a_folder_without_a_scheduler(own, tmp_path):
    with pytest.raises(CheckpointError, match=r"scheduler_config.json is missing"):
        own.scheduler = tmp_path


def test_schedulers_change_pictures_and_compile_nothing(own, compilations):
    own.scheduler = MULTISTEP[0]
    own(**CALL)
    compilations.clear()
    pictures = {}
    for name in MULTISTEP:
        own.scheduler = name
        pictures[name] = own(**CALL).images
        assert np.isfinite(pictures[name]).all()
    assert not compilations
    assert len({array.tobytes() for array in pictures.values()}) == len(MULTISTEP)


def test_thresholds_and_timesteps_change_pictures_and_compile_nothing(own, compilations):
    config = own.scheduler.config | {"thresholding": True, "sample_max_value": 3.0}

    def run(steps=3, **options):
        own.scheduler = config | options
        return own(**CALL | {"steps": steps}).images.tobytes()

    pictures = {run()}
    compilations.clear()
    pictures |= {run(dynamic_thresholding_ratio=0.5), run(sample_max_value=2.0), run([900, 200, 100]), run("fast27")}
    assert len(pictures) == 5
    assert not compilations


def test_pipelines_of_the_same_components_share_programs(small, compilations):
    expected = small(**CALL).images
    compilations.clear()
    again = Pipeline(**small.components)
    again.scheduler = "DDIMScheduler"
    assert np.array_equal(again(**CALL).images, expected)
    assert not compilations


def test_diffusers_pipelines_of_the_same_components(small, compilations):
    face = SemanticStableDiffusionPipeline.from_pipe(small)
    expected = face("cat", num_inference_steps=3, output_type="latent").images
    compilations.clear()
    again = SemanticStableDiffusionPipeline(**face.components)
    assert np.array_equal(again("cat", num_inference_steps=3, output_type="latent").images, expected)
    assert not compilations
    again.scheduler = "UniPCMultistepScheduler"
    assert (face.scheduler.name, again.scheduler.name) == ("DDIMScheduler", "UniPCMultistepScheduler")
    assert again.unet is not None
    assert again.components.keys() == face.components.keys()
    with pytest.raises(TypeError, match=r"should be a pipeline from sega_jax\.load"):
        SemanticStableDiffusionPipeline.from_pipe(3)


@pytest.mark.parametrize("face", [SemanticIFPipeline, SemanticPaellaPipeline])
def test_diffusers_classes_of_other_families(small, small_folder, face):
    """A checkpoint is rejected as soon as its index has been read."""
    with pytest.raises(TypeError, match=f"is for Stable Diffusion 1.x or 2.x, expected .* for {face.__name__}"):
        face.from_pipe(small)
    with pytest.raises(CheckpointError, match=f"is Stable Diffusion 1.x or 2.x, expected .* for {face.__name__}"):
        face.from_pretrained(small_folder)


def test_checkpoints_of_the_same_shapes_share_programs(small, small_folder, compilations):
    expected = small(**CALL).images
    compilations.clear()
    assert np.array_equal(load(small_folder, devices=small.devices)(**CALL).images, expected)
    assert not compilations


def test_replaced_networks(small, small_folder, tmp_path):
    """The files of replaced networks may be missing."""
    halved = jax.tree.map(lambda leaf: leaf / 2, small.models.unet)
    for part in ("unet", "text_encoder", "tokenizer"):
        assert (small_folder / part).is_dir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in small_folder.iterdir():
        if path.name not in ("unet", "tokenizer"):
            (bare / path.name).symlink_to(path)
    devices = small.devices.devices
    pipe = load(bare, unet=halved, tokenizer=small.tokenizer, scheduler="LMSDiscreteScheduler", devices=devices)
    assert pipe.scheduler.name == "LMSDiscreteScheduler"
    other = Pipeline(**small.components)
    other.models, other.scheduler = other.models._replace(unet=halved), "LMSDiscreteScheduler"
    assert np.array_equal(pipe(**CALL).images, other(**CALL).images)
    assert not np.array_equal(pipe(**CALL).images, small(**CALL).images)
    face = SemanticStableDiffusionPipeline.from_pretrained(
        bare, unet=halved, tokenizer=small.tokenizer, scheduler=tiny.PNDM, devices=devices
    )
    assert face.scheduler.name == "PNDMScheduler"


def test_another_text_encoder_clears_the_cache(own):
    before = own.encode("cat")
    own.models = own.models._replace(text_encoder=jax.tree.map(lambda leaf: leaf / 2, own.models.text_encoder))
    assert not np.array_equal(own.encode("cat").states, before.states)


@pytest.mark.parametrize(
    ("components", "error", "words"),
    [
        (
            {"unet": 3},
            TypeError,
            r"unet=int should be a UNet2DConditionModel from another pipeline \(pipe.models.unet\)",
        ),
        ({"unet": "abstract"}, TypeError, "unet has no weights, only shapes"),
        ({"text_encoder": "wide"}, CheckpointError, "cross_attention_dim 16 is not the text encoder's hidden_size 24"),
        ({"tokenizer": 3}, TypeError, "tokenizer=3 should be another pipeline's"),
        ({"scheduler": "none"}, ValueError, "^scheduler='none' is neither a folder"),
        ({"safety_checker": "yes"}, TypeError, "safety_checker='yes' should be True"),
        ({"devices": 3}, TypeError, "devices=3 should be a list of JAX devices"),
    ],
)
def test_invalid_options_of_load(small_folder, components, error, words):
    wide = tiny.TEXT | {"hidden_size": 24}
    if components.get("unet") == "abstract":
        components = {"unet": tiny.networks(unet=tiny.UNET_1).unet}
    if components.get("text_encoder") == "wide":
        unet = tiny.UNET_1 | {"cross_attention_dim": 24}
        module = tiny.networks(unet=unet, text=wide).text_encoder
        components = {"text_encoder": jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), module)}
    with pytest.raises(error, match=words):
        load(small_folder, **components)


def test_networks_that_do_not_fit_are_rejected_by_the_pipeline(own):
    unet = tiny.networks(unet=tiny.UNET | {"in_channels": 8, "out_channels": 8}, vae=tiny.VAE | {"latent_channels": 8})
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), unet.unet)
    with pytest.raises(ValueError, match=r"the UNet has 8 input and 8 output channels, .* expected 4 input"):
        own.models = own.models._replace(unet=zeros)
    assert isinstance(own.models, Models)


def test_schedulers_that_need_a_predicted_variance(own):
    own.scheduler = tiny.SCHEDULERS["DDPM"] | {"variance_type": "learned_range"}
    with pytest.raises(ValueError, match="needs a network that predicts the variance, but this network does not"):
        own(**CALL)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls"), [("Heun", 5), ("PNDM, Runge-Kutta", 13)])
def test_warm_ups_count_calls(own, name, calls):
    """Both schedulers need more model calls than steps; diffusers' semantic pipeline fails with them."""
    own.scheduler = tiny.SCHEDULERS[name]
    steps = 3 if name == "Heun" else 4
    out = own("cat", Edit("a", warmup=calls - 1, threshold=0), steps=steps, output="latent", record=True)
    assert out.record.sem_guidance.shape[1] == calls
    assert out.record.sem_guidance.any((0, 2, 3, 4)).tolist() == [False] * (calls - 1) + [True]
    with pytest.warns(
        UserWarning, match=rf"after the last of {calls} model calls \(steps={steps} gives {calls} calls\)"
    ):
        own("cat", Edit("a", warmup=calls), steps=steps, output="latent")


def test_scheduler_configs_are_those_of_diffusers(own):
    """The config of `pipe.scheduler` can be passed to diffusers' `from_config`."""
    assert isinstance(own.scheduler, Scheduler)
    assert own.scheduler.config == tiny.DDIM


def test_public_names():
    assert {"load", "save_guidance", "load_guidance", "Pipeline"} <= set(dir(sega_jax))
