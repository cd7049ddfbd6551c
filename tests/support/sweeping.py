"""What a sweep's folder holds; and a worker of a sweep in a process of its own, killed before it renames a picture or
records once more than so often: `python sweeping.py FOLDER WORKER WORKERS [RENAMES]`."""

import os
import signal
import subprocess
import sys

import jax
import pyarrow.parquet
import pytest

from sega_jax import Pipeline, load, sweep
from sega_jax.sweep.running.run import _Run

SETTINGS = {
    "jax_num_cpu_devices": "8",
    "jax_default_matmul_precision": "float32",
    "jax_persistent_cache_min_compile_time_secs": "0.2",
}
# Longer than any of them takes to start; one that is killed is missed at once.
PATIENCE = 20.0


def start(*words):
    """Its process, which takes the programs that this one has compiled."""
    cache = {"jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or ""}
    settings = {name.upper(): value for name, value in (SETTINGS | cache).items()}
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def records(folder):
    return pyarrow.parquet.read_table(folder / "records").to_pylist()


def made(plan, pipe):
    """Returns the pictures of a plan by their names, and the rows that went through the network."""
    sweeping = _Run(plan, None, Pipeline(**pipe.components))
    images = {}
    for batch in plan.batches:

        def tell(i, image, finite, flagged, names=batch.names):
            assert finite
            assert flagged is None
            images[names[i]] = image

        sweeping._make(batch, sweeping._points(batch), tell)
    return images, sweeping.shared.evaluations


def run_and_crash(plan, folder, pipe, renames):
    """Runs a plan and stops, as the end of a process does, before a picture or record more than these is renamed."""
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
    """Every picture once, to the byte, recorded once, and nothing else."""
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
