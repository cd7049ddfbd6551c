"""Which layers and which kinds of kernels take the most time on the device?

JAX's profiler records one pipeline call of a model with the Stable Diffusion 1.5 architecture. A kernel's time is
attributed to the innermost layer that contains the kernel. If a kernel fuses several layers, its time is attributed to
the layer of the fusion's root operation. The script needs a GPU. XLA's command buffers are turned off, because they
hide which layer contains a kernel. Run it from the root of the repository:

    XLA_FLAGS=--xla_gpu_enable_command_buffer= python tests/benchmarks/profile_scopes.py --concepts 1 --attention cudnn
"""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from end_to_end import arguments, pipeline, write_results

from sega_jax import Edit
from sega_jax.nn import layers
from sega_jax.nn.unet import attention
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import programs

SCOPES = {
    "convolution": (layers.Conv, "__call__"),
    "upsampling": (layers.Upsample, "__call__"),
    "linear": (layers.Linear, "__call__"),
    "group norm": (layers.GroupNorm, "__call__"),
    "layer norm": (layers.LayerNorm, "__call__"),
    "GEGLU": (attention.GEGLU, "__call__"),
    "resnet": (layers.ResnetBlock, "__call__"),
    "transformer": (attention.Transformer, "__call__"),
    "attention": (layers, "attend"),
}
GUIDANCE = "guidance"
KINDS = {"sdpa": "attention", "xmma": "convolution", "nvjet": "matrix product", "gemm": "matrix product"}


def scoped(name: str, function: Callable) -> Callable:
    """Wraps a function so that its operations run in a named scope."""

    def call(*args, **options):
        with jax.named_scope(name.replace(" ", "_")):
            return function(*args, **options)

    return call


def mark() -> None:
    """Puts the layers and the guidance into named scopes."""
    for name, (where, what) in SCOPES.items():
        setattr(where, what, scoped(name, getattr(where, what)))
    attention.attend, plain = layers.attend, programs.sega

    def sega(*args, **options):
        transformation = plain(*args, **options)
        return transformation._replace(update=scoped(GUIDANCE, transformation.update))

    programs.sega = sega


def kernels(call: Callable[[], Any]) -> list[tuple[str, str, float]]:
    """Returns (kernel, operation, microseconds) for every kernel that a GPU runs in a call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
        return [
            (event.name, str(dict(event.stats).get("name", "")), event.duration_ns / 1e3)
            for plane in profile.planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        ]


def scope(operation: str) -> str:
    """Returns the innermost scope in an operation's name."""
    parts = [part.replace("_", " ") for part in operation.split("/")]
    return next((part for part in reversed(parts) if part in (*SCOPES, GUIDANCE)), "other")


def kind(kernel: str) -> str:
    return next((what for part, what in KINDS.items() if part in kernel), "fusion and copies")


def shares(events: list[tuple[str, str, float]], named: Callable[[str, str], str]) -> dict[str, dict[str, float]]:
    """Returns the milliseconds and the number of kernels for each name, longest time first."""
    totals: dict[str, dict[str, float]] = {}
    for kernel, operation, spent in events:
        row = totals.setdefault(named(kernel, operation), {"ms": 0.0, "kernels": 0})
        row["ms"] += spent / 1e3
        row["kernels"] += 1
    return dict(sorted(totals.items(), key=lambda item: -item[1]["ms"]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    args = parser.parse_args()
    mark()
    pipe = pipeline(args.dtype, args.attention, Devices(jax.local_devices()[:1]), small=args.tiny)
    rows = []
    for batch, concepts in itertools.product(args.batch, args.concepts):
        edits = [Edit(chr(97 + k), threshold=0.95, warmup=args.steps // 5) for k in range(concepts)]
        settings = {"images_per_prompt": batch, "steps": args.steps, "output": "latent", "progress": False}
        pipe("b", edits, **settings)
        events = kernels(partial(pipe, "b", edits, **settings))
        row = {"concepts": concepts, "batch": batch}
        for what, named in (("layer", lambda _, name: scope(name)), ("kernel", lambda name, _: kind(name))):
            row[what] = shares(events, named)
            total = sum(part["ms"] for part in row[what].values())
            print(f"n = {concepts}, B = {batch}: {total:.1f} ms in {len(events)} kernels, by {what}:")
            for name, part in row[what].items():
                print(f"  {part['ms'] / total:6.1%} {part['ms']:8.2f} ms {part['kernels']:6d}  {name}", flush=True)
        rows.append(row)
    write_results(args, pipe, rows)


if __name__ == "__main__":
    main()
