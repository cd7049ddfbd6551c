"""diffusers' methods for devices, dtypes and how things are computed."""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.checkpoints import same
from support.pasted import Generator, Named, bfloat16, float16, float32

from sega_jax import Pipeline, merge_lora
from sega_jax.diffusers_api import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    SemanticPaellaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    torch_values,
)
from sega_jax.diffusers_api.switches import REFUSED, WITHOUT_EFFECT, Switches
from sega_jax.diffusers_api.torch_values import Seeds, devices_of, is_dtype

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def face(small):
    return StableDiffusionPipeline.from_pipe(Pipeline(**small.components))


@pytest.fixture
def calls(face, monkeypatch):
    """The arguments of native calls, which run nothing."""
    found = []

    def call(self, **options):
        found.append(options)
        raise StopIteration

    monkeypatch.setattr(type(face.pipeline), "__call__", call)
    return found


def made(face, calls, **options):
    with pytest.raises(StopIteration):
        face("a cat", **options)
    return calls[-1]


@pytest.fixture
def lora(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 2)}
    save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}, tmp_path / "lora")
    return (tmp_path / "lora").rename(tmp_path / "lora.safetensors")


def equal(ours, wanted):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True))


@pytest.mark.slow
def test_dtypes(face, lora):
    """LoRAs come along: they are merged again in the other dtype, and taken away from it."""
    before = face.pipeline.models
    face.load_lora_weights(lora)
    assert face.to(bfloat16) is face
    assert face.dtype == jnp.bfloat16
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), before)
    assert equal(face.pipeline.models, merge_lora(half, lora))
    face.unload_lora_weights()
    assert equal(face.pipeline.models, half)
    assert face.to(torch_dtype=float16).dtype == jnp.float16
    other = StableDiffusionImg2ImgPipeline.from_pipe(face, torch_dtype=bfloat16)
    assert (other.dtype, face.dtype) == (jnp.bfloat16, jnp.float16)
    assert face.to("cpu", np.float32, memory_format="channels_last").dtype == jnp.float32
    assert face.to(dtype=jnp.bfloat16, silence_dtype_warnings=True).dtype == jnp.bfloat16
    for value in (float16, np.dtype("float32"), np.float32, jnp.bfloat16, "bfloat16"):
        assert is_dtype(value)
    for value in ("cuda", Named("cuda:0"), None, 3):
        assert not is_dtype(value)


def test_devices(face):
    one, other = jax.devices()[:2]
    before = face.pipeline.models
    assert face.to(other).device == other
    assert equal(face.pipeline.models, before)
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(face.pipeline.models)} == {other}
    assert len(face.to([one, other]).pipeline.devices) == 2
    native = face.pipeline
    assert face.to("cpu").pipeline is native  # it is there already
    assert face.to(Named("cpu")).pipeline is native
    with pytest.warns(UserWarning, match="JAX has no accelerator for 'cuda'; the pipeline stays on cpu") as caught:
        assert face.to("cuda").pipeline is native
    assert caught[0].filename == __file__
    for error, words, attempt in [
        (ValueError, r"device='moon' should be 'cuda', 'cuda:0', 'cpu', or devices from", lambda: face.to("moon")),
        (ValueError, "dtype='float8' should be one of float32", lambda: face.to(dtype="float8")),
        (TypeError, "copy is not an argument of to; it accepts a device and a dtype", lambda: face.to("cpu", copy=True)),
    ]:
        with pytest.raises(error, match=words):
            attempt()


def test_accelerators_by_number(monkeypatch):
    """With two GPUs, of which the pipeline is on the first."""

    class Device:
        platform = "gpu"

    class Chosen:
        def __init__(self, devices):
            self.devices = devices

    gpus = [Device(), Device()]
    kept = Chosen(gpus[:1])
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: gpus)
    monkeypatch.setattr(torch_values, "Devices", Chosen)
    assert devices_of("cuda", kept) is kept
    assert devices_of("cuda:0", kept) is kept
    assert devices_of(Named("cuda:1"), kept).devices == gpus[1:]
    with pytest.raises(ValueError, match="device='cuda:2' does not exist; JAX has 2 accelerators, numbered from 0"):
        devices_of("cuda:2", kept)


