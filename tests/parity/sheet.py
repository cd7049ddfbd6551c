"""Makes a contact sheet with our pictures, diffusers' pictures from the same noise, and ten times their difference.

Run it in the `tests` folder: python -m parity.sheet CHECKPOINT SHEET.png
"""

import sys

import jax
import numpy as np
from PIL import Image, ImageDraw
from support import tiny

from parity.theirs import first, fresh, load, schedule
from sega_jax import Edit

PROMPT = "a portrait of a person"
EDITS = [
    Edit("glasses", 4, 0.95, 3),
    Edit("beard", 4, 0.95, 3),
    Edit("long hair", 4, 0.95, 3),
    Edit("hat", 4, 0.95, 3),
    Edit("heart eyes", 4, 0.95, 3),
    Edit("glasses", -10, 0.9, 2),
    Edit("bald", 4, 0.95, 3),
]
COLUMNS = ["ours", "diffusers", "ours, edited", "diffusers, edited", "difference x 10"]
CALL = {"guidance_scale": 4}
MOMENTUM = {"momentum_scale": 0.3, "momentum_beta": 0.6}
MARGIN = 24


def ours(pipe, latents, edits):
    return pipe([PROMPT] * len(EDITS), edits, steps=20, latents=latents, output="float", **CALL, **MOMENTUM).images


def theirs(reference, latents, edit=None):
    edits = {} if edit is None else {
        "editing_prompt": edit.concept,
        "reverse_editing_direction": edit.scale < 0,
        "edit_guidance_scale": abs(edit.scale),
        "edit_threshold": edit.threshold,
        "edit_warmup_steps": edit.warmup,
        "edit_momentum_scale": MOMENTUM["momentum_scale"],
        "edit_mom_beta": MOMENTUM["momentum_beta"],
    }  # fmt: skip
    call = CALL | edits | {"num_inference_steps": 20, "latents": first(latents), "output_type": "np"}
    return reference([PROMPT] * len(latents), **call).images


def main(checkpoint, sheet):
    semantic, reference = load(checkpoint, "float32", jax.local_devices()[:1])
    schedule(semantic, reference, tiny.DDIM)
    latents = fresh(range(len(EDITS)), semantic.pipeline.latent_shape())(2**32 - 1)
    columns = [
        ours(semantic.pipeline, latents, ()),
        theirs(reference, latents),
        ours(semantic.pipeline, latents, [[edit] for edit in EDITS]),
        np.concatenate([theirs(reference, latents[i : i + 1], edit) for i, edit in enumerate(EDITS)]),
    ]
    columns.append(np.clip(10 * np.abs(columns[2] - columns[3]), 0, 1))
    print("largest differences, unedited and edited:", *(np.abs(columns[i] - columns[i + 1]).max() for i in (0, 2)))

    height, width = columns[0].shape[1:3]
    page = Image.new("RGB", (len(columns) * width, len(EDITS) * (height + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for c, (title, column) in enumerate(zip(COLUMNS, columns, strict=True)):
        draw.text((c * width + 4, 4), title, "black")
        for r, picture in enumerate(column):
            top = MARGIN + r * (height + MARGIN)
            page.paste(Image.fromarray((255 * picture).round().astype(np.uint8)), (c * width, top + MARGIN))
            if c == 0:
                draw.text((4, top + 6), f"{EDITS[r].concept}, scale {EDITS[r].scale:g}", "black")
    page.save(sheet)


if __name__ == "__main__":
    main(*sys.argv[1:])
