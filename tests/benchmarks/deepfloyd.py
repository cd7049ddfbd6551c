"""How much time and memory does a stage of DeepFloyd-IF need at full size, and how close is the time to the floor?

The stages are IF-I-XL (64x64), IF-II-L (256x256) and the x4 upscaler (1024x1024). They have random weights, and random
embeddings replace the output of a text encoder. The default is one concept. The floor is the time that the arithmetic
(all branches at every step, and decoding) would take at the device's highest rate for bfloat16 matrix products (the
ceiling). Run this from the root of the repository:

    python tests/benchmarks/deepfloyd.py --stage stage1 --steps 50 --concepts 1 --batch 1 --repeat 5

`--tiny` tests the script itself with a small network that runs on any CPU; ignore the timings.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from weights import filled

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny
from support.published import IF_1_XL, IF_2_L, SD_2, X4, X4_VAE

from sega_jax import Edit, Pipeline
from sega_jax.method import schedules
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import deepfloyd, upscaler
from sega_jax.systems.base import System
from sega_jax.systems.low_res import LowResNoise, Upscaling


class Stage(NamedTuple):
    system: System
    models: Any  # networks whose parameters have shapes but no values
    scheduler: dict[str, Any]
    noising: dict[str, Any] | None
    small: int | None  # side of the input picture, in pixels
    tflop: float  # TFLOP per branch and step
    decoding: float = 0  # TFLOP to decode one picture


def described(name: str, attention: str, *, small: bool) -> Stage:
    if name == "stage1":
        models = deepfloyd.Models.build(None, tiny.STAGE_1 if small else IF_1_XL, attention)
        return Stage(deepfloyd.STAGE_1, models, tiny.IF_SCHEDULER, None, None, 2.879)
    if name == "stage2":
        models = deepfloyd.Models.build(None, tiny.STAGE_2 if small else IF_2_L, attention)
        return Stage(deepfloyd.STAGE_2, models, tiny.IF_SCHEDULER, tiny.COSINE, 8 if small else 64, 3.09)
    configs = (tiny.X4["text"], tiny.X4["unet"], tiny.X4["vae"]) if small else (SD_2["text_encoder"], X4, X4_VAE)
    models, noising = upscaler.Models.build(*configs, attention), tiny.COSINE | {"beta_schedule": "scaled_linear"}
    return Stage(upscaler.SYSTEM, models, tiny.X4_SCHEDULER, noising, 8 if small else 256, 4.53, 19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("steps", 50), ("concepts", 1), ("batch", 1), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stage", default="stage1", choices=["stage1", "stage2", "upscaler"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="cudnn", choices=["xla", "cudnn", "pallas"])
    parser.add_argument("--ceiling", type=float, default=796.0, help="the rate for matrix products, in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()

    devices = Devices(jax.local_devices()[:1])
    began = time.perf_counter()
    stage = described(args.stage, "xla" if args.tiny else args.attention, small=args.tiny)
    models = filled(stage.models, args.dtype, devices)
    jax.block_until_ready(models)
    placed = time.perf_counter() - began
    parameters = sum(leaf.size for leaf in jax.tree.leaves(models))
    extras = None
    if stage.noising is not None:
        noising = schedules.from_config({"_class_name": "DDPMScheduler", **stage.noising})
        extras = Upscaling(LowResNoise(noising, 350))
    scheduler = schedules.from_config(stage.scheduler)
    pipe = Pipeline(stage.system, models, None, scheduler, devices, extras=extras)

    rng = np.random.default_rng(0)
    width = models.unet.config.encoder_hid_dim or models.unet.config.cross_attention_dim
    words = [rng.standard_normal((77, width), np.float32) for _ in range(2 + args.concepts)]
    small = {"image": rng.random((stage.small, stage.small, 3), np.float32)} if stage.small else {}
    edits = [Edit(word, threshold=0.95) for word in words[2:]]

    def call(seed: int) -> float:
        began = time.perf_counter()
        rows = {"images_per_prompt": args.batch, "steps": args.steps, "seed": seed}
        out = pipe(words[0], edits, negative_prompt=words[1], **rows, **small, output="uint8", progress=False)
        assert out.finite.all()
        return time.perf_counter() - began

    first = call(0)
    seconds = [call(i) for i in range(1, 1 + args.repeat)]
    median = statistics.median(seconds)
    floor = (stage.tflop * (2 + args.concepts) * args.steps + stage.decoding) * args.batch / args.ceiling
    peak = (devices.devices[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
    results = {
        "device": devices.devices[0].device_kind,
        "jax": jax.__version__,
        "parameters": parameters,
        **{name: value for name, value in vars(args).items() if name not in ("json", "repeat")},
        "placed": placed,
        "first": first,
        "seconds": seconds,
        "floor": floor,
        "share_of_floor": floor / median,
        "peak_gib": peak,
    }
    print(f"{results['device']}, jax {results['jax']}, {parameters:,} parameters, {vars(args)}")
    print(f"weights placed     {placed:8.2f} s")
    print(f"first call         {first:8.2f} s, of which compiling about {first - median:.2f} s")
    print(f"later calls        {median:8.3f} s (median; {min(seconds):.3f} to {max(seconds):.3f})")
    print(f"floor              {floor:8.3f} s, {floor / median:.1%} of the time")
    print(f"peak memory        {peak:8.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
