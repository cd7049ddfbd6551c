"""How long does the first picture take, including importing the library, loading the weights and compiling?

A checkpoint with random weights and the architecture of Stable Diffusion 1.5 is written to a temporary folder, as
safetensors and as Orbax. Each measurement runs in a new process.

- The import of the library is measured in CPU seconds, excluding the time of `import jax`.
- Loading is compared with reading the same files. "cold" means that the system was asked to drop the files from its
  page cache (it may ignore the request); "warm" means that the files have just been read. Memory is the increase
  in the process's peak memory on the host; on a CPU, it includes the weights. The imports that `load` needs for
  tokenizers and for Orbax's storage are timed separately.
- `pipe.compile` is measured with an empty persistent cache, and again with the cache that the first run filled. Most of
  the time that is not spent on compiling goes into decoding a picture of noise.

Run this from the root of the repository, with PYTHONPATH=. if the library is not installed:

    python tests/benchmarks/startup.py --json FILE

`--parts load` measures loading only. `--tiny` tests the script itself with a small network that runs on any CPU; ignore
the timings.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from end_to_end import SMALL

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import tiny
from support.published import SD_1

import convert
import sega_jax
from sega_jax import Edit

PARTS = ("import", "load", "compile")
FORMS = ("safetensors", "orbax")
COMPILED = "/jax/core/compile/backend_compile_duration"


def apart(function: Callable, *args: Any) -> Any:
    """Calls a function in a new process and returns the function's result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def imports(repeat: int) -> dict[str, Any]:
    """Measures the CPU seconds for importing JAX alone and with the library, in turn; bytecode is already compiled."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def seconds(modules: str) -> float:
        code = f"import time, {modules}; print(time.process_time())"
        return float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)

    seconds("jax, sega_jax")
    pairs = [(seconds("jax"), seconds("jax, sega_jax")) for _ in range(repeat)]
    return {"jax": [one for one, _ in pairs], "both": [both for _, both in pairs]}


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def forget(folder: Path) -> None:
    """Asks the system to drop a folder's files from the page cache."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> dict[str, float]:
    """Reads all files in a folder, chunk by chunk, into the same buffer."""
    buffer, began = bytearray(2**24), time.perf_counter()
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def peak() -> int:
    """Returns the peak memory of this process in bytes, as Linux reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load(folder: Path, dtype: str) -> dict[str, Any]:
    compilations: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            compilations.append(duration)

    device, began = jax.local_devices()[:1], time.perf_counter()
    importlib.import_module("transformers").CLIPTokenizer  # noqa: B018 - the lookup imports it
    importlib.import_module("tensorstore")
    libraries = time.perf_counter() - began
    jax.block_until_ready(jnp.zeros(1))
    jax.monitoring.register_event_duration_secs_listener(listen)
    before, began = peak(), time.perf_counter()
    pipe = sega_jax.load(folder, dtype=dtype, devices=device)
    jax.block_until_ready(pipe.models)
    return {
        "seconds": time.perf_counter() - began,
        "libraries": libraries,
        "peak_mib": (peak() - before) / 2**20,
        "compilations": len(compilations),
        "compiling": sum(compilations),
        "device": device[0].device_kind,
    }


def compiled(folder: Path, dtype: str, batch: int, concepts: int) -> dict[str, Any]:
    pipe = sega_jax.load(folder, dtype=dtype, devices=jax.local_devices()[:1])
    edits, began = [Edit(chr(97 + k)) for k in range(concepts)], time.perf_counter()
    report = pipe.compile("b", edits, images_per_prompt=batch, output="uint8")
    programs = [program._asdict() for program in report.programs]
    return {"seconds": time.perf_counter() - began, "compiling": report.seconds, "programs": programs}


def loads(folders: dict[str, Path], dtype: str, repeat: int) -> Iterator[dict[str, Any]]:
    """Yields rows of measurements for each file format: reading and loading the checkpoint, each cold and warm."""
    for form, folder in folders.items():
        size = sum(path.stat().st_size for path in files(folder))
        for cold in (True, False):
            for what, function, args in (("read", read, (folder,)), ("load", load, (folder, dtype))):
                results = []
                for _ in range(repeat):
                    if cold:
                        forget(folder)
                    else:
                        read(folder)
                    results.append(apart(function, *args))
                row = {"form": form, "cold": cold, "what": what, "bytes": size}
                yield row | results[0] | {"seconds": [one["seconds"] for one in results]}


def line_of(row: dict[str, Any]) -> str:
    seconds = statistics.median(row["seconds"])
    line = f"{row['form']}, {'cold' if row['cold'] else 'warm'}, {row['what']}: {seconds:.2f} s,"
    line += f" {row['bytes'] / 1e6 / seconds:.0f} MB/s"
    if row["what"] == "load":
        line += f", without {row['libraries']:.1f} s of imports; {row['peak_mib']:.0f} MiB,"
        line += f" {row['compilations']} compilations of {row['compiling']:.2f} s"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help="separated by commas")
    for name, default in (("repeat", 3), ("batch", 1), ("concepts", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="try this script with a small network")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if "import" in args.parts:
        results["import"] = imports(args.repeat)
        jax_alone, both = (statistics.median(results["import"][name]) for name in ("jax", "both"))
        print(f"import: {both - jax_alone:.2f} CPU seconds beyond the {jax_alone:.2f} of jax", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {form: Path(temporary) / form for form in FORMS}
        configs = SMALL if args.tiny else SD_1
        length = configs["text_encoder"]["max_position_embeddings"]
        parts = {"text" if part == "text_encoder" else part: config for part, config in configs.items()}
        tiny.checkpoint(folders["safetensors"], **parts, length=length, dtype=jnp.dtype(args.dtype))
        if "load" in args.parts:
            convert.convert(folders["safetensors"], folders["orbax"])
            results["load"] = []
            for row in loads(folders, args.dtype, args.repeat):
                results["load"].append(row)
                print(line_of(row), flush=True)
        if "compile" in args.parts:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(temporary) / "cache")
            for name in ("cold", "cached"):
                row = results[name] = apart(compiled, folders["safetensors"], args.dtype, args.batch, args.concepts)
                print(f"compile, {name}: {row['seconds']:.1f} s, programs alone {row['compiling']:.1f} s", flush=True)
    if args.json:
        about = {name: value for name, value in vars(args).items() if name != "json"}
        about |= {"backend": "sega_jax", "versions": f"jax {jax.__version__}"}
        args.json.write_text(json.dumps({"about": about, "found": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
