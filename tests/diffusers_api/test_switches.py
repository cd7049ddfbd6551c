"""Tests diffusers' methods for devices, dtypes, LoRAs, schedulers and execution options."""

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
def pipe(small):
    return StableDiffusionPipeline.from_pipe(Pipeline(**small.components))


@pytest.fixture
def calls(pipe, monkeypatch):
    """Records the arguments of native calls without running them."""
    recorded = []

    def call(self, **options):
        recorded.append(options)
        raise StopIteration

    monkeypatch.setattr(type(pipe.pipeline), "__call__", call)
    return recorded


def native_arguments(pipe, calls, **options):
    with pytest.raises(StopIteration):
        pipe("a cat", **options)
    return calls[-1]


@pytest.fixture
def lora(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 2)}
    save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}, tmp_path / "lora")
    return (tmp_path / "lora").rename(tmp_path / "lora.safetensors")


def equal(models, expected):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(models), jax.tree.leaves(expected), strict=True))


@pytest.mark.slow
def test_dtypes(pipe, lora):
    """After a cast, LoRAs are merged in the new dtype and can still be removed."""
    before = pipe.pipeline.models
    pipe.load_lora_weights(lora)
    assert pipe.to(bfloat16) is pipe
    assert pipe.dtype == jnp.bfloat16
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), before)
    assert equal(pipe.pipeline.models, merge_lora(half, lora))
    pipe.unload_lora_weights()
    assert equal(pipe.pipeline.models, half)
    assert pipe.to(torch_dtype=float16).dtype == jnp.float16
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=bfloat16)
    assert (other.dtype, pipe.dtype) == (jnp.bfloat16, jnp.float16)
    assert pipe.to("cpu", np.float32, memory_format="channels_last").dtype == jnp.float32
    assert pipe.to(dtype=jnp.bfloat16, silence_dtype_warnings=True).dtype == jnp.bfloat16
    for value in (float16, np.dtype("float32"), np.float32, jnp.bfloat16, "bfloat16"):
        assert is_dtype(value)
    for value in ("cuda", Named("cuda:0"), None, 3):
        assert not is_dtype(value)


def test_devices(pipe):
    one, other = jax.devices()[:2]
    before = pipe.pipeline.models
    assert pipe.to(other).device == other
    assert equal(pipe.pipeline.models, before)
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(pipe.pipeline.models)} == {other}
    assert len(pipe.to([one, other]).pipeline.devices) == 2
    native = pipe.pipeline
    assert pipe.to("cpu").pipeline is native  # the networks are already there
    assert pipe.to(Named("cpu")).pipeline is native
    with pytest.warns(UserWarning, match="JAX has no accelerator for 'cuda'; the pipeline stays on cpu") as caught:
        assert pipe.to("cuda").pipeline is native
    assert caught[0].filename == __file__
    for error, message, attempt in [
        (ValueError, r"device='moon' should be 'cuda', 'cuda:0', 'cpu', or devices from", lambda: pipe.to("moon")),
        (ValueError, "dtype='float8' should be one of float32", lambda: pipe.to(dtype="float8")),
        (
            TypeError,
            r"copy is not an argument of to\(\); it accepts a device and a dtype",
            lambda: pipe.to("cpu", copy=True),
        ),
    ]:
        with pytest.raises(error, match=message):
            attempt()


def test_accelerators_by_number(monkeypatch):
    """The test simulates two GPUs, with the pipeline on the first one."""

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


def test_methods_without_an_effect(pipe):
    before = pipe.pipeline.models
    for name in WITHOUT_EFFECT:
        assert getattr(pipe, name)("auto", gpu_id=0) is None
    pipe.enable_freeu(1, 1, 1, 1)
    assert pipe.pipeline.models is before


def test_refused_methods(pipe):
    for name, remedy in REFUSED.items():
        with pytest.raises(NotImplementedError, match=f"{name} is not supported: {remedy[:20]}"):
            getattr(pipe, name)("x")
    with pytest.raises(NotImplementedError, match="FreeU is not supported and would change the picture; leave it out"):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(AttributeError, match="has no attribute 'enable_magic'"):
        pipe.enable_magic()


