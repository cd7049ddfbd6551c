"""Reads sweep folders, and runs a sweep's workers in separate processes.

`python sweeping.py FOLDER WORKER WORKERS [RENAMES]` runs a worker. With RENAMES, the worker kills itself before it
renames more than RENAMES pictures and records.
"""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from sega_jax import Pipeline, load, sweep
from sega_jax.sweep.running.run import _Run

SETTINGS = {
    "jax_num_cpu_devices": "8",
    "jax_default_matmul_precision": "float32",
    "jax_persistent_cache_min_compile_time_secs": "0.2",
}
# In seconds; longer than any worker takes to start, so that only killed workers lose their leases.
PATIENCE = 20.0


def start(*words):
    """Starts a worker's process, which shares this process's compilation cache."""
    cache = {"jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or ""}
    settings = {name.upper(): value for name, value in (SETTINGS | cache).items()}
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def hat_plan(source, seeds, scales, **options):
    """Plans a small sweep over the seeds and the scales of one edit."""
    ablation = sweep.Sweep(
        model={"source": str(source)},
        call={"prompt": "a cat", "steps": 3},
        edits={"hat": {"warmup": 1, "threshold": 0.5}},
        grid={"seed": range(seeds), "hat.scale": scales},
    )
    return sweep.plan(ablation, sweep.Facts.of(ablation), rows=2, **options)


def records(folder):
    return pyarrow.parquet.read_table(folder / "records").to_pylist()


def saved(plan, folder):
    """Reads all files of pictures in a sweep's folder; returns {name of the picture: pixels}."""
    names = {file: name for name, file in plan.files.items()}
    return {names[path.name]: np.asarray(Image.open(path)) for path in (folder / "pictures").iterdir()}


class Pictures:
    """A stand-in for `BatchWriter` that keeps a batch's pictures in memory."""

    def __init__(self, names, images):
        self.names, self.images = names, images

    def needs(self, i):
        return True

    def add(self, i, image, finite, flagged, rows):
        assert finite
        self.images[self.names[i]] = image


def make_pictures(plan, pipe):
    """Makes the pictures of a plan; returns {name: picture} and the number of rows that the network evaluated."""
    sweeping = _Run(plan, None, Pipeline(**pipe.components))
    images = {}
    for batch in plan.batches:
        sweeping._make(batch, sweeping._points(batch), Pictures(batch.names, images))
    return images, sweeping.shared.evaluations


def run_and_crash(plan, folder, pipe, renames):
    """Runs a plan and raises SystemExit after renaming `renames` pictures and records, to imitate a process that
    dies."""
    replace, left = os.replace, iter(range(renames))

    def crash(source, target):
        if target.parent.name != "leases" and next(left, None) is None:
            raise SystemExit
        replace(source, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(SystemExit):
            sweep.run(plan, folder, pipe)


def same(folder, done):
    """Checks that a sweep's folder has the same pictures and records as a finished one, and no other files."""
    ours, theirs = ({path.name: path.read_bytes() for path in (f / "pictures").iterdir()} for f in (folder, done))
    assert ours == theirs
    changing = dict.fromkeys(("seconds", "made"))
    ours, theirs = ([row | changing for row in records(f)] for f in (folder, done))
    assert ours == theirs
    assert sorted(path.name for path in folder.iterdir()) == ["leases", "pictures", "plan.json", "records"]
    assert not [path for path in (folder / "records").iterdir() if path.name.startswith(".")]
    assert not list((folder / "leases").iterdir())


def main(folder, worker, workers, renames=None):
    plan = sweep.Folder(folder).plan()
    if renames is not None:
        replace, left = os.replace, iter(range(int(renames)))

        def kill(source, target):
            if target.parent.name != "leases" and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
    pipe = load(plan.facts.model["source"], devices=jax.local_devices()[:1])
    sweep.run(plan, folder, pipe, worker=(int(worker), int(workers)), patience=PATIENCE)


if __name__ == "__main__":
    main(*sys.argv[1:])
