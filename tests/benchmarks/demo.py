"""How long does a pipeline call with the demo model take on a CPU, in this library and in diffusers?

Both libraries use the same float32 weights and settings, and run alternately on the same cores. The script needs torch
and diffusers. Run it from the root of the repository, for example on two cores:

    taskset -c 0,1 python tests/benchmarks/demo.py --concepts 0,1,4 --batch 1,4 --steps 20 --dtype float32 --json FILE
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from end_to_end import arguments, write_results

import sega_jax
from sega_jax import Edit
from sega_jax.pipelines.loading import DEMO

PROMPT, WORDS = "a portrait of a woman with brown hair", ("glasses", "smile", "hat", "earrings")


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    pipe = sega_jax.load(DEMO, dtype=args.dtype)
    theirs = diffusers.SemanticStableDiffusionPipeline.from_pretrained(
        DEMO, torch_dtype=getattr(torch, args.dtype), safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    rows = []
    for batch in args.batch:
        for concepts in args.concepts:
            words, settings = WORDS[:concepts], {"images_per_prompt": batch, "steps": args.steps, "progress": False}
            edits = [Edit(word, warmup=args.steps // 5) for word in words]
            their_call = {"editing_prompt": list(words), "edit_warmup_steps": args.steps // 5} if words else {}
            their_call |= {"num_images_per_prompt": batch, "num_inference_steps": args.steps}

            def ours(edits=edits, settings=settings) -> None:
                pipe(PROMPT, edits, seed=1, **settings)

            def other(call=their_call) -> None:
                theirs(PROMPT, generator=torch.Generator().manual_seed(1), **call)

            first = timed(ours)
            other()
            pairs = [(timed(ours), timed(other)) for _ in range(args.repeat)]
            our_times, torch_times = (list(column) for column in zip(*pairs, strict=True))
            row = {
                "concepts": concepts,
                "batch": batch,
                "first": first,
                "seconds": our_times,
                "torch": torch_times,
            }
            rows.append(row)
            mine, others = statistics.median(our_times), statistics.median(torch_times)
            print(
                f"n = {concepts}, B = {batch}: {mine:.3f} s ({min(our_times):.3f} to {max(our_times):.3f}),"
                f" first call {first:.1f} s; torch {others:.3f} s"
                f" ({min(torch_times):.3f} to {max(torch_times):.3f}), {others / mine:.2f} times as long",
                flush=True,
            )
    write_results(args, pipe, rows)


if __name__ == "__main__":
    main()
