"""How much time and memory does an edited picture need, from prompt to pixels, and how close is the time to the floor?

The model is Stable Diffusion 1.5 at 512x512 with random weights (speed does not depend on their values). For each
number of concepts and each batch size, the pipeline is compiled and then called `--repeat` times. The floor is the time
that the networks' arithmetic would take at the device's highest rate for bfloat16 matrix products (the ceiling).
`torch_sega.py` measures diffusers' pipeline in the same way, and `tables.py` prints the results of both side by side.
Run this from the root of the repository, with PYTHONPATH=. if the library is not installed:

    python tests/benchmarks/end_to_end.py --concepts 0,1,2,4,8 --batch 1,4,8 --attention cudnn --json FILE

If JAX_COMPILATION_CACHE_DIR is set, a second run measures compilation with a warm cache. `--tiny` tests the script
itself with a small network that runs on any CPU; ignore the timings.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from weights import filled

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny
from support.published import SD_1

from sega_jax import Edit, Pipeline
from sega_jax.method import schedules
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems.stable_diffusion import SYSTEM, Models
from sega_jax.text.tokenizers import Tokenizer

SMALL = {"text_encoder": tiny.TEXT, "unet": tiny.UNET, "vae": tiny.VAE}
# TFLOP that the UNet needs for one branch at one step, and that the decoder needs for one picture.
UNET, DECODER = 0.8033, 2.51


def pipeline(dtype: str, attention: str, devices: Devices | None = None, *, small: bool = False) -> Pipeline:
    """Returns an SD 1.5 pipeline with random weights; its networks are small if `small` is true."""
    devices = devices or Devices()
    configs = SMALL if small else SD_1
    models = filled(Models.build(**configs, attention=attention), dtype, devices)
    folder = Path(tempfile.mkdtemp())
    length, words = (configs["text_encoder"][name] for name in ("max_position_embeddings", "vocab_size"))
    tiny.tokenizer(folder, length)
    return Pipeline(SYSTEM, models, Tokenizer(folder, length, words), schedules.from_config(tiny.DDIM), devices)


def floor(concepts: int, batch: int, steps: int, ceiling: float) -> float:
    """Returns the time that the arithmetic alone would take, in seconds; `ceiling` is in TFLOP/s."""
    return batch * ((2 + concepts) * steps * UNET + DECODER) / ceiling


def cell(pipe: Pipeline, concepts: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    edits = [Edit(chr(97 + k), threshold=0.95, warmup=args.steps // 5) for k in range(concepts)]

    def call(seed: int) -> float:
        began = time.perf_counter()
        out = pipe("b", edits, images_per_prompt=batch, steps=args.steps, seed=seed, output="uint8", progress=False)
        assert out.finite.all()
        return time.perf_counter() - began

    jax.clear_caches()
    row = measure(call, concepts, batch, args)
    # This is the peak since the process started, so it may come from an earlier cell that needed more memory.
    peak = (pipe.devices.devices[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan"))
    return row | {"peak_gib": peak / 2**30}


def measure(call: Callable[[int], float], concepts: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the first call and later calls, with different seeds. Returns all times and the floor, in seconds."""
    first = call(0)
    seconds = [call(i) for i in range(1, 1 + args.repeat)]
    least = floor(concepts, batch, args.steps, args.ceiling)
    return {"concepts": concepts, "batch": batch, "first": first, "seconds": seconds, "floor": least}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that several benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("concepts", [2]), ("batch", [1])):
        parser.add_argument(f"--{name}", type=numbers, default=default, help="numbers, separated by commas")
    for name, default in (("steps", 50), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ceiling", type=float, default=796.0, help="the rate for matrix products, in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    parser.add_argument("--json", type=Path, help="write the measurements to this file after each cell")
    return parser


def report(about: dict[str, Any], rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints the newest cell and writes all cells to the file."""
    row, median = rows[-1], statistics.median(rows[-1]["seconds"])
    spread = f"{min(row['seconds']):.3f} to {max(row['seconds']):.3f}"
    print(
        f"n = {row['concepts']}, B = {row['batch']}: {1e3 * median / row['batch']:.1f} ms a picture ({spread} s),"
        f" floor / time {row['floor'] / median:.1%}, first call {row['first']:.1f} s, peak {row['peak_gib']:.2f} GiB",
        flush=True,
    )
    if path:
        path.write_text(json.dumps({"about": about, "found": rows}, indent=1) + "\n")


def write_results(args: argparse.Namespace, pipe: Pipeline, rows: list[dict[str, Any]]) -> None:
    """Writes another benchmark's results to its `--json` file, if one was given."""
    if args.json:
        args.json.write_text(json.dumps({"about": about(args, pipe), "found": rows}, indent=1) + "\n")


def about(args: argparse.Namespace, pipe: Pipeline) -> dict[str, Any]:
    device = pipe.devices.devices[0].device_kind
    options = {name: value for name, value in vars(args).items() if name != "json"}
    flags = os.environ.get("XLA_FLAGS", "")
    return {"backend": "sega_jax", "device": device, "versions": f"jax {jax.__version__}", "flags": flags} | options


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn", "pallas"])
    args = parser.parse_args()
    devices = Devices(jax.local_devices()[:1])
    began = time.perf_counter()
    pipe = pipeline(args.dtype, args.attention, devices, small=args.tiny)
    jax.block_until_ready(pipe.models)
    known = about(args, pipe) | {"placed": time.perf_counter() - began}
    print(known)
    rows = []
    for batch in sorted(args.batch):
        for concepts in sorted(args.concepts):
            rows.append(cell(pipe, concepts, batch, args))
            report(known, rows, args.json)


if __name__ == "__main__":
    main()
