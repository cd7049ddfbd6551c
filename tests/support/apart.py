"""Parts of the conversion tests that must run in a separate process: `python apart.py FUNCTION FOLDERS` prints the
function's result as JSON."""

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

# Conversions import these modules lazily. Importing them here loads them before the child processes are forked.
assert orbax.checkpoint
assert transformers.CLIPTokenizer


def stop(source, folder):
    """Stops conversions at random moments and returns {name: (exit code, folders left under that name)}.

    The conversions are forked from a process that opens no array itself, because TensorStore forbids forking after an
    array has been opened.
    """

    def start(dest):
        """Starts a conversion in a child process, and returns once the child writes files."""
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            gc.disable()  # Python ignores an interrupt during JAX's garbage-collection callback
            main([str(source), str(dest)], standalone_mode=False)
            os._exit(0)
        while not dest.with_name(f".{dest.name}.sega-jax-partial").exists() and not dest.exists():
            time.sleep(1e-4)
        return child

    def end(child, dest):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, sorted(path.name for path in folder.iterdir() if dest.name in path.name)

    def start_and_stop(dest, number, share):
        """Stops a conversion after a fraction of its usual time, and retries if the conversion had already finished."""
        for _ in range(20):
            child = start(dest)
            time.sleep(seconds * share())
            os.kill(child, number)
            outcome = end(child, dest)
            if outcome[0]:
                break
            shutil.rmtree(dest)
        return outcome

    # Python ignores an interrupt that arrives in a destructor or in a callback of the garbage collector. Compiling the
    # tokenizer's pattern runs many destructors, so the parent compiles it; the children collect no garbage.
    describe(source)
    began = time.perf_counter()
    result = {"undisturbed": end(start(folder / "undisturbed"), folder / "undisturbed")}
    seconds = time.perf_counter() - began
    for part in range(5):
        dest = folder / f"killed{part}"
        result[dest.name] = start_and_stop(dest, signal.SIGKILL, lambda part=part: random.uniform(part, part + 1) / 8)
    result["again"] = end(start(folder / "killed0"), folder / "killed0")
    result["interrupted"] = start_and_stop(folder / "interrupted", signal.SIGINT, lambda: random.uniform(0, 0.1))
    return result


def measure(source, folder):
    """Returns the peak memory of a conversion in each direction, in bytes, without the libraries' own memory."""

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
