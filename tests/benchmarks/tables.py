"""Prints the tables of measurements in markdown, from the JSON files that the benchmarks wrote.

    python tests/benchmarks/tables.py NAME        # prints one table; without NAME, lists the names
    python tests/benchmarks/tables.py --write     # refreshes the tables in all markdown files and notebooks

Each table stands between two comments in a markdown file, or in a markdown cell of a notebook. A test compares the
table with the output of this script:

    <!-- NAME: python tests/benchmarks/tables.py NAME -->
    <!-- end -->

Times are medians. The floor is the time that the networks' arithmetic alone would take at an assumed rate of 796
TFLOP/s (`--ceiling`). The tables show the floor divided by the measured time, so 100% is ideal. Each
table is followed by the device, the versions and the commands used for the measurements.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
EVALUATION = ROOT / "sega_jax" / "demo" / "evaluation"
MARKER = re.compile(r"<!-- (?P<name>[\w-]+): (?P<command>.*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
# {prefix of a result file's name: the script that writes the file}. Longer prefixes must come before shorter ones.
SCRIPTS = {"sd15_h200_torch": "torch_sega", "sd15": "end_to_end", "compile": "end_to_end", "profile": "profile_scopes"}
# The options that result files record.
OPTIONS = (
    "parts", "stage", "mode", "concepts", "batch", "devices", "share", "rows", "seeds", "part", "steps", "repeat",
    "bytes", "dtype", "support", "attention", "demo",
)  # fmt: skip
# The heading of columns that contain the results of `efficiency`.
FLOOR = "floor / {} (ideal: 100%)"
# The cells in the short table, as (concepts, batch).
CELLS = ((0, 1), (1, 1), (2, 1), (4, 1), (1, 4), (4, 4))
# The concepts in the short table of edits.
WORDS = ("glasses", "smile", "beard", "long hair", "red hair", "hat", "dark skin", "hoodie", "red clothes")
WORDS += ("blue background",)
CASES = {
    "sdxl_h200": ("Stable Diffusion XL", 1024),
    "deepfloyd_h200_batch1": ("DeepFloyd-IF, stage I", 64),
    "deepfloyd_h200_batch4": ("DeepFloyd-IF, stage I", 64),
    "deepfloyd_h200_stage2": ("DeepFloyd-IF, stage II", 256),
    "deepfloyd_h200_upscaler": ("x4 upscaler", 1024),
    "paella_h200_batch1": ("Paella", 256),
    "paella_h200_batch4": ("Paella", 256),
}

TITLES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}
# {option of tpu_aot.py: field of its results}.
TPU_OPTIONS = {"families": "family", "generations": "generation", "programs": "program", "attention": "attention"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def about(name: str) -> dict[str, Any]:
    """Returns the arguments, device and versions that a result file records."""
    result = read(name)
    known = dict(result.get("about", result))
    if name.startswith("scaling"):
        known["devices"] = [row["devices"] for row in result["rows"]]
    if name.startswith("deepfloyd"):
        known["repeat"] = len(result["seconds"])
    return known


def command(name: str, before: str = "") -> str:
    """Returns the command that wrote a result file, from the arguments that the file records."""
    known = about(name)
    script = next((script for start, script in SCRIPTS.items() if name.startswith(start)), name.split("_")[0])
    words = [f"XLA_FLAGS={shlex.quote(known['flags'])}"] if known.get("flags") else []
    words += [before] if before else []
    words += ["python", f"tests/benchmarks/{script}.py"]
    for option in OPTIONS:
        value = known.get(option)
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if value is True:
            words.append(f"--{option}")
        elif value not in (None, False, ""):
            words.append(f"--{option} {value}")
    return " ".join([*words, "--json FILE"])


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), "", caption])


def measured(*names: str, before: str = "") -> str:
    """Returns the caption for a table built from the given result files."""
    devices = dict.fromkeys(about(name).get("device", "cpu") for name in names)
    versions = dict.fromkeys(about(name).get("versions") or f"jax {about(name)['jax']}" for name in names)
    commands = dict.fromkeys(f"`{command(name, before)}`" for name in names)
    return f"{', '.join(devices)}; {'; '.join(versions)}. Measured by {', '.join(commands)}."


def cells(name: str) -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["concepts"], row["batch"]): row for row in read(name)["found"]}


def per_picture(row: dict[str, Any]) -> float:
    return median(row["seconds"]) / row["batch"]


def efficiency(row: dict[str, Any]) -> str:
    """Returns the floor divided by the measured time."""
    return f"{row['floor'] / median(row['seconds']):.0%}"


def compared(row: dict[str, Any] | None, reference: dict[str, Any]) -> str:
    """Returns the milliseconds per picture, and the ratio of this time to the reference's."""
    if row is None:
        return "–"
    return f"{1e3 * per_picture(row):.0f} ms ({per_picture(row) / per_picture(reference):.1f}x)"


