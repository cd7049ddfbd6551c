"""Do two checkouts of the library give the same results?

    python tests/benchmarks/same_results.py BASE [HEAD] [--record FILE]

BASE and HEAD are the folders of two checkouts; HEAD defaults to the checkout that contains this script. Both checkouts
run the same calls, each in its own process. The calls cover the demo model, small random checkpoints of every family, a
sweep, the diffusers-style pipelines and two devices. They use only the public API, so they run before and after a
refactoring. The script prints a line for every array that the calls return. It exits with status 1 if a call fails, or
if an array is missing, has a different shape or dtype, or has a relative L2 error of 1e-6 or more.

`--record FILE` saves BASE's arrays in an .npz file and reads them from this file next time, instead of running BASE
again. The file is replaced when BASE, this script, an installed package or the machine has changed.

The script runs on CPUs and takes about two minutes on two idle cores.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

if __name__ != "__main__":
    # The main process does not import the library, because the installed version may be broken.
    import sega_jax
    from sega_jax import Edit, sweep

TOLERANCE = 1e-6
HERE = Path(__file__).resolve()
# Each program runs only a few times, so most of XLA's optimisations are turned off. BASE and HEAD share a compilation
# cache, which saves time for programs that both use.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=1"
    " --xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "HF_HUB_OFFLINE": "1",
}

Results = Iterator[tuple[str, Any]]
# {name: call}. Each call takes the folder that contains the checkpoints, and yields (name, value) pairs. A value is an
# array, a list of pictures or the output of a pipeline.
CALLS: dict[str, Callable[[Path], Results]] = {}

TWO = ["a cat", "a dog"]
# The arguments for a call of a diffusers pipeline with two edits.
EDITING = {
    "editing_prompt": ["hat", "bow"],
    "edit_guidance_scale": [6, 4],
    "reverse_editing_direction": [False, True],
    "edit_threshold": [0.6, 0.5],
    "edit_warmup_steps": [0, 1],
    "edit_cooldown_steps": [None, 3],
    "edit_momentum_scale": 0.3,
    "edit_mom_beta": 0.6,
    "num_inference_steps": 4,
    "seed": 7,
    "return_guidance": True,
}
# The names of the arrays in an output (except the pictures) and in a record.
OUTPUT = ("flagged", "sem_guidance", "uncond_estimates", "text_estimates", "edit_estimates")
RECORD = ("sem_guidance", "uncond", "cond", "edits")
LORA_LAYERS = {
    "unet": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.1.conv1"],
    "text_encoder": ["encoder.layers.0.self_attn.v_proj"],
}


def call(name: str) -> Callable:
    """Adds a function to `CALLS`."""

    def add(function: Callable[[Path], Results]) -> Callable[[Path], Results]:
        CALLS[name] = function
        return function

    return add


# The checkpoints


def write_checkpoints(folder: Path) -> None:
    """Writes all checkpoints. It runs in a process that has BASE and BASE/tests on the import path."""
    from support import tiny

    tiny.checkpoint(folder / "one", unet=tiny.UNET_1)
    tiny.checkpoint(folder / "checked", unet=tiny.UNET_1, safety=tiny.SAFETY)
    tiny.checkpoint(folder / "two", unet=tiny.UNET_2, text=tiny.TEXT_2)
    unet = tiny.UNET_XL | {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
    }
    tiny.xl(folder / "xl", unet=unet)
    tiny.stage(folder / "stage1")
    tiny.stage(folder / "stage2", tiny.STAGE_2)
    tiny.upscaler(folder / "upscaler")
    tiny.paella(folder / "paella")
    tiny.paella(folder / "paella without prior", without=("prior",))
    save_file(tiny.original(unet=tiny.UNET_1), folder / "single.safetensors")

    rng, lora = np.random.default_rng(0), {}
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = load_file(folder / "one" / part / f"{file}.safetensors")
        prefix = "text_model." if part == "text_encoder" else ""
        for layer in LORA_LAYERS[part]:
            outputs, *inputs = weights[f"{layer}.weight"].shape
            for matrix, shape in (("A", (2, *inputs)), ("B", (outputs, 2, *[1] * len(inputs[1:])))):
                lora[f"{part}.{prefix}{layer}.lora_{matrix}.weight"] = rng.standard_normal(shape, np.float32)
    save_file(lora, folder / "lora.safetensors")
    save_file({"<toy>": rng.standard_normal((2, 16), np.float32)}, folder / "word.safetensors")


def noise(*shape: int) -> np.ndarray:
    """Returns the same normal noise on every call."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def picture(height: int, width: int) -> np.ndarray:
    """Returns the same random picture on every call."""
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


