"""How much do pictures computed in half precision differ from pictures computed in float32?

The model is Stable Diffusion 1.5 at 512x512 with random weights, or the demo model (`--demo`), with one concept. The
model runs first in float32, with matrix products in full precision, and then in `--dtype`, with the same weights, seeds
and settings. The script prints

- the peak signal-to-noise ratio of the pictures,
- the number of positions that the edit changes in only one of the two runs, relative to the number of positions that it
  changes in float32. The script prints this ratio for the concept's first call, where both runs have nearly the same
  latents, and for all calls together (little may be left to change at later calls),
- and the relative distance between the semantic guidance in the two runs.

Run it from the root of the repository:

    python tests/benchmarks/precision.py --attention cudnn --json FILE
    python tests/benchmarks/precision.py --demo --json FILE
"""

import statistics
from typing import Any

import jax
import numpy as np
from end_to_end import arguments, pipeline, write_results

import sega_jax
from sega_jax import Edit, Output, Pipeline
from sega_jax.pipelines.execution.devices import Devices


def ratio(ours: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of float pictures in [0, 1], in decibels."""
    return float(-10 * np.log10(np.square(ours.astype(np.float64) - other).mean()))


def flipped(ours: np.ndarray, other: np.ndarray) -> float:
    """Returns the number of entries that are nonzero in only one of the arrays, relative to the number of nonzero
    entries in `ours`."""
    first, second = ours != 0, other != 0
    return float((first ^ second).sum() / first.sum())


def distance(ours: np.ndarray, other: np.ndarray) -> float:
    """Returns the Euclidean distance between the two arrays, relative to the norm of `ours`."""
    return float(np.linalg.norm(ours - other) / np.linalg.norm(ours))


def pictures(pipe: Pipeline, args: Any) -> list[Output]:
    prompt, edit = ("a portrait of a woman with brown hair", "glasses") if args.demo else ("b", "a")
    # Without momentum, the edit changes exactly the positions above its threshold at each call.
    edits = [Edit(edit, threshold=0.9, warmup=args.steps // 5, momentum_scale=0)]
    settings = {"steps": args.steps, "output": "float", "record": True, "progress": False}
    return [pipe(prompt, edits, seed=seed, **settings) for seed in range(args.repeat)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn", "pallas"])
    parser.add_argument("--demo", action="store_true", help="use the demo model, which is trained")
    args = parser.parse_args()
    devices = Devices(jax.local_devices()[:1])

    def build(dtype: str) -> Pipeline:
        # cuDNN's attention supports half precision only.
        attention = "xla" if dtype == "float32" and args.attention == "cudnn" else args.attention
        if args.demo:
            return sega_jax.load(dtype=dtype, attention=attention, devices=devices)
        return pipeline(dtype, attention, devices, small=args.tiny)

    with jax.default_matmul_precision("highest"):
        exact = pictures(build("float32"), args)
    pipe = build(args.dtype)
    rows = []
    for seed, (one, other) in enumerate(zip(exact, pictures(pipe, args), strict=True)):
        ours, theirs = one.record.sem_guidance, other.record.sem_guidance
        first = args.steps // 5
        row = {
            "seed": seed,
            "decibels": ratio(one.images, other.images),
            "flipped_first": flipped(ours[:, first], theirs[:, first]),
            "flipped": flipped(ours, theirs),
            "distance": distance(ours, theirs),
        }
        print(row, flush=True)
        rows.append(row)
    for name in ("decibels", "flipped_first", "flipped", "distance"):
        values = [row[name] for row in rows]
        print(f"{name}: median {statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})")
    write_results(args, pipe, rows)


if __name__ == "__main__":
    main()
