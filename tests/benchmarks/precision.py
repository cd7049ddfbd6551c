"""How far are pictures in half precision from those in float32?

One concept, in the Stable Diffusion 1.5 architecture with random weights at 512x512, or in the demo model (`--demo`),
with the same weights, seeds and settings in float32 (products in full precision) and in `--dtype`. Says the pictures'
peak signal-to-noise ratio; of the positions that the edit moves in float32, how many are moved in one of the two alone,
at the concept's first call, of which both see nearly the same latents, and over all calls, in the later of which there
may be little left to move; and how far all that is added is from float32's. Run from the repository's root:

    python tests/benchmarks/precision.py --attention cudnn --json FILE
    python tests/benchmarks/precision.py --demo --json FILE
"""

import statistics
from typing import Any

import jax
import numpy as np
from end_to_end import arguments, pipeline, tell_all

import sega_jax
from sega_jax import Edit, Output, Pipeline
from sega_jax.pipelines.execution.devices import Devices


def ratio(ours: np.ndarray, other: np.ndarray) -> float:
    """The peak signal-to-noise ratio of float pictures in [0, 1], in decibels."""
    return float(-10 * np.log10(np.square(ours.astype(np.float64) - other).mean()))


def flipped(ours: np.ndarray, other: np.ndarray) -> float:
    """The share of what is moved in `ours` that is so in one of the two alone."""
    moved, also = ours != 0, other != 0
    return float((moved ^ also).sum() / moved.sum())


def distance(ours: np.ndarray, other: np.ndarray) -> float:
    """The relative distance to `ours`, by the Euclidean norm."""
    return float(np.linalg.norm(ours - other) / np.linalg.norm(ours))


def pictures(pipe: Pipeline, args: Any) -> list[Output]:
    prompt, edit = ("a portrait of a woman with brown hair", "glasses") if args.demo else ("b", "a")
    # Without momentum what is moved is what the threshold of the call leaves.
    edits = [Edit(edit, threshold=0.9, warmup=args.steps // 5, momentum_scale=0)]
    settings = {"steps": args.steps, "output": "float", "record": True, "progress": False}
    return [pipe(prompt, edits, seed=seed, **settings) for seed in range(args.repeat)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    parser.add_argument("--demo", action="store_true", help="the demo model, which is trained")
    args = parser.parse_args()
    devices = Devices(jax.local_devices()[:1])

    def made(dtype: str) -> Pipeline:
        # cuDNN's attention is of half precision only.
        attention = "xla" if dtype == "float32" else args.attention
        if args.demo:
            return sega_jax.load(dtype=dtype, attention=attention, devices=devices)
        return pipeline(dtype, attention, devices, small=args.tiny)

    with jax.default_matmul_precision("highest"):
        exact = pictures(made("float32"), args)
    pipe = made(args.dtype)
    found = []
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
        found.append(row)
    for name in ("decibels", "flipped_first", "flipped", "distance"):
        values = [row[name] for row in found]
        print(f"{name}: median {statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})")
    tell_all(args, pipe, found)


if __name__ == "__main__":
    main()