def test_tiles(pipe, calls, paella):
    assert "tiled" not in native_arguments(pipe, calls)
    pipe.enable_vae_tiling()
    assert native_arguments(pipe, calls)["tiled"] is True
    pipe.disable_vae_tiling()
    assert "tiled" not in native_arguments(pipe, calls)
    with pytest.raises(TypeError, match="Paella has no tiled decoding; leave enable_vae_tiling out"):
        SemanticPaellaPipeline.from_pipe(paella).enable_vae_tiling()


def test_progress_bars(pipe, calls, capsys):
    assert native_arguments(pipe, calls)["progress"] is None
    pipe.set_progress_bar_config(disable=True)
    assert native_arguments(pipe, calls)["progress"] is False
    assert native_arguments(pipe, calls, progress=True)["progress"] is True
    with pytest.raises(TypeError, match="lave is not an argument of set_progress_bar_config; did you mean leave"):
        pipe.set_progress_bar_config(lave=False)


@pytest.mark.slow
def test_options_of_progress_bars(pipe, capsys):
    pipe.set_progress_bar_config(desc="drawing", disable=False)
    pipe("a cat", num_inference_steps=1, output_type="latent")
    assert "drawing" in capsys.readouterr().err


def test_generators(pipe, calls):
    """Generators are converted to seeds; using the same generator again gives a different seed."""
    first = Generator("cuda").manual_seed(3)
    assert native_arguments(pipe, calls, generator=first)["seed"] == 3
    assert first.seed == 3  # the failed call did not advance the generator
    seeds = Seeds(first)
    seeds.advance()
    assert Seeds(first).value not in (3, Seeds([3]).value)
    assert Seeds(first).value == native_arguments(pipe, calls, generator=first)["seed"]
    several = Seeds([Generator().manual_seed(5)] * 3).value
    assert several[0] == 5
    assert len(set(several)) == 3
    assert 0 <= Seeds(Generator()).value < 2**32  # the seed of an unseeded torch generator
    assert native_arguments(pipe, calls, generator=[Generator().manual_seed(s) for s in (7, 8)])["seed"] == [7, 8]
    assert native_arguments(pipe, calls, generator=5)["seed"] == 5
    with pytest.raises(StopIteration):
        pipe("a cat", None, None, 2, None, None, 7.5, None, 1, 0.0, Generator().manual_seed(3))
    assert calls[-1]["seed"] == 3
    key = jax.random.key(4)
    assert native_arguments(pipe, calls, generator=key)["key"] is key
    for options, error, message in [
        ({"generator": np.random.default_rng(0)}, TypeError, "generator=.* should be a seeded torch generator"),
        ({"generator": first, "seed": 3}, ValueError, "seed and generator were both given; give only one of them"),
    ]:
        with pytest.raises(error, match=message):
            pipe("a cat", **options)


def test_callbacks_cannot_change_a_call(pipe, lora):
    call = {"num_inference_steps": 2, "output_type": "latent", "progress": False}

    def change_latents(pipe, step, timestep, callback_kwargs):
        callback_kwargs["latents"][:] = 0

    def replace_latents(pipe, step, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] * 0}

    def load_lora(pipe, step, timestep, callback_kwargs):
        pipe.load_lora_weights(lora)

    def set_guidance(pipe, step, timestep, callback_kwargs):
        pipe._guidance_scale = 2.0

    for function, error, message in [
        (
            set_guidance,
            ValueError,
            r"callback_on_step_end set pipe\._guidance_scale, which has no effect during a call",
        ),
        (change_latents, ValueError, "read-only"),
        (
            replace_latents,
            ValueError,
            "callback_on_step_end returned a changed 'latents', but callbacks cannot change a running call",
        ),
        (load_lora, RuntimeError, "LoRAs and new words cannot be changed during a call"),
    ]:
        with pytest.raises(error, match=message):
            pipe("a cat", callback_on_step_end=function, **call)
    with pytest.raises(ValueError, match="callback and callback_on_step_end were both given; give only one of them"):
        pipe("a cat", callback_on_step_end=change_latents, callback=print)


