"""What tests of conversions run in a process of their own: `python apart.py FUNCTION FOLDERS` prints its result."""

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import orbax.checkpoint
import transformers

import convert
from convert.__main__ import main
from sega_jax.pipelines.loading import describe

# What a conversion imports on the way, so that the children below need not.
assert orbax.checkpoint
assert transformers.CLIPTokenizer


def stop(source, folder):
    """Stops conversions at random moments: how each ended, and the folders that it left under its name.

    They are children of a process that itself opens no array: TensorStore forbids to fork after that.
    """

    def start(dest):
        """A conversion in a child; returns once that writes."""
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            gc.disable()  # JAX has a callback for collections, and Python ignores an interrupt within one
            main([str(source), str(dest)], standalone_mode=False)
            os._exit(0)
        while not dest.with_name(f".{dest.name}.sega-jax-partial").exists() and not dest.exists():
            time.sleep(1e-4)
        return child

    def end(child, dest):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, sorted(path.name for path in folder.iterdir() if dest.name in path.name)

    def stopped(dest, number, share):
        """Stops a conversion after a share of its time. On a busy machine that may be too late: then another one."""
        for _ in range(20):
            child = start(dest)
            time.sleep(seconds * share())
            os.kill(child, number)
            ended = end(child, dest)
            if ended[0]:
                break
            shutil.rmtree(dest)
        return ended

    # Python ignores an interrupt that arrives in a destructor or in a callback of the garbage collector. Compiling the
    # tokenizer's pattern runs many destructors, so it happens here; the children collect no garbage.
    describe(source)
    began = time.perf_counter()
    result = {"undisturbed": end(start(folder / "undisturbed"), folder / "undisturbed")}
    seconds = time.perf_counter() - began
    for part in range(5):
        dest = folder / f"killed{part}"
        result[dest.name] = stopped(dest, signal.SIGKILL, lambda part=part: random.uniform(part, part + 1) / 8)
    result["again"] = end(start(folder / "killed0"), folder / "killed0")
    result["interrupted"] = stopped(folder / "interrupted", signal.SIGINT, lambda: random.uniform(0, 0.1))
    return result


def measure(source, folder):
    """How much memory each way takes at most, beside that of the libraries."""

    def peak():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    before, result = peak(), {}
    convert.convert(source, folder / "orbax")
    result["orbax"] = peak() - before
    convert.convert(folder / "orbax", folder / "back", to="diffusers")
    result["diffusers"] = peak() - before
    return result


if __name__ == "__main__":
    function, *folders = sys.argv[1:]
    print(json.dumps({"stop": stop, "measure": measure}[function](*map(Path, folders))))