# The calls


def hat(**settings: Any) -> Any:
    """Returns an edit that adds a concept at every call."""
    return Edit("hat", **{"scale": 6, "threshold": 0.6, "warmup": 0} | settings)


def no_bow(**settings: Any) -> Any:
    """Returns an edit that removes a concept at some calls and has its own momentum settings."""
    others = {"warmup": 1, "cooldown": 3, "momentum_scale": 0.3, "momentum_beta": 0.6}
    return Edit("bow", **{"scale": -4, "threshold": 0.5} | others | settings)


@cache
def demo_model() -> Any:
    """Loads the demo model."""
    return sega_jax.load(devices=jax.local_devices()[:1])


@cache
def small_model(folder: Path) -> Any:
    """Loads a Stable Diffusion checkpoint whose UNet has one level."""
    return sega_jax.load(folder / "one", devices=jax.local_devices()[:1])


def load(folder: Path, name: str, **options: Any) -> Any:
    """Loads a checkpoint for one device."""
    return sega_jax.load(folder / name, devices=small_model(folder).devices, **options)


@call("demo")
def demo(folder: Path) -> Results:
    options = {"steps": 6, "guidance_scale": 4.0, "seed": 5}
    edits = [Edit("glasses", threshold=0.7, warmup=1), Edit("beard", scale=-5, warmup=2, cooldown=5)]
    yield "no edits", demo_model()("a portrait of a woman", **options, output="float")
    prompt = "a portrait of a man with a beard"
    yield "edits", demo_model()(prompt, edits, **options, output="float")
    yield "edits, latents", demo_model()(prompt, edits, **options, output="latent")


@call("recordings and replay")
def recordings(folder: Path) -> Results:
    pipe, options = small_model(folder), {"steps": 4, "seed": 2, "output": "latent"}
    yield "no edits", pipe(TWO, **options, record=True)
    recorded = pipe(TWO, [hat(), no_bow()], **options, record=True)
    yield "edits", recorded
    sega_jax.save_guidance(folder / "hat.safetensors", recorded.record.sem_guidance)
    guidance = sega_jax.load_guidance(folder / "hat.safetensors")
    (folder / "hat.safetensors").unlink()
    yield "saved", guidance
    yield "replay", pipe("a house", replay=0.7 * guidance[:1], **options)
    yield "replay and edit", pipe(["a house", "a bus"], hat(), replay=guidance, **options)


@call("semantics and supports")
def semantics(folder: Path) -> Results:
    for semantics in ("diffusers", "per_concept"):
        for support in ("channel", "latent", "pixel", "position"):
            if (semantics, support) != ("diffusers", "channel"):
                options = {"semantics": semantics, "support": support, "steps": 4, "output": "latent"}
                yield f"{semantics}, {support}", small_model(folder)("a cat", [hat(), no_bow()], **options)


