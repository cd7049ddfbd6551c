"""A run of a sweep in a process of its own: `python sweeping.py FOLDER [RENAMES]`, killed before it renames a file for
the last time."""

import os
import signal
import subprocess
import sys

import jax

from sega_jax import load, sweep

SETTINGS = {
    "jax_num_cpu_devices": "8",
    "jax_default_matmul_precision": "float32",
    "jax_persistent_cache_min_compile_time_secs": "0.2",
}


def start(*words):
    """Its process, which takes the programs that this one has compiled."""
    cache = {"jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or ""}
    settings = {name.upper(): value for name, value in (SETTINGS | cache).items()}
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main(folder, renames=None):
    plan = sweep.Folder(folder).plan()
    if renames is not None:
        replace, left = os.replace, iter(range(int(renames)))

        def kill(source, target):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
    sweep.run(plan, folder, load(plan.facts.model["source"], devices=jax.local_devices()[:1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
