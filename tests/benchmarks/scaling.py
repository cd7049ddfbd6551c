"""How many pictures per second do 1, 2, 4, ... devices of one host make, and how efficiently?

The model is Stable Diffusion 1.5 at 512x512 with random weights and two concepts; the number of rows on each device is
fixed. For each number of devices, the script prints the time to place the weights, the pictures per second, the
efficiency relative to one device in the same run, the share of the time spent outside the compiled programs, and the
largest difference from the latents computed on one device (0 means bit-identical). Run it from the root of the
repository:

    python tests/benchmarks/scaling.py --devices 1,2,4 --share 4 --json FILE
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from end_to_end import pipeline

from sega_jax import Edit
from sega_jax.pipelines.execution.devices import Devices


class Stopwatch(Devices):
    """Devices that record when their programs start and end.

    They record only while `ran` is a list; during this time, they wait for each program to end.
    """

    ran: list[tuple[float, float]] | None = None

    def map(self, function: Callable, in_axes: tuple[int | None, ...] | None, **static: Any) -> Callable:
        program = super().map(function, in_axes, **static)

        def timed(*args):
            if self.ran is None:
                return program(*args)
            began = time.perf_counter()
            out = jax.block_until_ready(program(*args))
            self.ran.append((began, time.perf_counter()))
            return out

        return timed

    @property
    def busy(self) -> float:
        """The time in seconds during which at least one program ran. Programs in different threads may overlap."""
        total, until = 0.0, 0.0
        for began, ended in sorted(self.ran):
            total += max(ended - max(began, until), 0)
            until = max(until, ended)
        return total


def measure(count: int, args: argparse.Namespace, alone: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
    """Measures calls on `count` devices. Returns the measurements and the latents that one device computes.

    `alone` contains these latents, or is None in the first measurement.
    """
    devices = Stopwatch(jax.local_devices()[:count])
    began = time.perf_counter()
    pipe = pipeline(args.dtype, args.attention, devices)
    jax.block_until_ready(pipe.models)
    placed = time.perf_counter() - began
    edits = [Edit(chr(97 + k), threshold=0.95) for k in range(args.concepts)]

    def call(seed: int, output: str) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        rows = {"images_per_prompt": args.share * count, "steps": args.steps, "seed": seed}
        images = pipe("a", edits, **rows, output=output, progress=False).images
        return images, time.perf_counter() - began

    first = call(0, "uint8")[1]
    seconds = [call(0, "uint8")[1] for _ in range(args.repeat)]
    devices.ran = []
    watched = call(0, "uint8")[1]
    results = {
        "devices": count,
        "pictures": args.share * count,
        "placed": placed,
        "first": first,
        "seconds": seconds,
        "pictures_per_second": args.share * count / statistics.median(seconds),
        "outside": 1 - devices.busy / watched,
    }
    devices.ran = None
    if alone is None:
        parts = [call(i * args.share, "latent")[0] for i in range(max(args.devices))]
        return results, np.concatenate(parts)
    results["difference"] = float(np.abs(call(0, "latent")[0] - alone[: args.share * count]).max())
    return results, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--devices", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    for name, default in (("share", 4), ("steps", 50), ("concepts", 2), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="cudnn", choices=["xla", "cudnn", "pallas"])
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()
    args.devices = [count for count in args.devices if count <= len(jax.local_devices())]
    if args.devices[:1] != [1]:
        parser.error("--devices should start with 1, because the others are compared with one device")
    about = {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
    about |= {name: getattr(args, name) for name in ("share", "steps", "concepts", "dtype", "attention")}
    print(about)

    rows, alone = [], None
    print("| devices | pictures/s | efficiency | outside the programs | weights placed | first call | difference |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for count in args.devices:
        row, alone = measure(count, args, alone)
        rows.append(row)
        row["efficiency"] = row["pictures_per_second"] / (count * rows[0]["pictures_per_second"])
        print(
            f"| {count} | {row['pictures_per_second']:.3f} | {row['efficiency']:.1%} | {row['outside']:.1%} |"
            f" {row['placed']:.1f} s | {row['first']:.1f} s | {row.get('difference', '')} |",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
