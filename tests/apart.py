"""What tests of conversions run in a process of their own: `python apart.py FUNCTION FOLDERS` prints its result."""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import orbax.checkpoint
import transformers

import convert
from convert.__main__ import main

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
            main([str(source), str(dest)], standalone_mode=False)
            os._exit(0)
        while not dest.with_name(f".{dest.name}.sega-jax-convert").exists() and not dest.exists():
            time.sleep(1e-4)
        return child

    def end(child, dest):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, sorted(path.name for path in folder.iterdir() if dest.name in path.name)

    began = time.perf_counter()
    result = {"undisturbed": end(start(folder / "undisturbed"), folder / "undisturbed")}
    seconds = time.perf_counter() - began
    for number in range(5):
        dest = folder / f"killed{number}"
        child = start(dest)
        time.sleep(seconds * random.uniform(number, number + 1) / 8)
        os.kill(child, signal.SIGKILL)
        result[dest.name] = end(child, dest)
    result["again"] = end(start(folder / "killed0"), folder / "killed0")
    child = start(folder / "interrupted")
    time.sleep(seconds * random.uniform(0, 0.1))
    os.kill(child, signal.SIGINT)
    result["interrupted"] = end(child, folder / "interrupted")
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
