"""What do the full-size programs need on a TPU, according to its compiler?

The compiler runs on a machine without a TPU (see `tests/support/topology.py`). Each cell is one program of one family,
for one generation of chips, one attention implementation and one batch size, with one concept and bfloat16 weights.
The script writes one JSON file per cell and skips existing files, so an interrupted run continues. A cell takes
5 to 30 minutes. Install the extra `tpu-aot` and run this from the root of the repository:

    python tests/benchmarks/tpu_aot.py --families sd15,sdxl --generations v5e,v6e

Memory and bytes are those that the compiler reports: `bytes` counts the bytes that fused operations read and write. The
loop of `advance` counts once, so its numbers are for one model call. `roofline` is the larger of two times: the bytes
at the chip's memory bandwidth, and the operations at its peak rate. It is no measurement: compare cells with each
other.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.topology import TopologyDevices  # isort: skip - it sets variables that JAX reads

import end_to_end
import jax
import numpy as np
import sdxl

from sega_jax import Edit

RESULTS = Path(__file__).parent / "results" / "tpu_aot"
PROGRAMS = ("advance", "decode")
FAMILIES = {"sd15": end_to_end.pipeline, "sdxl": sdxl.pipeline}


class Chip(NamedTuple):
    """Google's published figures for one chip (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

    operations: float  # bfloat16 operations per second
    bandwidth: float  # bytes of memory per second
    memory: float  # bytes


CHIPS = {
    "v4": Chip(275e12, 1228e9, 32e9),
    "v5e": Chip(197e12, 819e9, 16e9),
    "v5p": Chip(459e12, 2765e9, 95e9),
    "v6e": Chip(918e12, 1640e9, 32e9),
}


def cell(family: str, generation: str, program: str, attention: str, rows: int, *, small: bool) -> dict[str, Any]:
    """Compiles a program and returns the compiler's report."""
    devices = TopologyDevices(generation)
    pipe = FAMILIES[family]("bfloat16", attention, devices, small=small)
    devices.only = {"advance" if program == "advance" else pipe.system.sampler.decode.__name__}
    pipe.compile("b", Edit("a", warmup=0), images_per_prompt=rows, output="uint8", progress=False)
    (done,) = devices.compiled
    memory, cost, chip = done.compiled.memory_analysis(), done.compiled.cost_analysis(), CHIPS[generation]
    networks = jax.tree.leaves(pipe.models)
    return {
        "family": family,
        "generation": generation,
        "program": program,
        "attention": attention,
        "rows": rows,
        "device": devices.devices[0].device_kind,
        "versions": f"jax {jax.__version__}",
        "memory": chip.memory,
        "weights": sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in networks),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "bytes": cost["bytes accessed"],
        "operations": cost["flops"],
        "roofline": max(cost["bytes accessed"] / chip.bandwidth, cost["flops"] / chip.operations),
        "compile_seconds": done.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default, known in (
        ("families", "sd15,sdxl", FAMILIES),
        ("generations", "v5e,v6e", CHIPS),
        ("programs", "advance,decode", PROGRAMS),
        ("attention", "pallas", ("pallas", "xla")),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"some of {','.join(known)}")
    parser.add_argument("--rows", default="1", help="batch sizes, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="try this script with small networks")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where to write the JSON files")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cells = [
        (family, generation, program, attention, int(rows))
        for family in args.families.split(",")
        for program in args.programs.split(",")
        for generation in args.generations.split(",")
        for attention in args.attention.split(",")
        for rows in args.rows.split(",")
    ]
    for words in cells:
        path = args.folder / f"{'-'.join(map(str, words))}.json"
        if not path.exists():
            found = cell(*words, small=args.tiny)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(path.stem, {name: found[name] for name in ("temporary", "bytes", "compile_seconds")}, flush=True)


if __name__ == "__main__":
    main()
