"""How many pictures per second does a sweep make, and how much faster is it if it computes shared calls only once?

The model is Stable Diffusion 1.5 at 512x512 with random weights (speed does not depend on their values). The sweep has
2 prompts, 16 seeds and 8 settings, so it makes 256 pictures. Each setting has either one edit or two edits that cool
down half-way; edits warm up for a fifth of the steps. Each sweep runs with and without sharing, each time in a new
folder and after a smaller sweep that compiles its programs. For comparison, some of the pictures are also made with
single calls.

With `--devices`, the benchmark instead runs the sweep with sharing on each of the given numbers of devices, with a
fixed number of rows per device. The script then prints the efficiency relative to the first number of devices, and the
number of pictures that are not bit-identical to the pictures made on this first number of devices. Run it from the root
of the repository, with PYTHONPATH=. if the library is not installed:

    python tests/benchmarks/sweep.py --rows 16 --attention cudnn --json FILE
    python tests/benchmarks/sweep.py --rows 16 --attention cudnn --concepts 2 --devices 1,2 --json FILE

`--demo` uses the demo model, which also runs on a CPU. For runs on a shared machine, processor time is more reliable
than elapsed time. `--tiny` tests the script itself with a small network that runs on any CPU; ignore the timings.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from end_to_end import numbers, pipeline
from scaling import Stopwatch

from sega_jax import Pipeline, load, sweep
from sega_jax.pipelines.execution.devices import Devices

Digests = dict[str, str]  # {name of a picture: digest}


def described(concepts: int, seeds: int, steps: int, scales: Sequence[float] = (2, 4, 6, 8)) -> sweep.Sweep:
    names = "cd"[:concepts]
    cooldown = steps // 2 if concepts > 1 else None
    return sweep.Sweep(
        call={"steps": steps},
        edits={name: {"warmup": steps // 5, "cooldown": cooldown} for name in names},
        grid={
            "prompt": ["a", "b"],
            "seed": range(seeds),
            "c.scale": scales,
            "c.threshold": [0.9, 0.95],
        },
    )


def facts(pipe: Pipeline) -> sweep.Facts:
    return sweep.Facts({}, pipe.system.name, pipe.scheduler.config, pipe.system.sampler.sizes(pipe.models))


def timed(pipe: Pipeline, concepts: int, share: bool, args: argparse.Namespace) -> tuple[dict[str, Any], Digests]:
    """Runs a sweep, which includes writing its files. Returns the measurements and the digests of the pictures."""
    rows = args.rows * len(pipe.devices)

    def run(description: sweep.Sweep) -> tuple[sweep.Plan, float, float, Digests]:
        plan = sweep.plan(description, facts(pipe), rows, share=share)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter(), time.process_time()
            assert sweep.run(plan, folder, pipe, progress=False).done == plan.counts.pictures
            spent = time.perf_counter() - began[0], time.process_time() - began[1]
            return plan, *spent, {row["name"]: row["digest"] for row in sweep.Results(folder).rows}

    # In this sweep, the number of shared prefixes equals the number of rows.
    small = described(concepts, rows // 2, args.steps, [2])
    first = run(small)[1]
    plan, seconds, processor, digests = run(described(concepts, args.seeds, args.steps))
    counts = plan.counts
    measurements = {
        "concepts": concepts,
        "devices": len(pipe.devices),
        "shared": share,
        "pictures": counts.pictures,
        "first": first,
        "seconds": seconds,
        "processor": processor,
        "evaluations": counts.evaluations,
        "alone": counts.alone,
    }
    if isinstance(pipe.devices, Stopwatch):
        pipe.devices.ran = []
        elapsed = run(small)[1]
        measurements["outside"] = 1 - pipe.devices.busy / elapsed
    return measurements, digests


def scaled(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the sweep with sharing for each number of devices."""
    rows: list[dict[str, Any]] = []
    for count, concepts in itertools.product(args.devices, args.concepts):
        began = time.perf_counter()
        pipe = build(args, Stopwatch(jax.local_devices()[:count]))
        jax.block_until_ready(pipe.models)
        placed = time.perf_counter() - began
        row, digests = timed(pipe, concepts, True, args)
        base = next((other for other in rows if other["concepts"] == concepts), row | {"digests": digests})
        pace, slow = (one["pictures"] / one["seconds"] / one["devices"] for one in (row, base))
        row |= {"placed": placed, "efficiency": pace / slow, "digests": digests}
        row["different"] = sum(digests[name] != digest for name, digest in base["digests"].items())
        rows.append(row)
        report(f"{count} devices", row)
        print(
            f"  efficiency {row['efficiency']:.1%}, {row['outside']:.1%} outside the programs (in the small sweep),"
            f" weights placed in {placed:.1f} s, {row['different']} pictures differ",
            flush=True,
        )
    for row in rows:
        del row["digests"]
    return rows


def alone(pipe: Pipeline, concepts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures single calls for some of the points. The first call includes compilation, so it is not counted."""
    description = described(concepts, args.seeds, args.steps)
    plan = sweep.plan(description, facts(pipe), 1, share=False)
    began = 0.0
    for i in range(1 + args.part):
        began = time.perf_counter() if i == 1 else began
        point = plan.point(i)
        words = {name: point.call[name] for name in ("prompt", "seed")}
        pipe(edits=list(point.edits.values()), **words, steps=args.steps, output="uint8", progress=False)
    seconds = time.perf_counter() - began
    evaluations = args.part * args.steps * (2 + concepts)
    return {"concepts": concepts, "pictures": args.part, "seconds": seconds, "evaluations": evaluations}


def report(name: str, row: dict[str, Any]) -> None:
    print(
        f"{row['concepts']} concepts, {name}: {row['pictures'] / row['seconds']:.3f} pictures/s"
        f" ({row['pictures']} in {row['seconds']:.1f} s, {row['evaluations']} evaluations)",
        flush=True,
    )


def build(args: argparse.Namespace, devices: Devices) -> Pipeline:
    if args.demo:
        return load(devices=devices, dtype="float32")
    return pipeline(args.dtype, args.attention, devices, small=args.tiny)


def compared(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures sweeps with and without sharing, and single calls."""
    pipe, results = build(args, Devices(jax.local_devices()[:1])), []
    for concepts in args.concepts:
        rows = {}
        for share in (False, True):
            rows[share], _ = timed(pipe, concepts, share, args)
            report("shared" if share else "not shared", rows[share])
        results += rows.values()
        less = 1 - rows[True]["evaluations"] / rows[False]["evaluations"]
        saved, cpu = (1 - rows[True][name] / rows[False][name] for name in ("seconds", "processor"))
        savings = f"{less:.1%} fewer evaluations, {saved:.1%} less time, {cpu:.1%} less processor time"
        print(f"{concepts} concepts: {savings}", flush=True)
        if args.part:
            results.append(alone(pipe, concepts, args))
            report("single calls", results[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=numbers, default=[1, 2])
    parser.add_argument("--devices", type=numbers, default=[], help="numbers of devices; the first is the baseline")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=16, help="seeds for each of two prompts; 8 pictures per seed")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--part", type=int, default=8, help="number of points to repeat with single calls; 0 for none")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    parser.add_argument("--demo", action="store_true", help="use the demo model in float32")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()
    about = {name: value for name, value in vars(args).items() if name != "json"}
    about |= {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
    print(about, flush=True)
    results = scaled(args) if args.devices else compared(args)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "found": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