def speed() -> str:
    names = ("sd15_h200", "sd15_h200_torch_eager", "sd15_h200_torch_reduce-overhead")
    ours, *others = map(cells, names)
    rows = [
        [*cell, f"{1e3 * per_picture(ours[cell]):.0f} ms"]
        + [compared(other.get(cell), ours[cell]) for other in others]
        + [efficiency(ours[cell])]
        for cell in CELLS
    ]
    head = ["concepts", "batch", "sega_jax", "diffusers", "diffusers, torch.compile", FLOOR.format("sega_jax time")]
    return table(head, rows, measured(*names))


def stable_diffusion() -> str:
    columns = {
        "sd15_h200_flags": "with flags",
        "sd15_h200_float16": "float16",
        "sd15_h200_torch_eager": "diffusers, float16",
        "sd15_h200_torch_eager_bfloat16": "diffusers, bfloat16",
        "sd15_h200_torch_reduce-overhead": "diffusers, float16, torch.compile",
    }
    ours, others = cells("sd15_h200"), [cells(name) for name in columns]
    rows = []
    for cell, row in sorted(ours.items(), key=lambda item: item[0][::-1]):
        line = [*cell, f"{1e3 * per_picture(row):.0f} ms", *(compared(other.get(cell), row) for other in others)]
        rows.append([*line, efficiency(row), f"{row['first']:.1f} s", f"{row['peak_gib']:.1f} GiB"])
    head = ["concepts", "batch", "bfloat16", *columns.values(), FLOOR.format("bfloat16 time")]
    head += ["first call", "peak memory"]
    return table(head, rows, measured("sd15_h200", *columns))


def systems(*names: str) -> str:
    rows = []
    for name in names:
        row, (title, pixels) = read(name), CASES[name]
        line = [title, pixels, row["steps"], row["batch"], f"{per_picture(row):.2f} s", efficiency(row)]
        rows.append([*line, f"{row['peak_gib']:.1f} GiB", f"{row['first']:.0f} s"])
    head = ["", "pixels", "steps", "batch", "per picture", FLOOR.format("time"), "peak memory", "first call"]
    return table(head, rows, measured(*names))


def compilation() -> str:
    cold, cached = cells("compile_h200_cold"), cells("compile_h200_cached")
    rows = [[n, batch, *(f"{c[n, batch]['first']:.1f} s" for c in (cold, cached))] for n, batch in cold]
    cache = "JAX_COMPILATION_CACHE_DIR=FOLDER JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0"
    caption = measured("compile_h200_cold", "compile_h200_cached", before=cache)
    return table(["concepts", "batch", "first call, nothing cached", "in the next process"], rows, caption)


def startup() -> str:
    load, compiled = read("startup_cpu_load")["found"], read("startup_cpu_compile")["found"]
    beyond = median(load["import"]["both"]) - median(load["import"]["jax"])
    times = {(row["form"], row["what"], row["cold"]): f"{median(row['seconds']):.1f} s" for row in load["load"]}
    rows = [["`import sega_jax`, CPU seconds beyond `import jax`", f"{beyond:.2f} s", ""]]
    for form in ("safetensors", "orbax"):
        for what, words in (("read", "reading the files alone"), ("load", "`load`")):
            rows.append([f"{words}, {form}", times[form, what, True], times[form, what, False]])
    seconds = [f"{compiled[state]['compiling']:.1f} s" for state in ("cold", "cached")]
    rows.append(["`pipe.compile`, the programs alone", *seconds])
    head = ["", "files on the disk, nothing cached", "files in memory, programs cached"]
    return table(head, rows, measured("startup_cpu_load", "startup_cpu_compile"))


def demo() -> str:
    rows = [
        [n, batch, *(f"{median(row[name]):.2f} s" for name in ("seconds", "torch"))]
        for (n, batch), row in sorted(cells("demo_cpu").items(), key=lambda item: item[0][::-1])
    ]
    return table(["concepts", "batch", "sega_jax", "diffusers"], rows, measured("demo_cpu"))


def scaling(name: str) -> str:
    rows = []
    for row in read(name)["rows"]:
        shares = [f"{row[name]:.1%}" for name in ("efficiency", "outside")]
        line = [row["devices"], f"{row['pictures_per_second']:.2f}", *shares]
        rows.append([*line, f"{row['difference']:g}" if "difference" in row else "–"])
    head = ["GPUs", "pictures per second", "efficiency", "time outside compiled programs", "difference of the latents"]
    return table(head, rows, measured(name))