@call("batches")
def batches(folder: Path) -> Results:
    rows = [[hat()], [], [no_bow(), Edit("sun", weight=2, warmup=2)]]
    options = {"negative_prompt": ["bad", "", "worse"], "guidance_scale": [3, 5, 7.5], "seed": [3, 48, 48], "steps": 4}
    prompts = ["a cat", "a castle", "a dog"]
    yield "three rows", small_model(folder)(prompts, rows, **options)
    yield "safety checker", load(folder, "checked")(prompts, rows, **options, output="float")
    yield "key", small_model(folder)(TWO, hat(), key=jax.random.key(3), steps=3, output="latent")
    options = {"images_per_prompt": 2, "latents": noise(4, 12, 8, 4), "height": 24, "width": 16, "steps": 3}
    yield "latents", small_model(folder)(TWO, hat(), **options, rows_at_once=2, output="uint8")
    yield "tiles", small_model(folder)("a cat", steps=2, height=32, width=32, tiled=True, output="float")


@call("schedulers")
def schedulers(folder: Path) -> Results:
    pipe, options = load(folder, "one"), {"edits": [hat(), no_bow()], "seed": 4, "output": "latent"}
    yield "DDIM", pipe("a cat", **options, steps=5, eta=0.6)
    for name in ("PNDM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "DDPM"):
        pipe.scheduler = f"{name}Scheduler"
        yield name, pipe("a cat", **options, steps=5)
    yield "timesteps", pipe("a cat", **options, steps=[900, 700, 500, 200])
    pipe.scheduler = {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}
    yield "UniPC, Karras sigmas", pipe("a cat", **options, steps=5)


@call("from a picture")
def from_picture(folder: Path) -> Results:
    pipe, options = load(folder, "one"), {"image": picture(16, 16), "strength": 0.6, "seed": 1, "output": "float"}
    yield "DDIM", pipe("a cat", hat(), **options, steps=5)
    pipe.scheduler = "DPMSolverMultistepScheduler"
    yield "DPM-Solver", pipe("a cat", hat(), **options, steps=5)


@call("guidance_rescale")
def rescaled(folder: Path) -> Results:
    yield "edit", small_model(folder)(TWO, hat(), guidance_rescale=[0.7, 0.2], steps=4, output="latent")


@call("prompts")
def prompts(folder: Path) -> Results:
    pipe, options = small_model(folder), {"steps": 3, "output": "latent"}
    long = "a long story, about a fox and a hen"
    yield "encoded", pipe.encode(TWO)
    yield "embedding", pipe(pipe.encode("a castle")[0], Edit(pipe.encode("snow")[0], warmup=0), **options)
    yield "long", pipe(long, hat(), **options, long_prompts=True)
    yield "weighted", pipe("a (red:1.3) [fox]", Edit("(hat:1.2)", warmup=1), **options, weighted=True)
    options |= {"long_prompts": True, "weighted": True, "negative_prompt": "(a)"}
    yield "long and weighted", pipe(f"({long}:1.4)", hat(), **options)


@call("cool-downs")
def cool_downs(folder: Path) -> Results:
    """Runs calls that switch to precompiled programs for fewer concepts, with and without a callback."""
    pipe, options = load(folder, "one"), {"steps": 5, "output": "latent"}
    edits = [hat(cooldown=2), no_bow(cooldown=4, momentum_scale=0.0, warmup=2)]
    pipe.compile("a cat", edits, **options)
    yield "compiled", pipe("a cat", edits, **options)
    states: list = []
    pipe("a cat", edits, **options, callback=lambda *state: states.append(state), callback_steps=2)
    yield "callback, timesteps", np.array([state[:2] for state in states])
    yield "callback, latents", np.stack([state[2] for state in states])


@call("guidance on arrays")
def guidance_on_arrays(folder: Path) -> Results:
    edits = sega_jax.Edits.stack([[hat(), no_bow()]] * 2)
    guidance = optax.chain(sega_jax.cfg(7.5), sega_jax.sega(edits))
    predictions = [sega_jax.Predictions(*(noise(2, *n, 4, 6, 3) + i for n in ((), (), (2,)))) for i in range(3)]
    state = guidance.init(predictions[0])
    for i, one in enumerate(predictions):
        estimate, state = guidance.update(one.uncond, state, one)
        yield f"call {i}", estimate


@call("Stable Diffusion 2")
def stable_diffusion_2(folder: Path) -> Results:
    pipe = load(folder, "two", prediction_type="v_prediction", scheduler="EulerDiscreteScheduler")
    yield "edits", pipe(TWO, [hat(), no_bow()], negative_prompt="bad", steps=4, output="float")


@call("bfloat16")
def bfloat16(folder: Path) -> Results:
    pipe = load(folder, "one", dtype="bfloat16")
    yield "edits", pipe("a cat", [hat(), no_bow()], steps=4, output="latent", record=True)


@call("files")
def files(folder: Path) -> Results:
    options = {"steps": 3, "output": "latent"}
    pipe = load(folder, "single.safetensors", config=folder / "one")
    yield "single file", pipe("a cat", hat(), **options)
    pipe.models = sega_jax.merge_lora(pipe.models, {folder / "lora.safetensors": 0.8})
    yield "LoRA", pipe("a cat", hat(), **options)
    pipe = load(folder, "one", textual_inversion={"<toy>": folder / "word.safetensors"})
    yield "textual inversion", pipe("a <toy>", Edit("<toy> hat", warmup=0), **options)


@call("x4 upscaler")
def upscaler(folder: Path) -> Results:
    pipe = load(folder, "upscaler")
    yield "edit", pipe("a cat", hat(), image=picture(8, 8), noise_level=30, steps=3, seed=6, output="float")


@call("Stable Diffusion XL")
def xl(folder: Path) -> Results:
    pipe, options = load(folder, "xl"), {"steps": 4, "seed": 3, "output": "float"}
    sizes = {"original_size": (20, 34), "crops_top_left": (3, 5), "target_size": (24, 16)}
    yield "no negative prompt, sizes", pipe("a cat", [hat(), no_bow()], **sizes, **options)
    yield "negative prompt", pipe("a cat", [hat(), no_bow()], negative_prompt="bad", **options, record=True)


@call("DeepFloyd-IF")
def deepfloyd(folder: Path) -> Results:
    options = {"steps": 4, "seed": 8, "output": "float"}
    yield "stage 1", load(folder, "stage1")(TWO, [hat(), no_bow()], **options, record=True)
    yield "stage 2", load(folder, "stage2")(TWO, hat(), image=picture(8, 8), noise_level=100, **options)


@call("cascade")
def cascade(folder: Path) -> Results:
    stages = {name: folder / name for name in ("stage1", "stage2", "upscaler")}
    pipe = sega_jax.load_cascade(**stages, devices=small_model(folder).devices)
    options = {"stage1": {"steps": 4}, "stage2": {"steps": 3, "noise_level": 100}, "upscaler": {"steps": 2}}
    edited = ["stage1", "stage2"]
    out = pipe(TWO, hat(), negative_prompt="bad", edited=edited, seed=[5, 9], **options, output="float")
    yield "pictures", out
    yield from out.stages.items()


@call("Paella")
def paella(folder: Path) -> Results:
    pipe, options = load(folder, "paella"), {"steps": 4, "seed": 3, "output": "tokens"}
    yield "prior", pipe(TWO, [hat(), no_bow()], **options, influence=(1.2, 0.4), record=True)
    yield "argmax", pipe(TWO, [hat(), no_bow()], **options, choice="argmax", support="latent")
    yield "pictures", pipe("a cat", steps=3, output="float")
    pipe = load(folder, "paella without prior")
    yield "no prior", pipe(TWO, [hat(), no_bow()], **options, record=True)


@call("sweep")
def swept(folder: Path) -> Results:
    """Makes eight pictures in a sweep; groups of pictures share the calls before the warm-up ends."""
    axes = {"prompt": TWO, "hat.scale": [2, -5], "hat.warmup": [1, 3]}
    description = sweep.Sweep(
        model={"source": str(folder / "one")}, call={"steps": 5}, edits={"hat": {"threshold": 0.5}}, grid=axes
    )
    plan = sweep.plan(description, sweep.Facts.of(description), rows=4)
    with tempfile.TemporaryDirectory() as where:
        sweep.run(plan, where, small_model(folder), progress=False)
        results = sweep.Results(where)
        rows = sorted(results.rows, key=lambda row: [row[axis] for axis in axes])
        yield "pictures", [results.picture(row) for row in rows]


@call("SemanticStableDiffusionPipeline")
def diffusers_pipeline(folder: Path) -> Results:
    pipe = sega_jax.SemanticStableDiffusionPipeline.from_pipe(small_model(folder))
    yield "edits", pipe(TWO, **EDITING, output_type="np", guidance_rescale=0.3)


@call("SemanticStableDiffusionXLPipeline")
def diffusers_xl_pipeline(folder: Path) -> Results:
    devices = small_model(folder).devices
    pipe = sega_jax.SemanticStableDiffusionXLPipeline.from_pretrained(folder / "xl", devices=devices)
    yield "edits", pipe("a cat", "a dog", **EDITING, negative_prompt="bad", negative_prompt_2="worse", output_type="np")


@call("SemanticIFPipeline")
def diffusers_if_pipeline(folder: Path) -> Results:
    devices = small_model(folder).devices
    pipe = sega_jax.SemanticIFPipeline.from_pretrained(folder / "stage1", devices=devices)
    yield "edits", pipe(["A  Cat!", "a dog"], **EDITING, output_type="np")


@call("SemanticPaellaPipeline")
def diffusers_paella_pipeline(folder: Path) -> Results:
    devices = small_model(folder).devices
    pipe = sega_jax.SemanticPaellaPipeline.from_pretrained(folder / "paella without prior", devices=devices)
    yield "edits", pipe(TWO, **EDITING, output_type="latent")


@call("two devices")
def two_devices(folder: Path) -> Results:
    devices = jax.local_devices()
    assert len(devices) == 2, devices
    pipe = sega_jax.load(folder / "one", devices=devices)
    yield "three rows", pipe(["a cat", "a dog", "a bus"], [hat(), no_bow()], steps=4, seed=[1, 5, 2], output="float")


# Recording and comparing


def arrays(value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) for every array in a value that a call yields. An output's pictures have an empty name."""
    images = getattr(value, "images", value)
    if isinstance(images, list):
        images = np.stack([np.asarray(image) for image in images])
    leaves = jax.tree.leaves(images)
    yield from ((f"{i}" if len(leaves) > 1 else "", np.asarray(leaf)) for i, leaf in enumerate(leaves))
    record = getattr(value, "record", None)
    for source, name in [*((value, name) for name in OUTPUT), *((record, name) for name in RECORD)]:
        if getattr(source, name, None) is not None:
            yield name, np.asarray(getattr(source, name))


def run_calls(folder: Path, file: Path, checkout: Path) -> None:
    """Runs all calls and writes their arrays to a file, in a process that has the checkout on the import path."""
    source = Path(sega_jax.__file__).resolve()
    assert source.is_relative_to(checkout), f"{source} is imported instead of {checkout}"
    results, failed = {}, []
    for name, function in CALLS.items():
        began = time.perf_counter()
        try:
            for part, value in function(folder):
                for leaf, array in arrays(value):
                    full = f"{name}: {part}, {leaf}".removesuffix(", ")
                    if not (np.all(getattr(value, "finite", True)) and np.isfinite(array).all()):
                        raise ValueError(f"{full} is not finite, so a comparison would prove nothing")
                    results[full] = array
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"  {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    np.savez(file, **results)
    if failed:
        sys.exit(f"{len(failed)} of {len(CALLS)} calls failed: {', '.join(failed)}")


def process(checkout: Path, folder: Path, function: str, *arguments: Path, tests: bool = False) -> bool:
    """Runs a function of this script in a process that imports a checkout, and returns whether it succeeded."""
    places = [checkout, *([checkout / "tests"] if tests else []), HERE.parent]
    environment = os.environ | ENVIRONMENT
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, places)), "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    paths = ", ".join(f"Path({str(path)!r})" for path in arguments)
    code = f"from pathlib import Path; import same_results; same_results.{function}({paths})"
    # -P keeps the working directory, which may be another checkout, off the import path.
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment).returncode == 0


