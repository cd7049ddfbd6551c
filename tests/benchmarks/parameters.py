"""How many parameters do the networks have? In half precision, each parameter takes 2 bytes.

    python tests/benchmarks/parameters.py

The script builds the published networks without the values of their parameters, so it needs neither checkpoints nor
much memory.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.published import BYT5_XL, IF_1_XL, IF_2_L, SD_2, T5_XXL, VIT_H, X4, X4_VAE

import sega_jax
from sega_jax.systems import deepfloyd, paella, upscaler


def networks() -> dict[str, Any]:
    stage1, stage2 = deepfloyd.Models.build(T5_XXL, IF_1_XL), deepfloyd.Models.build(None, IF_2_L)
    token = paella.Models.build(BYT5_XL, VIT_H, {}, {}, {})
    return {
        "the demo model": sega_jax.load().models,
        "T5-XXL, the text encoder of DeepFloyd-IF": stage1.text_encoder,
        "IF-I-XL, stage I of DeepFloyd-IF": stage1.unet,
        "IF-II-L, stage II of DeepFloyd-IF": stage2.unet,
        "x4 upscaler with its text encoder": upscaler.Models.build(SD_2["text_encoder"], X4, X4_VAE),
        "ByT5-XL, a text encoder of Paella": token.byt5,
        "CLIP ViT-H/14, a text encoder of Paella": token.clip,
        "Paella's prior": token.prior,
        "Paella with its VQGAN": (token.denoiser, token.vqgan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    found = {name: sum(leaf.size for leaf in jax.tree.leaves(network)) for name, network in networks().items()}
    for name, count in found.items():
        print(f"{name:45} {count:15,}")
    if args.json:
        args.json.write_text(json.dumps({"jax": jax.__version__, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
