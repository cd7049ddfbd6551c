"""How long does diffusers' `SemanticStableDiffusionPipeline` take in PyTorch on the same machine?

The architecture, cells and measurements are the same as in `end_to_end.py`, which must not run at the same time.
`--mode` selects either eager execution or the mode in which `torch.compile` compiles the UNet. The script needs torch
and diffusers. Run it from the root of the repository:

    python tests/benchmarks/torch_sega.py --mode eager --dtype float16 --concepts 0,1,2,4,8 --batch 1,4,8 --json FILE
    python tests/benchmarks/torch_sega.py --mode reduce-overhead --dtype float16 --concepts 1,4 --batch 1,4 --json FILE
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from end_to_end import SMALL, arguments, measure, report

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny
from support.published import SD_1

MODES = ("eager", "default", "reduce-overhead", "max-autotune")


def plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name[0] != "_"}


def pipeline(dtype: str, mode: str, device: str, *, small: bool) -> diffusers.SemanticStableDiffusionPipeline:
    """Returns diffusers' SD 1.5 pipeline with torch's initial weights; its networks are small if `small` is true."""
    configs = {part: plain(config) for part, config in (SMALL if small else SD_1).items()}
    folder = Path(tempfile.mkdtemp())
    tiny.tokenizer(folder, configs["text_encoder"]["max_position_embeddings"])
    pipe = diffusers.SemanticStableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**configs["vae"]),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder"])),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        unet=diffusers.UNet2DConditionModel(**configs["unet"]),
        scheduler=diffusers.DDIMScheduler(**plain(tiny.DDIM)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    if mode != "eager":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
    return pipe


def cell(pipe: Any, concepts: int, batch: int, device: str, args: Any) -> dict[str, Any]:
    edits = {}
    if concepts:
        edits = {"editing_prompt": [chr(97 + k) for k in range(concepts)], "edit_threshold": 0.95}
        edits["edit_warmup_steps"] = args.steps // 5

    def call(seed: int) -> float:
        draw = torch.Generator(device).manual_seed(seed)
        began = time.perf_counter()
        settings = {"num_images_per_prompt": batch, "num_inference_steps": args.steps, "guidance_scale": 7.0}
        pipe("b", generator=draw, output_type="np", **settings, **edits)
        return time.perf_counter() - began

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    row = measure(call, concepts, batch, args)
    return row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mode", default="eager", choices=MODES)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = pipeline(args.dtype, args.mode, device, small=args.tiny)
    about = {
        "backend": f"diffusers, {args.mode}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        **{name: value for name, value in vars(args).items() if name != "json"},
    }
    print(about)
    rows = []
    for batch in sorted(args.batch):
        for concepts in sorted(args.concepts):
            rows.append(cell(pipe, concepts, batch, device, args))
            report(about, rows, args.json)


if __name__ == "__main__":
    main()
