"""How many pictures does a sweep make in a second, and how many more where it computes once what they share?

The Stable Diffusion 1.5 architecture at 512x512 with random weights (speed does not depend on their values): 2 prompts,
16 seeds and 8 settings of one concept, or of two that cool down half-way, 256 pictures, with warm-up at a fifth of the
steps. Each sweep is run with and without sharing into a folder of its own, after a smaller one that compiles its
programs; and a part of the points is made by single calls, whose pace is that of all. With `--devices` the sweep that
shares is run on as many devices of this host instead, with as many rows on each: the efficiency is that of one device,
and as many pictures as are not equal to its to the last bit are counted. Run from the repository's root, where nothing
is installed with PYTHONPATH=. before it:

    python tests/benchmarks/sweep.py --rows 16 --attention cudnn --json FILE
    python tests/benchmarks/sweep.py --rows 16 --attention cudnn --concepts 2 --devices 1,2 --json FILE

`--demo` is the demo model, which a CPU runs, too; there processor time says more than the clock's where others work on
the machine. `--tiny` is a network that any CPU runs, and says nothing about speed.
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

Digests = dict[str, str]  # of pictures, by their names


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
    """A sweep's pictures per second, its writing included, and what they are."""
    rows = args.rows * len(pipe.devices)

    def run(said: sweep.Sweep) -> tuple[sweep.Plan, float, float, Digests]:
        plan = sweep.plan(said, facts(pipe), rows, share=share)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter(), time.process_time()
            assert sweep.run(plan, folder, pipe, progress=False).done == plan.counts.pictures
            spent = time.perf_counter() - began[0], time.process_time() - began[1]
            return plan, *spent, {row["name"]: row["digest"] for row in sweep.Results(folder).rows}

    # As many trunks as there are rows.
    small = described(concepts, rows // 2, args.steps, [2])
    first = run(small)[1]
    plan, seconds, processor, digests = run(described(concepts, args.seeds, args.steps))
    counts = plan.counts
    found = {
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
        whole = run(small)[1]
        found["outside"] = 1 - pipe.devices.busy / whole
    return found, digests


def scaled(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sweep that shares on several numbers of devices."""
    found: list[dict[str, Any]] = []
    for count, concepts in itertools.product(args.devices, args.concepts):
        began = time.perf_counter()
        pipe = made(args, Stopwatch(jax.local_devices()[:count]))
        jax.block_until_ready(pipe.models)
        placed = time.perf_counter() - began
        row, digests = timed(pipe, concepts, True, args)
        base = next((other for other in found if other["concepts"] == concepts), row | {"digests": digests})
        pace, slow = (one["pictures"] / one["seconds"] / one["devices"] for one in (row, base))
        row |= {"placed": placed, "efficiency": pace / slow, "digests": digests}
        row["different"] = sum(digests[name] != digest for name, digest in base["digests"].items())
        found.append(row)
        tell(f"{count} devices", row)
        print(
            f"  {row['efficiency']:.1%} of one device's pace, {row['outside']:.1%} outside the programs (small sweep),"
            f" weights placed in {placed:.1f} s, {row['different']} pictures differ",
            flush=True,
        )
    for row in found:
        del row["digests"]
    return found


def alone(pipe: Pipeline, concepts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Single calls of a part of the points, the first of which compiles and is not counted."""
    said = described(concepts, args.seeds, args.steps)
    plan = sweep.plan(said, facts(pipe), 1, share=False)
    began = 0.0
    for i in range(1 + args.part):
        began = time.perf_counter() if i == 1 else began
        point = plan.point(i)
        words = {name: point.call[name] for name in ("prompt", "seed")}
        pipe(edits=list(point.edits.values()), **words, steps=args.steps, output="uint8", progress=False)
    seconds = time.perf_counter() - began
    evaluations = args.part * args.steps * (2 + concepts)
    return {"concepts": concepts, "pictures": args.part, "seconds": seconds, "evaluations": evaluations}


def tell(name: str, found: dict[str, Any]) -> None:
    print(
        f"{found['concepts']} concepts, {name}: {found['pictures'] / found['seconds']:.3f} pictures/s"
        f" ({found['pictures']} in {found['seconds']:.1f} s, {found['evaluations']} evaluations)",
        flush=True,
    )


def made(args: argparse.Namespace, devices: Devices) -> Pipeline:
    if args.demo:
        return load(devices=devices, dtype="float32")
    return pipeline(args.dtype, args.attention, devices, small=args.tiny)


def compared(args: argparse.Namespace) -> list[dict[str, Any]]:
    """With and without sharing, and by single calls."""
    pipe, found = made(args, Devices(jax.local_devices()[:1])), []
    for concepts in args.concepts:
        rows = {}
        for share in (False, True):
            rows[share], _ = timed(pipe, concepts, share, args)
            tell("shared" if share else "apart", rows[share])
        found += rows.values()
        less = 1 - rows[True]["evaluations"] / rows[False]["evaluations"]
        saved, cpu = (1 - rows[True][name] / rows[False][name] for name in ("seconds", "processor"))
        said = f"{less:.1%} fewer evaluations, {saved:.1%} less time, {cpu:.1%} less processor time"
        print(f"{concepts} concepts: {said}", flush=True)
        if args.part:
            found.append(alone(pipe, concepts, args))
            tell("single calls", found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=numbers, default=[1, 2])
    parser.add_argument("--devices", type=numbers, default=[], help="how many, the first to compare with")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=16, help="for each of two prompts; 8 pictures each")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--part", type=int, default=8, help="points that are made by single calls; 0 for none")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    parser.add_argument("--demo", action="store_true", help="the demo model in float32")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try this script")
    parser.add_argument("--json", type=Path, help="where the measurements go")
    args = parser.parse_args()
    about = {name: value for name, value in vars(args).items() if name != "json"}
    about |= {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
    print(about, flush=True)
    found = scaled(args) if args.devices else compared(args)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