def sweep() -> str:
    rows = []
    for row in read("sweep_h200")["found"]:
        title = {True: "sweep", False: "sweep without sharing", None: "single calls"}[row.get("shared")]
        rows.append([title, f"{row['pictures'] / row['seconds']:.2f}", f"{row['evaluations'] / row['pictures']:.1f}"])
    return table(["", "pictures per second", "UNet evaluations per picture"], rows, measured("sweep_h200"))


def sweep_scaling() -> str:
    rows = [
        [row["devices"], f"{row['pictures'] / row['seconds']:.2f}", f"{row['efficiency']:.1%}", row["different"]]
        for row in read("sweep_scaling_h200")["found"]
    ]
    head = ["GPUs", "pictures per second", "efficiency", "pictures that differ from one GPU's"]
    return table(head, rows, measured("sweep_scaling_h200"))


def precision() -> str:
    found = read("precision_h200")["found"]
    middle = {name: median(row[name] for row in found) for name in found[0]}
    rows = [
        [row["seed"], f"{row['decibels']:.1f} dB", f"{row['flipped_first']:.0%}", f"{row['flipped']:.0%}"]
        for row in [*found, middle | {"seed": "median"}]
    ]
    head = ["seed", "PSNR", "positions edited in one dtype alone, first call", "the same, all calls"]
    return table(head, rows, measured("precision_h200"))


def overhead() -> str:
    rows = [
        [n, batch, *(f"{1e3 * median(row[name]):.0f} ms" for name in ("seconds", "bare")), f"{row['over']:.1%}"]
        for (n, batch), row in cells("overhead_h200").items()
    ]
    head = ["concepts", "batch", "pipeline", "scan of the UNet alone", "overhead"]
    return table(head, rows, measured("overhead_h200"))


def profile(kind: str) -> str:
    """Returns the table of times, grouped by "kernel" or "layer"."""
    found = read("profile_h200")["found"]
    columns = [row[kind] for row in found]
    totals = [sum(part["ms"] for part in column.values()) for column in columns]
    rows = [
        [
            name,
            *(
                f"{c[name]['ms']:.1f} ms ({c[name]['ms'] / total:.1%})"
                for c, total in zip(columns, totals, strict=True)
            ),
        ]
        for name in columns[0]
    ]
    return table([kind, *(f"concepts: {row['concepts']}" for row in found)], rows, measured("profile_h200"))


def parameters() -> str:
    found = read("parameters")["found"]
    rows = [[name, f"{count / 1e6:,.1f} million", f"{2 * count / 1e9:.2g} GB"] for name, count in found.items()]
    return table(["network", "parameters", "size in half precision"], rows, measured("parameters"))


def tpu_cells() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "tpu_aot").glob("*.json"))]


def tpu_caption(found: list[dict[str, Any]]) -> str:
    """Returns the caption of a table of programs, with one command for each attention implementation."""
    commands = []
    for attention in dict.fromkeys(row["attention"] for row in found):
        rows = [row for row in found if row["attention"] == attention]
        options = [f"--{name} {','.join(dict.fromkeys(row[key] for row in rows))}" for name, key in TPU_OPTIONS.items()]
        commands.append(f"`python tests/benchmarks/tpu_aot.py {' '.join(options)}`")
    versions = ", ".join(dict.fromkeys(row["versions"] for row in found))
    return f"{versions}. Compiled by {', '.join(commands)}."


def tpu_programs() -> str:
    """Returns the table of full-size programs, as the TPU compiler describes them."""
    found, rows = tpu_cells(), []
    for row in found:
        gigabytes = [f"{row[name] / 1e9:.2f} GB" for name in ("arguments", "temporary", "code")]
        line = [TITLES[row["family"]], row["generation"], row["program"], row["attention"], row["rows"], *gigabytes]
        line += [
            f"{row['bytes'] / 1e9:.1f} GB",
            f"{row['operations'] / 1e12:.2f} TFLOP",
            f"{1e3 * row['roofline']:.0f} ms",
        ]
        rows.append([*line, f"{row['compile_seconds']:.0f} s"])
    head = ["model", "chip", "program", "attention", "pictures", "arguments", "temporary memory", "code"]
    head += ["bytes moved", "operations", "roofline", "compilation"]
    return table(head, rows, tpu_caption(found))


