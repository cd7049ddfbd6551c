"""Which attention needs fewer bytes and less memory on a TPU, according to its compiler?

For the shapes of published networks, the script compiles XLA's attention, JAX's flash kernel (`attention="pallas"`) and
JAX's splash kernel, and prints the bytes that each program reads and writes, and its temporary memory. For a kernel,
the compiler repeats the estimate of the kernel's author, which counts each input once. The script also prints how many
bytes of keys and values the flash kernel reads again, because it reads them for each block of queries. Install the
extra `tpu-aot` and run this from the root of the repository:

    python tests/benchmarks/tpu_attention.py --generations v5e,v6e
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.topology import TopologyDevices  # isort: skip - it sets variables that JAX reads

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import SingleDeviceSharding

from sega_jax.nn import attention, flash_attention

# {network: [(rows, queries, keys, heads, head width)]}. Three rows are one picture with one concept.
SHAPES = {
    "SD 1.5": [(3, n**2, k, 8, w) for n, w in ((64, 40), (32, 80), (16, 160), (8, 160)) for k in (n**2, 77)],
    "SD 2.1": [(3, n**2, n**2, heads, 64) for n, heads in ((96, 5), (48, 10), (24, 20), (12, 20))],
    "SDXL": [(3, n**2, k, heads, 64) for n, heads in ((64, 10), (32, 20)) for k in (n**2, 77)],
    "SDXL, 4 pictures": [(12, n**2, k, heads, 64) for n, heads in ((64, 10), (32, 20)) for k in (n**2, 77)],
    "autoencoder": [(1, n**2, n**2, 1, 512) for n in (64, 128)],
    "Paella": [(3, 1024, 1024 + 81, 16, 64), (3, 256, 256 + 81, 16, 64)],
}


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, heads: int) -> jax.Array:
    """Computes the same as `attend`, for [batch, positions, heads x width]."""
    batch, queries, channels = q.shape
    width, keys = channels // heads, k.shape[1]
    q, k, v = (flash_attention._padded(x.reshape(*x.shape[:2], heads, width)) for x in (q, k, v))
    padded_queries, padded_keys = q.shape[2], k.shape[2]
    block_q, block_kv = (next(b for b in flash_attention._BLOCKS if n % b == 0) for n in (padded_queries, padded_keys))
    kernel = splash.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([masks.FullMask((padded_queries, padded_keys))] * heads),
        block_sizes=splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv),
    )
    segments = splash.SegmentIds(
        jnp.ones(padded_queries, jnp.int32), (jnp.arange(padded_keys) < keys).astype(jnp.int32)
    )
    scaled = (q / math.sqrt(width)).astype(q.dtype)
    out = jax.vmap(partial(kernel, segment_ids=segments if padded_keys > keys else None))(scaled, k, v)
    return out[:, :, :queries, :width].swapaxes(1, 2).reshape(batch, queries, channels)


def read_again(rows: int, queries: int, keys: int, heads: int, width: int, size: int) -> int:
    """Returns the bytes of keys and values that the flash kernel reads again after the first block of queries.

    Args:
        size: The bytes of a number.
    """
    queries, keys, width = (-(-n // flash_attention._LANES) * flash_attention._LANES for n in (queries, keys, width))
    block = next(block for block in flash_attention._BLOCKS if queries % block == 0)
    return (queries // block - 1) * 2 * rows * heads * keys * width * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--generations", default="v5e,v6e")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    attention._PALLAS_KEYS = 1
    functions = {name: partial(attention.attend, implementation=name) for name in ("xla", "pallas")}
    functions["splash"] = splash_attention
    precision, found = "highest" if args.dtype == "float32" else "default", []
    for generation in args.generations.split(","):
        chip = SingleDeviceSharding(TopologyDevices(generation).devices[0])
        for network, shapes in SHAPES.items():
            for shape in shapes:
                rows, queries, keys, heads, width = shape
                q, k = (
                    jax.ShapeDtypeStruct((rows, n, heads * width), args.dtype, sharding=chip) for n in (queries, keys)
                )
                row = {"generation": generation, "network": network, "rows": rows, "queries": queries, "keys": keys}
                row |= {"heads": heads, "width": width}
                for name, function in functions.items():
                    with jax.default_matmul_precision(precision):
                        traced = jax.jit(partial(function, heads=heads), out_shardings=chip).trace(q, k, k)
                        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
                    row[f"{name}_bytes"] = compiled.cost_analysis()["bytes accessed"]
                    row[f"{name}_temporary"] = compiled.memory_analysis().temp_size_in_bytes
                row["read_again"] = read_again(*shape, jnp.dtype(args.dtype).itemsize)
                print(row, flush=True)
                found.append(row)
                if args.json:
                    known = {"generations": args.generations, "dtype": args.dtype, "versions": f"jax {jax.__version__}"}
                    args.json.write_text(json.dumps({"about": known, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
