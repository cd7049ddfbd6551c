"""How much host memory does loading need at its peak, relative to the size of the weights in the loaded dtype?

A checkpoint with random weights and the architecture of Stable Diffusion 1.5 is written to a temporary folder in every
file format. It is loaded in each dtype on one CPU device, each time in a new process. Memory here means the increase in
the process's anonymous memory (RssAnon, sampled every millisecond) since the start of loading. It includes the weights,
but not the pages of mapped files, which the system can reclaim. Run this from the root of the repository:

    python tests/benchmarks/load_memory.py

`--tiny` tests the script itself with a small network; ignore the results, because the weights then need less memory
than the rest of the process.
"""

import argparse
import re
import sys
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from startup import apart

sys.path.insert(0, str(Path(__file__).parents[1]))

from end_to_end import SMALL
from support import pickling, tiny
from support.published import SD_1

import convert
import sega_jax
from sega_jax.systems import original_files
from sega_jax.systems.stable_diffusion import Models

FORMS = ("safetensors", "orbax", "single.safetensors", "single.ckpt")


def anonymous() -> int:
    """Returns the anonymous memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def peak(small: Path, source: Path, dtype: str, config: Path | None) -> float:
    """Returns the peak memory during loading, as a multiple of the size of the weights."""
    sega_jax.load(small, dtype=dtype, devices=jax.local_devices()[:1])  # imports and initialisations happen here
    before, most, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most[0] = max(most[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    pipe = sega_jax.load(source, dtype=dtype, devices=jax.local_devices()[:1], config=config)
    jax.block_until_ready(pipe.models)
    stop.set()
    watching.join()
    return (max(most[0], anonymous()) - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.models))


def original(folder: Path, models: Models) -> dict[str, np.ndarray]:
    """Returns a folder's tensors under their single-file names."""
    tensors = {}
    for part, start in (
        ("text_encoder", original_files.CLIP),
        ("unet", original_files.UNET),
        ("vae", original_files.VAE),
    ):
        names = tiny.original_names(getattr(models, part), start)
        (path,) = (folder / part).glob("*.safetensors")
        with safe_open(path, framework="numpy") as file:
            tensors |= {names[key]: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--forms", type=lambda text: text.split(","), default=FORMS, help="separated by commas")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    args = parser.parse_args()
    configs = SMALL if args.tiny else SD_1
    parts = {"text" if part == "text_encoder" else part: config for part, config in configs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = tiny.checkpoint(folder / "small")
        length = configs["text_encoder"]["max_position_embeddings"]
        checkpoint = tiny.checkpoint(folder / "safetensors", **parts, length=length)
        models = Models.build(*(configs[part] for part in Models._fields))
        for form in args.forms:
            if form == "orbax":
                convert.convert(checkpoint, folder / form)
            elif form == "single.ckpt":
                pickling.save({"state_dict": original(checkpoint, models)}, folder / form)
            elif form == "single.safetensors":
                tiny.save_file(original(checkpoint, models), folder / form)
            for dtype in ("float32", "bfloat16"):
                config = checkpoint if form.startswith("single") else None
                ratio = apart(peak, small, folder / form, dtype, config)
                print(f"{form} of float32, loaded in {dtype}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
