"""How long does an edited picture take, from words to pixels, and how much memory?

The Stable Diffusion 1.5 architecture at 512x512 with random weights (speed does not depend on their
values), two concepts by default. Prints the time to compile, the time of each later call, the device's
peak memory, and how far half precision is from float32. Run from the repository's root:

    python tests/benchmarks/end_to_end.py --steps 50 --concepts 2 --batch 1 --repeat 5
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from weights import filled

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from published import SD_1

from sega_jax import Edit, Pipeline, schedules
from sega_jax.parallel import Devices
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text import Tokenizer


def pipeline(dtype: str, attention: str, devices: Devices | None = None) -> Pipeline:
    """SD 1.5 with random weights."""
    devices = devices or Devices()
    models = filled(Models.build(**SD_1, attention=attention), dtype, devices)
    folder = Path(tempfile.mkdtemp())
    tiny.tokenizer(folder, 77)
    return Pipeline(models, Tokenizer(folder, 77, 49408), schedules.from_config(tiny.DDIM), devices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("steps", 50), ("concepts", 2), ("batch", 1), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    parser.add_argument("--compare", action="store_true", help="also run float32 and say how far dtype is from it")
    args = parser.parse_args()
    device = jax.local_devices()[0]
    print(f"{len(jax.local_devices())} x {device.device_kind}, jax {jax.__version__}, {vars(args)}")

    edits = [Edit(chr(97 + k), threshold=0.95) for k in range(args.concepts)]
    settings = {"images_per_prompt": args.batch, "steps": args.steps, "output": "float"}
    began = time.perf_counter()
    pipe = pipeline(args.dtype, args.attention)
    print(f"weights placed     {time.perf_counter() - began:8.2f} s")
    began = time.perf_counter()
    out = pipe("a", edits, **settings)
    first = time.perf_counter() - began
    seconds = []
    for i in range(args.repeat):
        began = time.perf_counter()
        out = pipe("b", edits, seed=i, **settings)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    print(f"first call         {first:8.2f} s, of which compiling about {first - median:.2f} s")
    print(f"later calls        {median:8.3f} s (median; {min(seconds):.3f} to {max(seconds):.3f})")
    print(f"a picture          {1e3 * median / args.batch:8.1f} ms")
    print(f"finite             {out.finite.all()}")
    memory = device.memory_stats() or {}
    print(f"peak memory        {memory.get('peak_bytes_in_use', float('nan')) / 2**30:8.2f} GiB")
    if args.compare:
        latents = pipe("a", edits, **settings | {"output": "latent", "steps": 1}).images
        del pipe
        exact = pipeline("float32", "xla")("a", edits, **settings | {"output": "latent", "steps": 1}).images
        print(f"one step, relative to float32: {np.linalg.norm(latents - exact) / np.linalg.norm(exact):.2e}")


if __name__ == "__main__":
    main()
