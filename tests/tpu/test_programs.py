"""Compiles small versions of all programs for TPUs, with the compiler that a TPU would use.

The tests also check the compiled programs: float32 arrays are multiplied with float32 precision, and chips that share
the rows of a batch do not communicate.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

pytest.importorskip("libtpu")

from support.topology import TopologyDevices  # isort: skip - it sets variables that JAX reads

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import tiny

import sega_jax
from sega_jax import Edit, sweep
from sega_jax.method.guidance.quantile import SUPPORTS
from sega_jax.method.schedules import from_config
from sega_jax.method.solvers import SOLVERS
from sega_jax.nn import attention
from sega_jax.pipelines.load_options import ATTENTIONS
from sega_jax.systems.registry import systems

pytestmark = pytest.mark.tpu

FOLDERS = {
    "stable_diffusion": lambda folder, scheduler: tiny.checkpoint(
        folder, unet=tiny.UNET_1, vae=tiny.VAE_1, safety=tiny.SAFETY, scheduler=scheduler
    ),
    "sdxl": lambda folder, scheduler: tiny.xl(folder, vae=tiny.VAE_1, scheduler=scheduler),
    "x4_upscaler": lambda folder, _: tiny.upscaler(folder, tiny.X4_UNET_2),
    "deepfloyd_stage_1": lambda folder, _: tiny.stage(folder),
    "deepfloyd_stage_2": lambda folder, _: tiny.stage(folder, tiny.STAGE_2),
    "paella": lambda folder, _: tiny.paella(folder),
}
PICTURE = np.full((8, 8, 3), 0.5)
ARGUMENTS = {"x4_upscaler": {"image": PICTURE}, "deepfloyd_stage_2": {"image": PICTURE}}


class Case(NamedTuple):
    """A pipeline, a call, and the programs of this call to compile."""

    family: str
    programs: tuple[str, ...]
    topology: str
    chips: int = 1
    dtype: str = "bfloat16"
    attention: str = "pallas"
    scheduler: str = "DDIM"
    support: str = "channel"
    options: Mapping[str, Any] = MappingProxyType({})


# The cases together cover every program, family, attention implementation, support, kind of solver and dtype. Each
# program takes seconds to compile.
CASES = {
    "stable diffusion": Case("stable_diffusion", ("encode", "start", "advance", "decode_latents", "check"), "v5e"),
    "float32": Case(
        "stable_diffusion",
        ("encode", "advance", "decode_latents", "encode_image"),
        "v5e",
        dtype="float32",
        scheduler="DPM",
        support="latent",
        options={"image": PICTURE, "guidance_rescale": 0.5},
    ),
    "recording": Case(
        "stable_diffusion",
        ("advance", "recorded_call"),
        "v6e",
        attention="xla",
        scheduler="PNDM, Runge-Kutta",
        support="pixel",
        options={"record": True, "semantics": "per_concept"},
    ),
    "recorded noise": Case(
        "stable_diffusion",
        ("advance",),
        "v5p",
        scheduler="TCD",
        options={"eta": 0.5, "rows_at_once": 1, "record": True, "record_noise": True},
    ),
    "tiles": Case("stable_diffusion", ("decode_latents",), "v6e", options={"tiled": 4}),
    "sdxl": Case("sdxl", ("encode", "advance", "decode"), "v6e", scheduler="Euler"),
    "upscaler": Case("x4_upscaler", ("advance", "decode_latents"), "v5e", attention="xla"),
    "if": Case("deepfloyd_stage_1", ("encode", "advance", "decode"), "v4", dtype="float32"),
    "if, second stage": Case("deepfloyd_stage_2", ("advance",), "v5e"),
    "paella": Case("paella", ("encode", "sample_prior", "start", "advance", "decode"), "v5e", support="position"),
    "eight chips": Case(
        "stable_diffusion", ("start", "advance", "decode_latents", "as_bytes", "check"), "v5e:2x4", 8, support="pixel"
    ),
    "paella on eight chips": Case("paella", ("sample_prior", "advance", "decode"), "v6e:2x4", 8),
}
SCHEDULERS = tiny.SCHEDULERS | tiny.FURTHER
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(-start)?\("


@pytest.fixture(autouse=True)
def _as_users_run_it(optimised, monkeypatch):
    """Restores JAX's default precision, and uses the TPU kernel even for the few keys of small networks.

    Programs for absent devices cannot be read from the cache.
    """
    jax.config.update("jax_default_matmul_precision", None)
    jax.config.update("jax_enable_compilation_cache", False)
    monkeypatch.setattr(attention, "_PALLAS_KEYS", 1)
    yield
    jax.config.update("jax_default_matmul_precision", "float32")
    jax.config.update("jax_enable_compilation_cache", True)


def load(case, folder):
    devices = TopologyDevices(case.topology, case.chips, case.programs)
    source = FOLDERS[case.family](folder, SCHEDULERS[case.scheduler])
    return sega_jax.load(source, devices=devices, dtype=case.dtype, attention=case.attention), devices


def imprecise(lowered):
    """Returns the products and convolutions of float32 arrays that a TPU would compute from bfloat16 parts."""
    return [
        line
        for line in lowered.as_text().splitlines()
        if re.search(r"stablehlo\.(dot_general|convolution)", line)
        and re.search(r"xf32>, tensor<[^>]*xf32>\)", line)
        and not re.search(r"HIGHEST.*HIGHEST", line)
    ]


def collectives(compiled):
    return [match[1] for match in re.finditer(COLLECTIVES, compiled.as_text())]


@pytest.mark.parametrize("name", CASES)
def test_programs_compile(name, tmp_path):
    case = CASES[name]
    pipe, devices = load(case, tmp_path / "checkpoint")
    edits = [Edit("b", warmup=0), Edit("c", warmup=0)]
    arguments = ARGUMENTS.get(case.family, {}) | dict(case.options)
    pipe.compile("a", edits, images_per_prompt=case.chips, support=case.support, **arguments)
    assert sorted(program.name for program in devices.compiled) == sorted(case.programs)
    for program in devices.compiled:
        assert not imprecise(program.lowered)
        assert not collectives(program.compiled)
        uses_kernel = "tpu_custom_call" in program.lowered.as_text()
        assert uses_kernel == (case.attention == "pallas" and attends(case.family, program.name))
        if case.dtype == "float32":
            assert "bf16[" not in program.compiled.as_text()


def attends(family, program):
    """Returns whether a program contains attention with a choice of implementations."""
    autoencoder = ("decode_latents", "encode_image", *(("decode",) if family == "sdxl" else ()))
    return program in ("advance", *autoencoder)


def test_sweeps_compile(tmp_path):
    case = Case("stable_diffusion", ("fork",), "v5e")
    pipe, devices = load(case, tmp_path / "checkpoint")
    ablation = sweep.Sweep(
        model={"source": str(tmp_path / "checkpoint")},
        call={"prompt": "a", "steps": 3},
        edits={"hat": {"warmup": 2, "threshold": 0.5}},
        grid={"hat.scale": [3, 5]},
    )
    plan = sweep.plan(ablation, sweep.Facts.of(ablation), rows=2)
    sweep.run(plan, tmp_path / "sweep", pipe, progress=False)
    assert {program.name for program in devices.compiled} == {"fork"}


def test_the_pure_function_is_precise(tmp_path):
    pipe, _ = load(Case("stable_diffusion", (), "v5e", dtype="float32"), tmp_path / "checkpoint")
    function, arguments = pipe.as_function("a", Edit("b", warmup=0), steps=2)
    assert not imprecise(jax.jit(function).trace(**arguments).lower(lowering_platforms=("tpu",)))


def test_the_cases_cover_everything():
    cases = CASES.values()
    assert {case.family for case in cases} == set(systems())
    assert {case.topology.split(":")[0] for case in cases} >= {"v5e", "v6e"}
    assert {case.topology for case in cases} & {"v4", "v5p"}
    assert {case.attention for case in cases} == set(ATTENTIONS) - {"cudnn"}
    assert {case.support for case in cases} == set(SUPPORTS)
    assert {case.dtype for case in cases} == {"bfloat16", "float32"}
    assert {from_config(SCHEDULERS[case.scheduler]).solver for case in cases} == set(SOLVERS)
    assert {case.options.get("record", False) for case in cases if "advance" in case.programs} == {True, False}
    assert sum(len(case.programs) for case in cases) <= 40


@pytest.mark.parametrize("family", FOLDERS)
def test_no_program_is_missing(family, tmp_path):
    """Every function that a family requests as a program is compiled in a case, for this family or another one."""
    pipe, devices = load(Case(family, (), "v5e"), tmp_path / "checkpoint")
    pipe.compile("a", Edit("b"), record=family != "paella", **ARGUMENTS.get(family, {}))
    covered = {name for case in CASES.values() for name in case.programs}
    assert devices.requested <= covered


def test_collectives_are_found():
    devices = TopologyDevices("v5e:2x4", 8).devices
    rows = NamedSharding(Mesh(np.array(devices), ("rows",)), PartitionSpec("rows"))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=rows)
    compiled = jax.jit(lambda x: x - x.mean(0, keepdims=True), out_shardings=rows).trace(x)
    assert collectives(compiled.lower(lowering_platforms=("tpu",)).compile()) == ["all-reduce"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_the_kernel_compile(dtype):
    devices = TopologyDevices("v5e")
    x = jnp.ones((1, 384, 80), dtype)
    devices.map(gradient, None)(x)
    assert not imprecise(devices.compiled[0].lowered)


def gradient(x):
    def loss(x):
        return attention.attend(x, x, x, heads=2, implementation="pallas").astype(jnp.float32).sum()

    return jax.grad(loss)(x)


@pytest.mark.parametrize(("dtype", "found"), [("float32", 1), ("bfloat16", 0)])
def test_low_precision_is_found(dtype, found):
    x = jax.ShapeDtypeStruct((8, 8), dtype)
    assert len(imprecise(jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=("tpu",)))) == found


def test_the_precision_that_a_user_sets_is_kept():
    devices = TopologyDevices("v5e")
    x = jnp.ones((8, 8))
    with jax.default_matmul_precision("default"):
        devices.map(matmul, None)(x)
    assert imprecise(devices.compiled[0].lowered)


def matmul(x):
    return x @ x