def test_methods_without_an_effect(face):
    before = face.pipeline.models
    for name in WITHOUT_EFFECT:
        assert getattr(face, name)("auto", gpu_id=0) is None
    face.enable_freeu(1, 1, 1, 1)
    assert face.pipeline.models is before


def test_refused_methods(face):
    for name, remedy in REFUSED.items():
        with pytest.raises(NotImplementedError, match=f"{name} is not supported: {remedy[:20]}"):
            getattr(face, name)("x")
    with pytest.raises(NotImplementedError, match="FreeU is not supported and would change the picture; leave it out"):
        face.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(AttributeError, match="has no attribute 'enable_magic'"):
        face.enable_magic()


def test_tiles(face, calls, paella):
    assert "tiled" not in made(face, calls)
    face.enable_vae_tiling()
    assert made(face, calls)["tiled"] is True
    face.disable_vae_tiling()
    assert "tiled" not in made(face, calls)
    with pytest.raises(TypeError, match="Paella has no tiled decoding; leave enable_vae_tiling out"):
        SemanticPaellaPipeline.from_pipe(paella).enable_vae_tiling()


def test_progress_bars(face, calls, capsys):
    assert made(face, calls)["progress"] is None
    face.set_progress_bar_config(disable=True)
    assert made(face, calls)["progress"] is False
    assert made(face, calls, progress=True)["progress"] is True
    with pytest.raises(TypeError, match="lave is not an argument of set_progress_bar_config; did you mean leave"):
        face.set_progress_bar_config(lave=False)


@pytest.mark.slow
def test_the_style_of_bars(face, capsys):
    face.set_progress_bar_config(desc="drawing", disable=False)
    face("a cat", num_inference_steps=1, output_type="latent")
    assert "drawing" in capsys.readouterr().err


def test_generators(face, calls):
    """The seeds of generators, each of which makes another picture when it is used again."""
    first = Generator("cuda").manual_seed(3)
    assert made(face, calls, generator=first)["seed"] == 3
    assert first.seed == 3  # nothing was made
    seeds = Seeds(first)
    seeds.advance()
    assert Seeds(first).value not in (3, Seeds([3]).value)
    assert Seeds(first).value == made(face, calls, generator=first)["seed"]
    several = Seeds([Generator().manual_seed(5)] * 3).value
    assert several[0] == 5
    assert len(set(several)) == 3
    assert 0 <= Seeds(Generator()).value < 2**32  # as torch seeds it where nobody does
    assert made(face, calls, generator=[Generator().manual_seed(s) for s in (7, 8)])["seed"] == [7, 8]
    assert made(face, calls, generator=5)["seed"] == 5
    with pytest.raises(StopIteration):
        face("a cat", None, None, 2, None, None, 7.5, None, 1, 0.0, Generator().manual_seed(3))
    assert calls[-1]["seed"] == 3
    key = jax.random.key(4)
    assert made(face, calls, generator=key)["key"] is key
    for options, error, words in [
        ({"generator": np.random.default_rng(0)}, TypeError, "generator=.* should be a seeded torch generator"),
        ({"generator": first, "seed": 3}, ValueError, "seed and generator were both given; give only one of them"),
    ]:
        with pytest.raises(error, match=words):
            face("a cat", **options)


def test_callbacks_see_the_latents_alone(face, lora):
    call = {"num_inference_steps": 2, "output_type": "latent", "progress": False}

    def change(pipe, step, timestep, given):
        given["latents"][:] = 0

    def exchange(pipe, step, timestep, given):
        return {"latents": given["latents"] * 0}

    def weigh(pipe, step, timestep, given):
        pipe.load_lora_weights(lora)

    def guide(pipe, step, timestep, given):
        pipe._guidance_scale = 2.0

    for function, error, words in [
        (guide, ValueError, r"callback_on_step_end set pipe\._guidance_scale, which has no effect during a call"),
        (change, ValueError, "read-only"),
        (exchange, ValueError, "callback_on_step_end returned a changed 'latents', but callbacks cannot change a running call"),
        (weigh, RuntimeError, "LoRAs and new words cannot change during a call"),
    ]:
        with pytest.raises(error, match=words):
            face("a cat", callback_on_step_end=function, **call)
    with pytest.raises(ValueError, match="callback and callback_on_step_end were both given; give only one of them"):
        face("a cat", callback_on_step_end=change, callback=print)