def tpu_fits() -> str:
    """Returns the table of the pictures that fit into a chip's memory."""
    cells = {
        (row["family"], row["generation"], row["program"]): row for row in tpu_cells() if row["attention"] != "xla"
    }
    rows = []
    for (family, generation, program), row in cells.items():
        if program == "advance" and (family, generation, "decode") in cells:
            decode = cells[family, generation, "decode"]
            free = row["memory"] - row["weights"] - row["code"] - decode["code"]
            # The carry is both an argument and a result. Pictures are decoded one at a time.
            per_picture = (row["temporary"] + 2 * row["output"]) / row["rows"]
            pictures = int(free // per_picture) if decode["temporary"] < free else 0
            memory = [f"{row['memory'] / 1e9:.0f} GB", f"{row['weights'] / 1e9:.1f} GB", f"{per_picture / 1e9:.2f} GB"]
            rows.append([TITLES[family], generation, *memory, pictures])
    head = ["model", "chip", "memory", "weights", "for each picture", "pictures that fit"]
    return table(head, rows, tpu_caption(list(cells.values())))


def tpu_attention() -> str:
    """Returns the table of attention implementations, as the TPU compiler describes them."""
    result = read("tpu_attention")
    rows = []
    for row in result["found"]:
        shape = f"{row['rows']} x {row['heads']} x {row['width']}"
        line = [row["network"], row["generation"], shape, row["queries"], row["keys"]]
        for name in ("xla", "pallas", "splash"):
            line.append(f"{row[f'{name}_bytes'] / 1e6:,.0f} MB ({row[f'{name}_temporary'] / 1e6:,.0f} MB)")
        rows.append([*line[:7], f"{(row['pallas_bytes'] + row['read_again']) / 1e6:,.0f} MB", line[7]])
    head = ["network", "chip", "rows x heads x width", "queries", "keys", "XLA", "flash kernel", "with re-reads"]
    head += ["splash kernel"]
    known = result["about"]
    options = f"--generations {known['generations']} --dtype {known['dtype']} --json FILE"
    return table(head, rows, f"{known['versions']}. Compiled by `python tests/benchmarks/tpu_attention.py {options}`.")


def edits(name: str) -> str:
    """Returns the rows for `WORDS` and the mean from the first table that `sega_jax.demo.evaluate.report` wrote."""
    text = (EVALUATION / f"{name}.md").read_text()
    head, _, *rows = [line for line in text.split("\n## ")[1].splitlines() if line.startswith("|")]
    lines = [line.strip("| ").split(" | ") for line in (head, *rows)]
    lines[-1][0] = f"**mean of all {len(rows) - 1} words**"
    (settings,) = re.findall(r"^\(edits: (.*)\)$", text, re.MULTILINE)
    caption = f"{settings}. {text.splitlines()[0]}"
    return table(lines[0], [line for line in lines[1:-1] if line[0] in WORDS] + lines[-1:], caption)


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "systems": partial(systems, *CASES),
    "stable-diffusion": stable_diffusion,
    **{kind: partial(systems, *[n for n in CASES if n.startswith(kind)]) for kind in ("sdxl", "deepfloyd", "paella")},
    "compilation": compilation,
    "startup": startup,
    "demo": demo,
    "scaling": partial(scaling, "scaling_h200"),
    "scaling-four": partial(scaling, "scaling_h200_x4"),
    "sweep": sweep,
    "sweep-scaling": sweep_scaling,
    "precision": precision,
    "overhead": overhead,
    "profile-kernels": partial(profile, "kernel"),
    "profile-layers": partial(profile, "layer"),
    "parameters": parameters,
    "tpu-programs": tpu_programs,
    "tpu-fits": tpu_fits,
    "tpu-attention": tpu_attention,
    "edits": partial(edits, "tables"),
    "edits-paella": partial(edits, "paella"),
}


def documents() -> list[Path]:
    """Returns all markdown files and notebooks."""
    paths = sorted([*ROOT.rglob("*.md"), *ROOT.rglob("*.ipynb")])
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def texts(path: Path) -> list[str]:
    """Returns the text of a markdown file, or the texts of a notebook's markdown cells."""
    if path.suffix == ".md":
        return [path.read_text()]
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def refresh(path: Path) -> None:
    """Updates the tables in a markdown file or notebook."""
    if path.suffix == ".md":
        path.write_text(refreshed(path.read_text()))
        return
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = refreshed("".join(cell["source"])).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def refreshed(text: str) -> str:
    """Returns the markdown text with updated tables."""

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name}: python tests/benchmarks/tables.py {name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"

    return MARKER.sub(one, text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for path in documents():
            refresh(path)
    elif sys.argv[1:]:
        print(TABLES[sys.argv[1]]())
    else:
        print("\n".join(TABLES))
