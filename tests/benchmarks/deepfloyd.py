"""How long does DeepFloyd-IF's first stage take at full size, how much memory, and how far is it from the floor?

IF-I-XL's architecture (4.3 billion parameters) at 64x64 with random weights and embeddings in place of T5, one concept
by default. The floor is the arithmetic of its branches, 2.879 TFLOP each at every step, at the ceiling of bfloat16
matrix products. Run from the repository's root:

    python tests/benchmarks/deepfloyd.py --steps 50 --concepts 1 --batch 1 --repeat 5
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from weights import filled

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from published import IF_1_XL

from sega_jax import Edit, Pipeline, schedules
from sega_jax.parallel import Devices
from sega_jax.systems.deepfloyd import Models

TFLOP = 2.879  # a branch and step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("steps", 50), ("concepts", 1), ("batch", 1), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="cudnn", choices=["xla", "cudnn"])
    parser.add_argument("--ceiling", type=float, default=796.0, help="TFLOP/s of matrix products")
    parser.add_argument("--json", type=Path, help="where the measurements go")
    args = parser.parse_args()

    devices = Devices(jax.local_devices()[:1])
    began = time.perf_counter()
    models = filled(Models.build(None, IF_1_XL, attention=args.attention), args.dtype, devices)
    jax.block_until_ready(models)
    placed = time.perf_counter() - began
    parameters = sum(leaf.size for leaf in jax.tree.leaves(models))
    pipe = Pipeline(models, None, schedules.from_config(tiny.IF_SCHEDULER), devices)

    rng = np.random.default_rng(0)
    words = [
        rng.standard_normal((77, models.unet.config.encoder_hid_dim), np.float32) for _ in range(2 + args.concepts)
    ]
    edits = [Edit(word, threshold=0.95) for word in words[2:]]

    def call(seed: int) -> float:
        began = time.perf_counter()
        rows = {"images_per_prompt": args.batch, "steps": args.steps, "seed": seed}
        out = pipe(words[0], edits, negative_prompt=words[1], **rows, output="uint8", progress=False)
        assert out.finite.all()
        return time.perf_counter() - began

    first = call(0)
    seconds = [call(i) for i in range(1, 1 + args.repeat)]
    median = statistics.median(seconds)
    floor = TFLOP * (2 + args.concepts) * args.steps * args.batch / args.ceiling
    peak = (devices.devices[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
    found = {
        "device": devices.devices[0].device_kind,
        "jax": jax.__version__,
        "parameters": parameters,
        **{name: getattr(args, name) for name in ("steps", "concepts", "batch", "dtype", "attention", "ceiling")},
        "placed": placed,
        "first": first,
        "seconds": seconds,
        "floor": floor,
        "share_of_floor": floor / median,
        "peak_gib": peak,
    }
    print(f"{found['device']}, jax {found['jax']}, {parameters:,} parameters, {vars(args)}")
    print(f"weights placed     {placed:8.2f} s")
    print(f"first call         {first:8.2f} s, of which compiling about {first - median:.2f} s")
    print(f"later calls        {median:8.3f} s (median; {min(seconds):.3f} to {max(seconds):.3f})")
    print(f"floor              {floor:8.3f} s, {floor / median:.1%} of the time")
    print(f"peak memory        {peak:8.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
