"""Does a sweep survive being killed? The sweep makes 2,000 pictures with a tiny model and is killed at 20 random
moments.

    python tests/benchmarks/sweep_killed.py [--kills 20] [--seed 0]

The sweep first runs undisturbed. Then it runs in another folder, where each process is killed with SIGKILL and replaced
by a new process. Most kills happen between two pictures of a batch. In the end, there must be 2,000 records and 2,000
readable pictures without duplicates or torn files. All pictures must be bit-identical to the undisturbed run's, and no
picture may have been written twice. The script also counts the evaluations that were repeated. It takes about ten
minutes on two CPU cores.
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


# Runs the sweep in a folder, and writes the number of evaluations so far into a file after each chunk of calls.
CODE = """
import sys
from sega_jax import sweep
from sega_jax.sweep.running.prefixes import SharedRun

folder, log = sys.argv[1:]
advance, before = SharedRun.advance, [0]


def counted(shared, begun, rows):
    for step in advance(shared, begun, rows):
        with open(log, "a") as file:
            file.write(f"{shared.evaluations - before[0]}\\n")
        before[0] = shared.evaluations
        yield step


SharedRun.advance = counted
sweep.run(sweep.kept(folder), folder, progress=False)
"""


def start(folder: Path) -> subprocess.Popen:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", CODE, str(folder), str(log(folder))]
    return subprocess.Popen(command, env=os.environ | cache)


def log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def evaluations(folder: Path) -> int:
    """Returns the number of evaluations that all processes for a folder have computed."""
    return sum(map(int, log(folder).read_text().split()))


def written(folder: Path) -> dict[str, int]:
    """Returns {file name of a picture: time at which the file was written}."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "pictures").iterdir() if not p.name.startswith(".")}


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
@click.option("--kills", default=20)
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
        killed, before = 0, {}
        while killed < kills:
            # Kill the process at a random moment after a random number of new pictures.
            pictures = where / "killed" / "pictures"
            more = len(list(pictures.iterdir())) + rng.randrange(counts.pictures // (2 * kills))
            process = start(where / "killed")
            while process.poll() is None and len(list(pictures.iterdir())) <= more:
                time.sleep(0.01)
            # On average, the kills leave more than half of the sweep to the last process.
            time.sleep(rng.uniform(0, seconds / kills / 4))
            process.kill()
            assert process.wait() == -9, "the sweep finished before all kills; try another --seed"
            now = written(where / "killed")
            assert before.items() <= now.items(), "a picture was written twice"
            killed, before = killed + 1, now
            done, torn = sweep.status(where / "killed"), len(list((where / "killed").rglob(".*")))
            print(
                f"killed {killed} times: {done.done} pictures recorded, {done.batches_done} batches, {torn} files torn"
            )
        assert start(where / "killed").wait() == 0
        ours, theirs = (seen(where / folder) for folder in ("killed", "undisturbed"))
        assert len(ours) == counts.pictures
        assert ours == theirs
        assert before.items() <= written(where / "killed").items(), "a picture was written twice"
        repeated = evaluations(where / "killed") - evaluations(where / "undisturbed")
        batches = repeated / kills / (counts.evaluations / counts.batches)
        print(f"{repeated} evaluations were repeated, for each kill the work of {batches:.2f} batches")
        left = list((where / "killed").rglob(".*"))
        print(f"{len(ours)} pictures and records, bit-equal to the undisturbed sweep; {len(left)} files left over")


if __name__ == "__main__":
    main()