def test_schedulers(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert not isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.options["use_karras_sigmas"]
    # Options that were set explicitly are passed on to the next scheduler.
    chosen = DDIMScheduler.from_config(pipe.scheduler, timestep_spacing="trailing")
    assert EulerDiscreteScheduler.from_config(chosen.config).options["timestep_spacing"] == "trailing"
    assert DDIMScheduler(beta_start=0.001).options["beta_start"] == 0.001
    assert chosen.config.timestep_spacing == "trailing"
    assert "DDIMScheduler" in chosen.compatibles
    with pytest.raises(AttributeError, match="the config has no option timestep_space; it has"):
        _ = chosen.config.timestep_space
    pipe.scheduler = DDIMScheduler
    assert isinstance(pipe.scheduler, DDIMScheduler)
    for error, message, attempt in [
        (TypeError, "beta_strat is not an option of DDIMScheduler; did you mean", lambda: DDIMScheduler(beta_strat=1)),
        (TypeError, "use_karras is not an option", lambda: DDIMScheduler.from_config(chosen.config, use_karras=True)),
        (ValueError, "'no' is not supported", lambda: DDIMScheduler.from_config(chosen.config, timestep_spacing="no")),
        (TypeError, "has type int; expected a folder", lambda: DDIMScheduler.from_pretrained(3)),
    ]:
        with pytest.raises(error, match=message):
            attempt()


def test_fused_loras(pipe, lora):
    before = pipe.pipeline.models
    pipe.load_lora_weights(lora, "a")
    pipe.fuse_lora(lora_scale=0.7, adapter_names=["a"])
    assert equal(pipe.pipeline.models, merge_lora(before, {lora: 0.7}))
    assert pipe.get_active_adapters() == ["a"]
    with pytest.raises(ValueError, match=r"the LoRA 'a' in adapter_names is fused; call unfuse_lora\(\) first"):
        pipe.set_adapters("a", 0.5)
    pipe.unfuse_lora()
    assert equal(pipe.pipeline.models, merge_lora(before, lora))
    pipe.disable_lora()
    assert equal(pipe.pipeline.models, before)
    pipe.enable_lora()
    pipe.set_adapters("a", {"unet": 0.3})
    assert equal(pipe.pipeline.models, merge_lora(before, {lora: 0.3}))
    pipe.delete_adapters("a")
    assert equal(pipe.pipeline.models, before)
    for error, message, attempt in [
        (
            ValueError,
            "adapter_weights: 'unet' has weights for individual blocks",
            lambda: pipe.set_adapters("a", {"unet": {}}),
        ),
        (TypeError, "adapter_weights='x' should be", lambda: pipe.set_adapters("a", "x")),
        (ValueError, "adapter_name='b' is not loaded, so hotswap=True", lambda: _swap(pipe, lora)),
        (
            TypeError,
            "wieght_name is not an argument of load_lora_weights; did you mean weight_name",
            lambda: _typo(pipe),
        ),
    ]:
        pipe.load_lora_weights(lora, "a")
        with pytest.raises(error, match=message):
            attempt()
        pipe.unload_lora_weights()


def _swap(pipe, lora):
    pipe.load_lora_weights(lora, "b", hotswap=True)


def _typo(pipe):
    pipe.load_lora_weights("owner/lora", wieght_name="x")


def test_words_and_loras_are_removed_in_any_order(pipe, small, lora, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    save_file({"<a>": vectors}, tmp_path / "a.safetensors")
    pipe.load_lora_weights(lora)
    pipe.load_textual_inversion(tmp_path / "a.safetensors", token="<b>")
    pipe.unload_lora_weights()
    assert equal(pipe.pipeline.models.unet, small.models.unet)
    assert len(pipe.tokenizer.tokens("<b>")) == 2
    pipe.load_lora_weights(lora)
    with pytest.raises(ValueError, match="the word '<c>' in tokens was not added; loaded words: <b>"):
        pipe.unload_textual_inversion("<c>")
    pipe.unload_textual_inversion("<b>")
    assert equal(pipe.pipeline.models, merge_lora(small.models, lora))
    np.testing.assert_array_equal(pipe.tokenizer(["<b>"]), small.tokenizer(["<b>"]))


def test_copies(pipe, small, lora):
    pipe.load_lora_weights(lora)
    for other in (copy.copy(pipe), copy.deepcopy(pipe)):
        assert equal(other.pipeline.models, pipe.pipeline.models)
        other.scheduler = "EulerDiscreteScheduler"
        assert pipe.scheduler.name != "EulerDiscreteScheduler"
        other.unload_lora_weights()
        assert equal(other.pipeline.models, small.models)
        assert pipe.get_active_adapters() == ["default_0"]
    with pytest.raises(TypeError, match=r"a pipeline cannot be pickled, .*; write pipe.save\(folder\)"):
        pickle.dumps(pipe)
    assert repr(pipe).startswith("StableDiffusionPipeline of <StableDiffusionPipeline: Stable Diffusion 1.x")


def test_components(first):
    pipe = IFPipeline.from_pipe(first)
    assert pipe.components["unet"] is pipe.unet
    assert pipe.components["scheduler"] is pipe.scheduler
    with pytest.raises(TypeError, match=r"IFPipeline cannot be built from components; use IFPipeline.from_pretrained"):
        IFPipeline(**pipe.components)


def test_from_another_pipeline(pipe, small):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=float32, scheduler="DDPMScheduler")
    assert other.scheduler.name == "DDPMScheduler"
    assert pipe.scheduler.name != "DDPMScheduler"
    assert same(pipe.pipeline, small)
    with pytest.raises(TypeError, match="image is missing; give the picture to start from"):
        other("a cat")
    with pytest.raises(TypeError, match="variant is not an argument of from_pipe; it accepts torch_dtype, scheduler"):
        StableDiffusionPipeline.from_pipe(pipe, variant="fp16")


def test_loading_options(small_folder, monkeypatch):
    seen = []

    def client(repository, **options):
        seen.append(options)
        return str(small_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", client)
    load = StableDiffusionPipeline.from_pretrained
    harmless = {"use_safetensors": True, "low_cpu_mem_usage": True, "offload_folder": "x", "custom_pipeline": None}
    of_hub = {"cache_dir": "here", "token": "t", "local_files_only": True, "force_download": False}
    pipe = load("owner/name", dtype={"unet": float32, "default": float32}, device_map="cpu", **harmless, **of_hub)
    assert all(options.items() >= of_hub.items() for options in seen)
    assert pipe.dtype == np.float32
    assert repr(pipe.pipeline).count("'owner/name'") == 1
    load(small_folder)
    for options, error, message in [
        (
            {"custom_pipeline": "lpw"},
            TypeError,
            "custom_pipeline='lpw' is not supported: leave it out; calls accept long_prompts=True",
        ),
        ({"quantization_config": {"a": 1}}, TypeError, "quantization_config=.* sega_jax has no quantised weights"),
        ({"torch_dtyp": float16}, TypeError, "torch_dtyp is not an argument of .*; did you mean torch_dtype?"),
        ({"torch_dtype": float16, "dtype": float32}, ValueError, "differ; they are the same option, so give only one"),
        ({"torch_dtype": {"a": float16, "b": float32}}, ValueError, "has different dtypes; give one"),
        (
            {"vae": _foreign("diffusers")},
            TypeError,
            "vae is a Module from diffusers, which is not supported; save it with",
        ),
        ({"proxies": {"https": "x"}}, TypeError, "set the environment variable HTTPS_PROXY"),
    ]:
        with pytest.raises(error, match=message):
            load(small_folder, **options)


def _foreign(library):
    return type("Module", (), {"__module__": f"{library}.models"})()


def test_unknown_names():
    import sega_jax.diffusers_api as api

    with pytest.raises(
        ImportError, match="SASolverScheduler is not supported; choose one of DDIMScheduler, PNDMScheduler"
    ):
        _ = api.SASolverScheduler
    with pytest.raises(
        ImportError, match="StableDiffusion3Pipeline has no counterpart in sega_jax; use one of Diffusion"
    ):
        _ = api.StableDiffusion3Pipeline
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        _ = api.magic
    assert {"StableDiffusionXLPipeline", "UniPCMultistepScheduler"} <= set(dir(api))
    with pytest.raises(TypeError, match="create a pipeline with from_pretrained, from_single_file or from_pipe"):
        api.DiffusionPipeline()
    assert issubclass(StableDiffusionXLPipeline, Switches)
    assert all(inspect.getdoc(getattr(Switches, name)) for name in (*WITHOUT_EFFECT, *REFUSED))