def test_schedulers(face):
    face.scheduler = DPMSolverMultistepScheduler.from_config(face.scheduler.config, use_karras_sigmas=True)
    assert isinstance(face.scheduler, DPMSolverMultistepScheduler)
    assert not isinstance(face.scheduler, DDIMScheduler)
    assert face.scheduler.options["use_karras_sigmas"]
    # What was chosen goes on to the next class.
    chosen = DDIMScheduler.from_config(face.scheduler, timestep_spacing="trailing")
    assert EulerDiscreteScheduler.from_config(chosen.config).options["timestep_spacing"] == "trailing"
    assert DDIMScheduler(beta_start=0.001).options["beta_start"] == 0.001
    assert chosen.config.timestep_spacing == "trailing"
    assert "DDIMScheduler" in chosen.compatibles
    with pytest.raises(AttributeError, match="the config has no option timestep_space; it has"):
        _ = chosen.config.timestep_space
    face.scheduler = DDIMScheduler
    assert isinstance(face.scheduler, DDIMScheduler)
    for error, words, attempt in [
        (TypeError, "beta_strat is not an option of DDIMScheduler; did you mean", lambda: DDIMScheduler(beta_strat=1)),
        (TypeError, "use_karras is not an option", lambda: DDIMScheduler.from_config(chosen.config, use_karras=True)),
        (ValueError, "'no' is not supported", lambda: DDIMScheduler.from_config(chosen.config, timestep_spacing="no")),
        (TypeError, "is a int; expected a folder", lambda: DDIMScheduler.from_pretrained(3)),
    ]:
        with pytest.raises(error, match=words):
            attempt()


def test_fused_loras(face, lora):
    before = face.pipeline.models
    face.load_lora_weights(lora, "a")
    face.fuse_lora(lora_scale=0.7, adapter_names=["a"])
    assert equal(face.pipeline.models, merge_lora(before, {lora: 0.7}))
    assert face.get_active_adapters() == ["a"]
    with pytest.raises(ValueError, match=r"the LoRA 'a' in adapter_names is fused; call unfuse_lora\(\) first"):
        face.set_adapters("a", 0.5)
    face.unfuse_lora()
    assert equal(face.pipeline.models, merge_lora(before, lora))
    face.disable_lora()
    assert equal(face.pipeline.models, before)
    face.enable_lora()
    face.set_adapters("a", {"unet": 0.3})
    assert equal(face.pipeline.models, merge_lora(before, {lora: 0.3}))
    face.delete_adapters("a")
    assert equal(face.pipeline.models, before)
    for error, words, attempt in [
        (ValueError, "adapter_weights: 'unet' has weights for single blocks", lambda: face.set_adapters("a", {"unet": {}})),
        (TypeError, "adapter_weights='x' should be", lambda: face.set_adapters("a", "x")),
        (ValueError, "adapter_name='b' is not loaded, so hotswap=True", lambda: _swap(face, lora)),
        (
            TypeError,
            "wieght_name is not an argument of load_lora_weights; did you mean weight_name",
            lambda: _typo(face),
        ),
    ]:
        face.load_lora_weights(lora, "a")
        with pytest.raises(error, match=words):
            attempt()
        face.unload_lora_weights()


def _swap(face, lora):
    face.load_lora_weights(lora, "b", hotswap=True)


def _typo(face):
    face.load_lora_weights("owner/lora", wieght_name="x")


def test_words_and_loras_are_taken_away_apart(face, small, lora, tmp_path):
    """In any order."""
    vectors = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    save_file({"<a>": vectors}, tmp_path / "a.safetensors")
    face.load_lora_weights(lora)
    face.load_textual_inversion(tmp_path / "a.safetensors", token="<b>")
    face.unload_lora_weights()
    assert equal(face.pipeline.models.unet, small.models.unet)
    assert len(face.tokenizer.tokens("<b>")) == 2
    face.load_lora_weights(lora)
    with pytest.raises(ValueError, match="the word '<c>' in tokens was not added; loaded words: <b>. Use the token"):
        face.unload_textual_inversion("<c>")
    face.unload_textual_inversion("<b>")
    assert equal(face.pipeline.models, merge_lora(small.models, lora))
    np.testing.assert_array_equal(face.tokenizer(["<b>"]), small.tokenizer(["<b>"]))


