"""How much time and memory does Paella need at full size, and how close is the time to the floor?

The model has the published architecture (1.0 billion parameters) and random weights, and makes pictures of 256x256
pixels in 32 steps. Random arrays replace the outputs of ByT5 and CLIP, so only the denoiser and the VQGAN run. The
default is one concept. The floor is the time that the branches' arithmetic would take at the device's highest rate for
bfloat16 matrix products (the ceiling). Each branch needs 0.52 TFLOP per step, and more for longer texts. The script
also prints the temporary memory of the compiled program. Run it from the root of the repository, with PYTHONPATH=. if
the library is not installed:

    python tests/benchmarks/paella.py --concepts 1 --batch 1 --repeat 5

`--tiny` tests the script itself with a small network that has the same vocabulary and runs on any CPU; ignore the
timings.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from weights import filled

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny

from sega_jax import Edit, Edits, PaellaText, Pipeline
from sega_jax.method.schedules.tokens import renoising
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import paella, programs
from sega_jax.systems.base import Settings, Static

TFLOP = 0.52  # per branch and step, with 64 bytes of text and CLIP's tokens
SMALL = {"denoiser": tiny.PAELLA_PARTS["denoiser"] | {"num_labels": 8192, "sample_size": 64}}
SMALL["vqgan"] = tiny.PAELLA_PARTS["vqgan"] | {"codebook_size": 8192}


def temporary(models: paella.Models, rows: int, n: int) -> float:
    """Returns the temporary memory in GiB that the guided loop needs in addition to its arguments."""
    net, shape = models.denoiser, (64, 64, models.denoiser.config.num_labels)
    float32, one, sampler = np.float32, jax.ShapeDtypeStruct, paella.SYSTEM.sampler
    edits = Edits.stack([[Edit("a")] * n] * rows)
    influence = paella.PaellaSettings(np.ones((rows, 2), float32))
    settings = Settings(jax.random.split(jax.random.key(0), rows), np.ones(rows, float32), edits, own=influence)
    states = one((rows, 2 + n, 64, net.config.byt5_embd), net.byt5_mapper.kernel.dtype)
    text = PaellaText(states, one(states.shape[:3], bool), None, one(states.shape[:2], bool))
    static = {"sampler": sampler, "static": Static(own=paella.PaellaStatic())}
    first = partial(programs.start, x=None, scale=1, shape=shape, dtype=float32, **static)
    table = jax.tree.map(lambda column: np.float32(column) if column.dtype == float else column, renoising(64))
    program = jax.jit(partial(programs.advance, **static))
    lowered = program.lower(sampler.networks(models), text, jax.eval_shape(first, settings), table, settings)
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("steps", 32), ("concepts", 1), ("batch", 1), ("repeat", 5), ("bytes", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--support", default="channel")
    parser.add_argument("--ceiling", type=float, default=796.0, help="the rate for matrix products, in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()

    devices = Devices(jax.local_devices()[:1])
    configs = SMALL if args.tiny else {"denoiser": {}, "vqgan": {}}
    began = time.perf_counter()
    models = filled(paella.Models.build(None, None, None, **configs), args.dtype, devices)
    jax.block_until_ready(models)
    placed = time.perf_counter() - began
    parameters = sum(leaf.size for leaf in jax.tree.leaves(models.denoiser))
    pipe = Pipeline(paella.SYSTEM, models, None, None, devices)

    rng = np.random.default_rng(0)
    width = models.denoiser.config.byt5_embd
    lengths = [1, *[args.bytes] * (1 + args.concepts)]
    negative, prompt, *concepts = (rng.standard_normal((length, width), np.float32) for length in lengths)
    edits = [Edit(concept, warmup=3) for concept in concepts]

    def call(seed: int) -> float:
        began = time.perf_counter()
        rows = {"images_per_prompt": args.batch, "steps": args.steps, "seed": seed, "support": args.support}
        out = pipe(prompt, edits, negative_prompt=negative, **rows, output="uint8", progress=False)
        assert out.finite.all()
        assert out.images.shape[1:] == (256, 256, 3)
        return time.perf_counter() - began

    first = call(0)
    seconds = [call(i) for i in range(1, 1 + args.repeat)]
    median = statistics.median(seconds)
    floor = TFLOP * (2 + args.concepts) * args.steps * args.batch / args.ceiling
    peak = (devices.devices[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
    temporary_gib = temporary(models, args.batch, args.concepts)
    results = {
        "device": devices.devices[0].device_kind,
        "jax": jax.__version__,
        "parameters": parameters,
        **{name: value for name, value in vars(args).items() if name != "json"},
        "placed": placed,
        "first": first,
        "seconds": seconds,
        "floor": floor,
        "share_of_floor": floor / median,
        "peak_gib": peak,
        "temporary_gib": temporary_gib,
    }
    print(f"{results['device']}, jax {results['jax']}, {parameters:,} parameters, {vars(args)}")
    print(f"weights placed     {placed:8.2f} s")
    print(f"first call         {first:8.2f} s, of which compiling about {first - median:.2f} s")
    print(f"later calls        {median:8.3f} s (median; {min(seconds):.3f} to {max(seconds):.3f})")
    print(f"floor              {floor:8.3f} s, {floor / median:.1%} of the time")
    print(f"peak memory        {peak:8.2f} GiB")
    print(f"the guided loop    {temporary_gib:8.2f} GiB in addition to its arguments")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
