"""Makes finished sweeps without a model. Each picture has a single colour."""

import hashlib

import numpy as np
from PIL import Image

from sega_jax import sweep
from sega_jax.pipelines import png
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import Folder, part, picture
from sega_jax.systems.base import Sizes
from support import tiny

DDIM = {"_class_name": "DDIMScheduler", **tiny.SD_BETAS}
FACTS = sweep.Facts({}, "stable_diffusion", DDIM, Sizes(4, 8, 8, (16, 24)))
MADE = {"finite": True, "flagged": None, "batch": 0, "rows": 4, "calls": 12, "seconds": 0.5, "device": "cpu"}
MADE |= {
    "devices": 1,
    "model": "<b>ours</b>",
    "revision": None,
    "dtype": "float32",
    "sega_jax": "0",
    "jax": "0",
    "made": None,
}


def draw(folder, ablation, colour=lambda settings: (128, 128, 128), batches=None, missing=()):
    """Fills a folder with a sweep's plan, pictures and records.

    Args:
        folder: the folder.
        ablation: the sweep.
        colour: a function that returns a point's colour, given its settings.
        batches: the number of finished batches of at most four pictures. None means all; a negative number leaves out
            the last batches.
        missing: the points whose pictures contain NaN.
    """
    plan, kept = sweep.plan(ablation, FACTS, rows=4, share=False), Folder(folder)
    kept.begin(plan)
    for number, batch in enumerate(plan.batches[:batches]):
        table = []
        for i, name in zip(batch.points, batch.names, strict=True):
            image = Image.new("RGB", (24, 16), colour(plan.sweep[i]))
            own = {"name": name, "file": None, "point": i, "finite": i not in missing}
            own |= {"digest": hashlib.sha256(np.asarray(image).tobytes()).hexdigest()}
            if i not in missing:
                file, data = picture(plan, name), png.encoded(image, "png", {})
                kept.store.write(file, data)
                own |= {"file": file, "file_bytes": len(data), "file_digest": hashlib.sha256(data).hexdigest()}
            table.append(records.settings(plan.point(i), FACTS, "DDIMScheduler") | MADE | own)
        kept.store.write(part(number), records.part(table, plan.sweep, FACTS))
    assert not sweep.problems(folder)
