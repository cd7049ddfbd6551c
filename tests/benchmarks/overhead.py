"""How much time does the library add to the network's own time?

The benchmark compares pipeline calls, without decoding, with a bare `lax.scan` loop. The loop runs the same UNet for
the same rows, branches and steps, with only classifier-free guidance and DDIM's update. The difference is the cost of
semantic guidance, general solvers, per-row settings, seeds and work on the host. The two versions take turns. Run this
from the root of the repository:

    python tests/benchmarks/overhead.py --concepts 1,4 --batch 1,4 --attention cudnn --json FILE
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from end_to_end import arguments, pipeline, write_results

from sega_jax import Edit, Pipeline
from sega_jax.pipelines.execution.devices import Devices


@jax.jit
def bare(unet: Any, text: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    """Runs a bare sampling loop and returns the final x.

    Args:
        unet: the network.
        text: hidden states of the texts [rows x branches, tokens, channels]; only the first two branches are used.
        x: float32 [rows, height, width, channels].
        table: [steps, 3]; for each step, the timestep, the factor for x and the factor for the estimate.
    """
    texts = unet.project(text)

    def step(x, row):
        timestep, keep, add = row
        out = unet(x, jnp.broadcast_to(timestep, x.shape[:1]), texts).reshape(len(x), -1, *x.shape[1:])
        return keep * x + add * (out[:, 0] + 7 * (out[:, 1] - out[:, 0])), None

    return jax.lax.scan(step, x, table)[0]


def cell(pipe: Pipeline, concepts: int, batch: int, args: Any) -> dict[str, Any]:
    net, device = pipe.models.unet, pipe.devices.devices[0]
    side, width = net.config.sample_size, net.config.cross_attention_dim
    rng = np.random.default_rng(0)
    tokens = pipe.models.text_encoder.config.max_position_embeddings
    text = rng.standard_normal((batch * (2 + concepts), tokens, width))
    x = rng.standard_normal((batch, side, side, net.config.in_channels), np.float32)
    inputs = jax.device_put([text.astype(pipe.dtype), x], device)
    table = jnp.stack([jnp.linspace(980, 0, args.steps), jnp.full(args.steps, 0.99), jnp.full(args.steps, 0.01)], 1)
    edits = [Edit(chr(97 + k), threshold=0.95, warmup=args.steps // 5) for k in range(concepts)]
    settings = {"images_per_prompt": batch, "steps": args.steps, "output": "latent", "progress": False}

    def timed(call: Any) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def ours() -> None:
        pipe("b", edits, seed=1, **settings)

    def alone() -> None:
        jax.block_until_ready(bare(net, *inputs, table))

    ours(), alone()
    pairs = [(timed(ours), timed(alone)) for _ in range(args.repeat)]
    pipeline_seconds, scan = (list(column) for column in zip(*pairs, strict=True))
    share = statistics.median(pipeline_seconds) / statistics.median(scan) - 1
    print(
        f"n = {concepts}, B = {batch}: {statistics.median(pipeline_seconds):.4f} s a call,"
        f" {statistics.median(scan):.4f} s bare, {share:.1%} overhead",
        flush=True,
    )
    return {"concepts": concepts, "batch": batch, "seconds": pipeline_seconds, "bare": scan, "over": share}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn", "pallas"])
    args = parser.parse_args()
    pipe = pipeline(args.dtype, args.attention, Devices(jax.local_devices()[:1]), small=args.tiny)
    write_results(args, pipe, [cell(pipe, n, batch, args) for batch in args.batch for n in args.concepts])


if __name__ == "__main__":
    main()
