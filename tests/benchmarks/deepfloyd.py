"""How long does a stage of DeepFloyd-IF take at full size, how much memory, and how far is it from the floor?

The architectures of IF-I-XL (64x64), IF-II-L (256x256) and the x4 upscaler (1024x1024) with random weights, and
embeddings in place of the text encoder; one concept by default. The floor is the arithmetic of the branches at every
step, and of decoding, at the ceiling of bfloat16 matrix products. Run from the repository's root:

    python tests/benchmarks/deepfloyd.py --stage stage1 --steps 50 --concepts 1 --batch 1 --repeat 5
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

import tiny
from published import IF_1_XL, IF_2_L, SD_2, X4, X4_VAE

from sega_jax import Edit, Pipeline
from sega_jax.method import schedules
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.images import Noising
from sega_jax.systems import deepfloyd, stable_diffusion


class Stage(NamedTuple):
    models: Any  # without values
    scheduler: dict[str, Any]
    noising: dict[str, Any] | None
    small: int | None  # pixels along a side of what it enlarges
    tflop: float  # of a branch and step
    decoding: float = 0  # TFLOP a picture


def described(name: str, attention: str) -> Stage:
    if name == "stage1":
        return Stage(deepfloyd.Models.build(None, IF_1_XL, attention), tiny.IF_SCHEDULER, None, None, 2.879)
    if name == "stage2":
        return Stage(deepfloyd.Models.build(None, IF_2_L, attention), tiny.IF_SCHEDULER, tiny.COSINE, 64, 3.09)
    models = stable_diffusion.Models.build(SD_2["text_encoder"], X4, X4_VAE, attention)
    return Stage(models, tiny.X4_SCHEDULER, tiny.COSINE | {"beta_schedule": "scaled_linear"}, 256, 4.53, 19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("steps", 50), ("concepts", 1), ("batch", 1), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stage", default="stage1", choices=["stage1", "stage2", "upscaler"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="cudnn", choices=["xla", "cudnn", "pallas"])
    parser.add_argument("--ceiling", type=float, default=796.0, help="TFLOP/s of matrix products")
    parser.add_argument("--json", type=Path, help="where the measurements go")
    args = parser.parse_args()

    devices = Devices(jax.local_devices()[:1])
    began = time.perf_counter()
    stage = described(args.stage, args.attention)
    models = filled(stage.models, args.dtype, devices)
    jax.block_until_ready(models)
    placed = time.perf_counter() - began
    parameters = sum(leaf.size for leaf in jax.tree.leaves(models))
    noising = stage.noising and Noising(schedules.from_config({"_class_name": "DDPMScheduler", **stage.noising}), 350)
    pipe = Pipeline(models, None, schedules.from_config(stage.scheduler), devices, None, noising)

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
    found = {
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
