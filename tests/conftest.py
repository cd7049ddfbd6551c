"""Fixtures, and settings for all tests: strict dtype and rank promotion, and eight virtual devices on the CPU."""

import gc
import os

# Tests run each program only a few times, so optimising it, splitting its compilation among threads, or using the newer
# emitters for fused loops would cost more time than it saves. JAX reads these variables when it is imported.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
).strip()

from functools import cache
from pathlib import Path

import jax
import pytest
from reference import cases
from support import tiny
from support.hub_cache import fill

import sega_jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")


def pytest_ignore_collect(collection_path, config):
    """Ignores tests/parity, whose files import torch, and tests/tpu, whose files need libtpu, unless an argument names
    the folder or `-m` selects it."""
    is_special = collection_path.parent == Path(__file__).parent and collection_path.name in ("parity", "tpu")
    return True if is_special and collection_path.name not in config.option.markexpr else None


@pytest.fixture(scope="module", autouse=True)
def _collect_only_new_objects():
    """Keeps the garbage collector from going through imported modules, tests and compiled programs again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def one_device():
    """Returns a list that contains the first of the eight devices."""
    return jax.local_devices()[:1]


@pytest.fixture(scope="module")
def one_by_default(one_device):
    """Makes pipelines use one device by default, as on most machines, so that they can share compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda *_, **__: one_device)
        yield


@pytest.fixture(scope="module")
def optimised():
    """Turns XLA's optimisations on for tests whose programs run often or make many pictures."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Caches compiled programs on disk, so that each program is compiled once for all tests and processes of a run. The
    variable SEGA_JAX_TEST_CACHE names a folder in which several runs share their programs.
    """
    run = tmp_path_factory.getbasetemp()
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    jax.config.update("jax_compilation_cache_dir", os.environ.get("SEGA_JAX_TEST_CACHE") or str(run / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Returns the folder of a small Stable Diffusion checkpoint with DDIM."""
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def pipe(folder, one_device):
    """Returns the pipeline loaded from `folder`, in float32 on one device."""
    return sega_jax.load(folder, devices=one_device)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """Returns the folder of a checkpoint whose UNet has one level."""
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoints") / "small", unet=tiny.UNET_1)


@pytest.fixture(scope="session")
def small(small_folder, one_device):
    """Returns the pipeline loaded from `small_folder`."""
    return sega_jax.load(small_folder, devices=one_device)


@pytest.fixture(scope="session")
def least_folder(tmp_path_factory):
    """Returns the folder of a checkpoint with the smallest networks, for tests that compile many programs."""
    text = tiny.TEXT | {"num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("checkpoints") / "least"
    return tiny.checkpoint(folder, unet=tiny.UNET_0, vae=tiny.VAE_1, text=text)


@pytest.fixture(scope="session")
def least(least_folder, one_device):
    """Returns the pipeline loaded from `least_folder`."""
    return sega_jax.load(least_folder, devices=one_device)


@pytest.fixture(scope="session")
def least_xl_folder(tmp_path_factory):
    """Returns the folder of an SDXL checkpoint with the smallest networks."""
    levels = ("block_out_channels", "down_block_types", "up_block_types")
    unet = tiny.UNET_XL | {name: tiny.UNET_0[name] for name in levels}
    unet |= {"attention_head_dim": 2, "transformer_layers_per_block": 1}
    return tiny.xl(tmp_path_factory.mktemp("checkpoints") / "xl", unet=unet, vae=tiny.VAE_1)


@pytest.fixture(scope="session")
def least_xl(least_xl_folder, one_device):
    """Returns the pipeline loaded from `least_xl_folder`."""
    return sega_jax.load(least_xl_folder, devices=one_device)


@pytest.fixture(scope="session")
def paella_folder(tmp_path_factory):
    """Returns the folder of a small Paella checkpoint."""
    return tiny.paella(tmp_path_factory.mktemp("checkpoints") / "paella")


@pytest.fixture(scope="session")
def paella(paella_folder, one_device):
    """Returns the pipeline loaded from `paella_folder`."""
    return sega_jax.load(paella_folder, devices=one_device)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """Returns {name: folder} for both DeepFloyd-IF stages (the second has no text encoder) and the x4 upscaler."""
    folder = tmp_path_factory.mktemp("stages")
    return {
        "stage1": tiny.stage(folder / "1"),
        "stage2": tiny.stage(folder / "2", tiny.STAGE_2, text=None),
        "upscaler": tiny.upscaler(folder / "x4", tiny.X4_UNET_2),
    }


@pytest.fixture(scope="session")
def first(stages, one_device):
    """Returns a pipeline with DeepFloyd-IF's first stage."""
    return sega_jax.load(stages["stage1"], devices=one_device)


@pytest.fixture(scope="session")
def second(stages, first):
    """Returns a pipeline with DeepFloyd-IF's second stage and the text encoder of the first stage."""
    text = {"text_encoder": first.models.text_encoder, "tokenizer": first.tokenizer}
    return sega_jax.load(stages["stage2"], devices=first.devices, **text)


@pytest.fixture(scope="session")
def upscaler(stages, first):
    """Returns a pipeline with the x4 upscaler."""
    return sega_jax.load(stages["upscaler"], devices=first.devices)


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory):
    """Returns a Hugging Face home folder whose cache contains tiny checkpoints under the names of published ones."""
    return fill(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub_cache(hub_folder, monkeypatch):
    """Lets a test's child processes load the checkpoints in `hub_folder` without a network connection."""
    monkeypatch.setenv("HF_HOME", str(hub_folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):  # they take precedence over HF_HOME
        monkeypatch.delenv(name, raising=False)
    return hub_folder


@pytest.fixture(scope="session")
def recorded_pipe(tmp_path_factory, one_device):
    """Returns a function that loads a pipeline from a recorded checkpoint, given its name in `reference/cases.py`."""

    @cache
    def load(name):
        folder = tmp_path_factory.mktemp("checkpoint") / name
        settings = (cases.CHECKPOINTS | cases.CHECKED)[name]
        return sega_jax.load(tiny.checkpoint(folder, **settings), devices=one_device)

    return load


@pytest.fixture
def compilations():
    """Yields a list that grows by one entry whenever XLA compiles a program or reads one from the cache on disk."""
    built = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            built.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield built
    jax.monitoring.unregister_event_duration_listener(listen)
