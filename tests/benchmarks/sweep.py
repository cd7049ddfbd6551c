"""How many pictures does a sweep make in a second, and how many more where it computes once what they share?

The Stable Diffusion 1.5 architecture at 512x512 with random weights (speed does not depend on their values): 2 prompts,
16 seeds and 8 settings of one concept, or of two that cool down half-way, 256 pictures, with warm-up at a fifth of the
steps. Each sweep is run with and without sharing into a folder of its own, after a smaller one that compiles its
programs; and a part of the points is made by single calls, whose pace is that of all. Run from the repository's root,
where nothing is installed with PYTHONPATH=. before it:

    python tests/benchmarks/sweep.py --rows 16 --attention cudnn --json FILE

`--demo` is the demo model, which a CPU runs, too; there processor time says more than the clock's where others work on
the machine. `--tiny` is a network that any CPU runs, and says nothing about speed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from end_to_end import pipeline

from sega_jax import Pipeline, load, sweep
from sega_jax.parallel import Devices


def described(concepts: int, seeds: int, steps: int) -> sweep.Sweep:
    names = "cd"[:concepts]
    cooldown = steps // 2 if concepts > 1 else None
    return sweep.Sweep(
        call={"steps": steps},
        edits={name: {"warmup": steps // 5, "cooldown": cooldown} for name in names},
        grid={
            "prompt": ["a", "b"],
            "seed": range(seeds),
            "c.scale": [2, 4, 6, 8],
            "c.threshold": [0.9, 0.95],
        },
    )


def facts(pipe: Pipeline) -> sweep.Facts:
    return sweep.Facts({}, pipe.scheduler.config, pipe.models.usual, pipe.models.sizes)


def timed(pipe: Pipeline, concepts: int, share: bool, args: argparse.Namespace) -> dict[str, Any]:
    """A sweep's pictures per second, its writing included."""

    def run(seeds: int) -> tuple[sweep.Plan, float, float]:
        plan = sweep.plan(described(concepts, seeds, args.steps), facts(pipe), args.rows, share=share)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter(), time.process_time()
            assert sweep.run(plan, folder, pipe, progress=False).done == plan.counts.pictures
            return plan, time.perf_counter() - began[0], time.process_time() - began[1]

    run(args.rows // 2)  # as many trunks as there are rows
    plan, seconds, processor = run(args.seeds)
    counts = plan.counts
    return {
        "concepts": concepts,
        "shared": share,
        "pictures": counts.pictures,
        "seconds": seconds,
        "processor": processor,
        "evaluations": counts.evaluations,
        "alone": counts.alone,
    }


def alone(pipe: Pipeline, concepts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Single calls of a part of the points, the first of which compiles and is not counted."""
    said = described(concepts, args.seeds, args.steps)
    plan = sweep.plan(said, facts(pipe), 1, share=False)
    began = 0.0
    for i in range(1 + args.part):
        began = time.perf_counter() if i == 1 else began
        point = plan.point(i)
        edits = list(point.edits.values())
        pipe(point.prompt, edits, seed=point.seed, steps=args.steps, output="uint8", progress=False)
    seconds = time.perf_counter() - began
    evaluations = args.part * args.steps * (2 + concepts)
    return {"concepts": concepts, "pictures": args.part, "seconds": seconds, "evaluations": evaluations}


def tell(name: str, found: dict[str, Any]) -> None:
    print(
        f"{found['concepts']} concepts, {name}: {found['pictures'] / found['seconds']:.3f} pictures/s"
        f" ({found['pictures']} in {found['seconds']:.1f} s, {found['evaluations']} evaluations)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
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
    devices = Devices(jax.local_devices()[:1])
    if args.demo:
        pipe = load(devices=devices, dtype="float32")
    else:
        pipe = pipeline(args.dtype, args.attention, devices, small=args.tiny)
    device = pipe.devices.devices[0].device_kind
    about = {name: value for name, value in vars(args).items() if name != "json"} | {"device": device}
    about |= {"jax": jax.__version__}
    print(about, flush=True)
    found = []
    for concepts in args.concepts:
        rows = {}
        for share in (False, True):
            rows[share] = timed(pipe, concepts, share, args)
            tell("shared" if share else "apart", rows[share])
        found += rows.values()
        less = 1 - rows[True]["evaluations"] / rows[False]["evaluations"]
        saved, cpu = (1 - rows[True][name] / rows[False][name] for name in ("seconds", "processor"))
        said = f"{less:.1%} fewer evaluations, {saved:.1%} less time, {cpu:.1%} less processor time"
        print(f"{concepts} concepts: {said}", flush=True)
        if args.part:
            found.append(alone(pipe, concepts, args))
            tell("single calls", found[-1])
    if args.json:
        args.json.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
