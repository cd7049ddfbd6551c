"""What does the library cost beside the network?

Calls of the pipeline to latents, against a bare `lax.scan` of the same UNet for the same rows, branches and steps, with
classifier-free guidance and DDIM's update and nothing else: what is over is semantic guidance, the solvers' generality,
rows, seeds and the host. The two take turns. Run from the repository's root:

    python tests/benchmarks/overhead.py --concepts 1,4 --batch 1,4 --attention cudnn --json FILE
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from end_to_end import arguments, pipeline, tell_all

from sega_jax import Edit, Pipeline
from sega_jax.pipelines.execution.devices import Devices


@jax.jit
def bare(unet: Any, text: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    """x [rows, height, width, channels] in float32 through the steps of a table of timesteps, factors of x and of the
    estimate, guided with text [rows x branches, tokens, channels], of which the first two branches count."""
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
    given = jax.device_put([text.astype(pipe.dtype), x], device)
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
        jax.block_until_ready(bare(net, *given, table))

    ours(), alone()
    pairs = [(timed(ours), timed(alone)) for _ in range(args.repeat)]
    whole, scan = (list(column) for column in zip(*pairs, strict=True))
    share = statistics.median(whole) / statistics.median(scan) - 1
    print(
        f"n = {concepts}, B = {batch}: {statistics.median(whole):.4f} s a call, {statistics.median(scan):.4f} s bare,"
        f" {share:.1%} over",
        flush=True,
    )
    return {"concepts": concepts, "batch": batch, "seconds": whole, "bare": scan, "over": share}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn", "pallas"])
    args = parser.parse_args()
    pipe = pipeline(args.dtype, args.attention, Devices(jax.local_devices()[:1]), small=args.tiny)
    tell_all(args, pipe, [cell(pipe, n, batch, args) for batch in args.batch for n in args.concepts])


if __name__ == "__main__":
    main()
