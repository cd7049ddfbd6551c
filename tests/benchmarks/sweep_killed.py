"""Does a sweep survive being killed? The sweep makes 2,000 pictures with a tiny model and is killed at five random
moments.

    python tests/benchmarks/sweep_killed.py [--kills 5] [--seed 0]

The sweep first runs undisturbed. Then it runs in another folder, where each process is killed with SIGKILL and replaced
by a new one. In the end, there must be 2,000 records and 2,000 readable pictures without duplicates or torn files, all
bit-identical to those of the undisturbed sweep. This takes a few minutes on two CPU cores.
"""

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import tiny

from sega_jax import sweep

GRID = {
    "prompt": ["a cat", "a dog", "a hat", "a bow"],
    "seed": range(25),
    "hat.scale": [-6, -3, 0, 3, 6],
    "hat.warmup": [1, 2, 3, 4],
}


def start(folder: Path) -> subprocess.Popen:
    code = f"from sega_jax import sweep; f = {str(folder)!r}; sweep.run(sweep.kept(f), f, progress=False)"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | cache)


def seen(folder: Path) -> dict[str, str]:
    """Checks every record and picture of a sweep; returns {name: digest of the picture's bytes}."""
    rows = pyarrow.parquet.read_table(folder / "records").to_pylist()
    files = sorted(path.name for path in (folder / "pictures").iterdir())
    assert sorted(Path(row["file"]).name for row in rows) == files, "pictures and records do not match one to one"
    digests = {}
    for row in rows:
        digests[row["name"]] = hashlib.sha256(np.asarray(Image.open(folder / row["file"])).tobytes()).hexdigest()
        assert digests[row["name"]] == row["digest"], f"{row['file']} does not match the digest in its record"
    assert len(digests) == len(rows), "a picture is recorded twice"
    return digests


@click.command(context_settings={"show_default": True})
@click.option("--kills", default=5)
@click.option("--seed", default=0)
def main(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        text = tiny.TEXT | {"num_hidden_layers": 1}
        model = tiny.checkpoint(where / "model", unet=tiny.UNET_0, vae=tiny.VAE_1, text=text)
        description = sweep.Sweep(
            model={"source": str(model)}, call={"steps": 6}, edits={"hat": {"threshold": 0.5}}, grid=GRID
        )
        plan = sweep.plan(description, sweep.Facts.of(description), rows=8)
        counts = plan.counts
        print(
            f"{counts.pictures} pictures, {counts.batches} batches, {counts.evaluations} of {counts.alone} evaluations"
        )
        for folder in ("undisturbed", "killed"):
            sweep.keep(plan, where / folder)
        began = time.perf_counter()
        assert start(where / "undisturbed").wait() == 0
        seconds = time.perf_counter() - began
        print(f"undisturbed: {seconds:.0f} s")
        killed = 0
        while killed < kills:
            # Kill the process at a random moment after a random number of new pictures.
            pictures = where / "killed" / "pictures"
            more = len(list(pictures.iterdir())) + rng.randrange(counts.pictures // (2 * kills))
            process = start(where / "killed")
            while process.poll() is None and len(list(pictures.iterdir())) <= more:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            process.kill()
            assert process.wait() == -9, "the sweep finished before all kills; try another --seed"
            killed += 1
            done, torn = sweep.status(where / "killed"), len(list((where / "killed").rglob(".*")))
            print(
                f"killed {killed} times: {done.done} pictures recorded, {done.batches_done} batches, {torn} files torn"
            )
        assert start(where / "killed").wait() == 0
        ours, theirs = (seen(where / folder) for folder in ("killed", "undisturbed"))
        assert len(ours) == counts.pictures
        assert ours == theirs
        left = list((where / "killed").rglob(".*"))
        print(f"{len(ours)} pictures and records, bit-equal to the undisturbed sweep; {len(left)} files left over")


if __name__ == "__main__":
    main()