def test_copies(face, small, lora):
    face.load_lora_weights(lora)
    for other in (copy.copy(face), copy.deepcopy(face)):
        assert equal(other.pipeline.models, face.pipeline.models)
        other.scheduler = "EulerDiscreteScheduler"
        assert face.scheduler.name != "EulerDiscreteScheduler"
        other.unload_lora_weights()
        assert equal(other.pipeline.models, small.models)
        assert face.get_active_adapters() == ["default_0"]
    with pytest.raises(TypeError, match=r"a pipeline cannot be pickled, .*; write pipe.save\(folder\)"):
        pickle.dumps(face)
    assert repr(face).startswith("StableDiffusionPipeline of <StableDiffusionPipeline: Stable Diffusion 1.x")


def test_components(first):
    face = IFPipeline.from_pipe(first)
    assert face.components["unet"] is face.unet
    assert face.components["scheduler"] is face.scheduler
    with pytest.raises(TypeError, match=r"IFPipeline cannot be built from components; use IFPipeline.from_pretrained"):
        IFPipeline(**face.components)


def test_from_another_pipeline(face, small):
    other = StableDiffusionImg2ImgPipeline.from_pipe(face, torch_dtype=float32, scheduler="DDPMScheduler")
    assert other.scheduler.name == "DDPMScheduler"
    assert face.scheduler.name != "DDPMScheduler"
    assert same(face.pipeline, small)
    with pytest.raises(TypeError, match="image is missing; give the picture to start from"):
        other("a cat")
    with pytest.raises(TypeError, match="variant is not an argument of from_pipe; it accepts torch_dtype, scheduler"):
        StableDiffusionPipeline.from_pipe(face, variant="fp16")


def test_options_of_loading(small_folder, monkeypatch):
    seen = []

    def client(repository, **options):
        seen.append(options)
        return str(small_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", client)
    load = StableDiffusionPipeline.from_pretrained
    harmless = {"use_safetensors": True, "low_cpu_mem_usage": True, "offload_folder": "x", "custom_pipeline": None}
    of_hub = {"cache_dir": "here", "token": "t", "local_files_only": True, "force_download": False}
    face = load("owner/name", dtype={"unet": float32, "default": float32}, device_map="cpu", **harmless, **of_hub)
    assert all(options.items() >= of_hub.items() for options in seen)
    assert face.dtype == np.float32
    assert repr(face.pipeline).count("'owner/name'") == 1
    load(small_folder)
    for options, error, words in [
        (
            {"custom_pipeline": "lpw"},
            TypeError,
            "custom_pipeline='lpw' is not supported: leave it out; calls accept long_prompts=True",
        ),
        ({"quantization_config": {"a": 1}}, TypeError, "quantization_config=.* sega_jax has no quantised weights"),
        ({"torch_dtyp": float16}, TypeError, "torch_dtyp is not an argument of .*; did you mean torch_dtype?"),
        ({"torch_dtype": float16, "dtype": float32}, ValueError, "differ; they are the same option, give only one"),
        ({"torch_dtype": {"a": float16, "b": float32}}, ValueError, "has different dtypes; give one"),
        ({"vae": _foreign("diffusers")}, TypeError, "vae is a Module of diffusers, which is not supported; save it with"),
        ({"proxies": {"https": "x"}}, TypeError, "set the environment variable HTTPS_PROXY"),
    ]:
        with pytest.raises(error, match=words):
            load(small_folder, **options)


def _foreign(library):
    return type("Module", (), {"__module__": f"{library}.models"})()


def test_names_that_are_not_here():
    import sega_jax.diffusers_api as api

    with pytest.raises(ImportError, match="SASolverScheduler is not supported; choose one of DDIMScheduler, PNDMScheduler"):
        _ = api.SASolverScheduler
    with pytest.raises(ImportError, match="StableDiffusion3Pipeline has no counterpart in sega_jax; use one of Diffusion"):
        _ = api.StableDiffusion3Pipeline
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        _ = api.magic
    assert {"StableDiffusionXLPipeline", "UniPCMultistepScheduler"} <= set(dir(api))
    with pytest.raises(TypeError, match="create a pipeline with its from_pretrained, from_single_file or from_pipe"):
        api.DiffusionPipeline()
    assert issubclass(StableDiffusionXLPipeline, Switches)
    assert all(inspect.getdoc(getattr(Switches, name)) for name in (*WITHOUT_EFFECT, *REFUSED))