def state_of(checkout: Path) -> str:
    """Returns a digest of everything that BASE's arrays depend on."""
    digest = hashlib.sha256(HERE.read_bytes())
    for path in sorted([checkout / "tests" / "support" / "tiny.py", *(checkout / "sega_jax").rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(checkout)).encode() + path.read_bytes())
    packages = sorted(f"{one.name} {one.version}" for one in importlib.metadata.distributions())
    digest.update(json.dumps([packages, platform.platform(), platform.node(), os.cpu_count()]).encode())
    return digest.hexdigest()


def read(file: Path) -> dict[str, np.ndarray]:
    """Returns {name: array} for the arrays in an .npz file."""
    with np.load(file) as content:
        return dict(content)


def difference(base: np.ndarray | None, head: np.ndarray | None) -> tuple[str, bool]:
    """Describes how two arrays differ, and returns whether the difference is tolerated."""
    if base is None or head is None:
        return f"missing in {'BASE' if base is None else 'HEAD'}", False
    if (base.shape, base.dtype) != (head.shape, head.dtype):
        return f"HEAD has {head.dtype} {head.shape}", False
    if base.tobytes() == head.tobytes():
        return "bit-identical", True
    base, head = base.astype(np.float64), head.astype(np.float64)
    relative = np.linalg.norm(head - base) / max(np.linalg.norm(base), np.finfo(np.float64).tiny)
    return f"relative L2 {relative:.1e}", bool(relative < TOLERANCE)


