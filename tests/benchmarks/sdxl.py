"""How much time and memory does Stable Diffusion XL need at full size, and how close is the time to the floor?

The model is SDXL base at 1024x1024 with random weights (speed does not depend on their values). Each call is measured
from prompt to pixels. The default is one concept. The floor is the time that the arithmetic (all of the UNet's branches
at every step, and decoding) would take at the device's highest rate for bfloat16 matrix products (the ceiling). Run
this from the root of the repository, with PYTHONPATH=. if the library is not installed:

    python tests/benchmarks/sdxl.py --json FILE

`--tiny` tests the script itself with a small network that runs on any CPU; ignore the timings.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from weights import filled

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny
from support.published import XL

from sega_jax import Edit, Pipeline
from sega_jax.method import schedules
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import sdxl
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair

SMALL = {"text_encoder": tiny.TEXT, "text_encoder_2": tiny.TEXT_XL_2, "unet": tiny.UNET_XL, "vae": tiny.VAE}
# TFLOP that the UNet needs for one branch at one step, and that the decoder needs for one picture.
UNET, DECODER = 6.76, 10.5


def pipeline(dtype: str, attention: str, devices: Devices, *, small: bool) -> Pipeline:
    """Returns an SDXL pipeline with random weights; its networks are small if `small` is true."""
    configs = SMALL if small else XL
    models = filled(sdxl.Models.build(**configs, attention=attention), dtype, devices)
    folder = Path(tempfile.mkdtemp())
    length, words = (configs["text_encoder"][name] for name in ("max_position_embeddings", "vocab_size"))
    tiny.tokenizer(folder, length)
    both = TokenizerPair(Tokenizer(folder, length, words), Tokenizer(folder, length, words))
    return Pipeline(sdxl.SYSTEM, models, both, schedules.from_config(tiny.EULER), devices, extras=sdxl.Extras())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("steps", 30), ("concepts", 1), ("batch", 1), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="cudnn", choices=["xla", "cudnn", "pallas"])
    parser.add_argument("--ceiling", type=float, default=796.0, help="the rate for matrix products, in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()

    devices = Devices(jax.local_devices()[:1])
    began = time.perf_counter()
    pipe = pipeline(args.dtype, "xla" if args.tiny else args.attention, devices, small=args.tiny)
    jax.block_until_ready(pipe.models)
    placed = time.perf_counter() - began
    edits = [Edit(chr(97 + k), threshold=0.95, warmup=args.steps // 5) for k in range(args.concepts)]

    def call(seed: int) -> float:
        began = time.perf_counter()
        rows = {"images_per_prompt": args.batch, "steps": args.steps, "seed": seed}
        out = pipe("b", edits, **rows, output="uint8", progress=False)
        assert out.finite.all()
        return time.perf_counter() - began

    first = call(0)
    seconds = [call(i) for i in range(1, 1 + args.repeat)]
    median = statistics.median(seconds)
    floor = args.batch * ((2 + args.concepts) * args.steps * UNET + DECODER) / args.ceiling
    results = {
        "device": devices.devices[0].device_kind,
        "jax": jax.__version__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(pipe.models)),
        **{name: value for name, value in vars(args).items() if name != "json"},
        "placed": placed,
        "first": first,
        "seconds": seconds,
        "floor": floor,
        "share_of_floor": floor / median,
        "peak_gib": (devices.devices[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30,
    }
    print(f"{results['device']}, jax {results['jax']}, {results['parameters']:,} parameters, {vars(args)}")
    print(f"weights placed     {placed:8.2f} s")
    print(f"first call         {first:8.2f} s, of which compiling about {first - median:.2f} s")
    print(f"later calls        {median:8.3f} s (median; {min(seconds):.3f} to {max(seconds):.3f})")
    print(f"floor              {floor:8.3f} s, {floor / median:.1%} of the time")
    print(f"peak memory        {results['peak_gib']:8.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