def compare(base: dict[str, np.ndarray], head: dict[str, np.ndarray]) -> bool:
    """Prints a table and returns whether all differences are tolerated."""
    names = list(dict.fromkeys([*base, *head]))
    width, equal, wrong = max(map(len, names)), 0, 0
    for name in names:
        one = base[name] if name in base else head[name]
        text, tolerated = difference(base.get(name), head.get(name))
        print(f"{name:{width}}  {one.shape!s:24}  {one.dtype!s:8}  {text}{'' if tolerated else '  <--'}")
        equal, wrong = equal + (text == "bit-identical"), wrong + (not tolerated)
    print(f"{len(names)} arrays of {len(CALLS)} calls: {equal} bit-identical, {wrong} differ or are missing")
    return not wrong


@click.command()
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("head", type=click.Path(exists=True, file_okay=False, path_type=Path), default=HERE.parents[2])
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), help="Keep BASE's arrays in this .npz file.")
def main(base: Path, head: Path, record: Path | None) -> None:
    """Compares the results of two checkouts."""
    if record is not None and record.suffix != ".npz":
        raise click.BadParameter(f"{record} should end in .npz", param_hint="--record")
    base, head, succeeded, results = base.resolve(), head.resolve(), True, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not process(base, folder, "write_checkpoints", folder, tests=True):
            sys.exit("the checkpoints could not be written")
        state = state_of(base)
        if record is not None and record.exists():
            known = read(record)
            if str(known.pop("state", "")) == state:
                print(f"BASE: read from {record}", file=sys.stderr)
                results["BASE"] = known
        for side, checkout in (("BASE", base), ("HEAD", head)):
            if side not in results:
                print(f"{side}: {checkout}", file=sys.stderr, flush=True)
                file = folder / f"{side}.npz"
                passed = process(checkout, folder, "run_calls", folder, file, checkout)
                succeeded = succeeded and passed
                results[side] = read(file) if file.exists() else {}
                if side == "BASE" and passed and record is not None:
                    np.savez(record, state=np.array(state), **results[side])
    for side, side_results in results.items():
        if not side_results:
            sys.exit(f"{side} gave no results; the errors of its calls are above")
    same = compare(results["BASE"], results["HEAD"])
    sys.exit(0 if same and succeeded else 1)


if __name__ == "__main__":
    main()
