"""Who may import whom, and what `import sega_jax` brings."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import convert
import sega_jax


def files(package):
    root = Path(package.__file__).parent
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}


FILES, CONVERT = files(sega_jax), files(convert)
NETWORKS = {"arrays", "nn"}
METHOD = {"guidance", "schedules", "solvers", "sample"}
CALLS = NETWORKS | METHOD
CALLS |= {
    "branches",
    "checkpoint",
    "chunks",
    "compiled",
    "components",
    "embeddings",
    "output",
    "parallel",
    "progress",
    "prompts",
    "rows",
    "safety",
    "sizes",
}
CALLS |= {"small", "systems", "text"}
# The modules and packages of ours that each may import; what is not here is at the top and may import all.
ALLOWED = {
    "arrays": set(),
    "branches": {"guidance"},
    "captions": set(),
    "compiled": set(),
    "guidance": {"arrays"},
    "schedules": {"schedules"},
    "solvers": set(),
    "sample": METHOD,
    "parallel": {"compiled"},
    "progress": set(),
    "checkpoint": {"arrays"},
    "orbax": {"checkpoint"},
    "nn": NETWORKS,
    "safety": {"checkpoint", "nn"},
    "text": {"checkpoint"},
    "vectors": {"arrays"},
    "components": {"checkpoint", "schedules"},
    "embeddings": {"parallel", "prompts"},
    "chunks": {"schedules"},
    "sizes": {"nn", "rows", "systems"},
    "small": {"arrays", "schedules", "sizes"},
    "hub": {"checkpoint"},
    "prompts": {"text"},
    "rows": {"arrays", "guidance", "prompts"},
    "systems": NETWORKS | METHOD | {"systems"},
    "running": CALLS,
    "pipeline": CALLS | {"running"},
    "paella": CALLS | {"pipeline", "running"},
    "output": {"systems"},
    "kinds": {"checkpoint", "nn", "systems"},
    "pickled": {"checkpoint"},
    "naming": {"checkpoint", "nn"},
    "single_file": {"checkpoint", "naming", "nn", "pickled"},
    "inversion": {"arrays", "checkpoint", "nn", "pickled", "text"},
    "lora": {"arrays", "checkpoint", "naming", "nn"},
    "sources": {"checkpoint", "hub", "kinds", "orbax", "single_file"},
    "loading": CALLS | {"inversion", "kinds", "lora", "orbax", "paella", "pipeline", "sources"},
    "cascade": CALLS | {"captions", "kinds", "loading", "pipeline", "sources"},
    "faces": CALLS
    | {"captions", "faces", "hub", "inversion", "lora", "kinds", "loading", "paella", "pipeline", "running", "sources"},
    "sweep": CALLS | {"branches", "demo", "kinds", "loading", "pictures", "pipeline", "running", "sources", "sweep"},
}
OF_CONVERSION = {
    "checkpoint",
    "kinds",
    "loading",
    "naming",
    "nn",
    "orbax",
    "pickled",
    "progress",
    "shell",
    "single_file",
}
OF_CONVERSION |= {"sources", "text"}
LIGHT = ["arrays", "guidance", "schedules", "solvers", "sample", "parallel"]


def imports(path):
    """The dotted names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name):
    """The module or package of ours in an import, or None."""
    parts = name.split(".")
    known = len(parts) > 1 and any(file.split(".")[0] == parts[1] for file in FILES)
    return parts[1] if parts[0] == "sega_jax" and known else None


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[0] in ALLOWED])
def test_layers(name):
    layer = name.split(".")[0]
    assert {ours(i) for i in imports(FILES[name])} - {None} <= ALLOWED[layer]


def test_every_rule_is_of_a_file():
    assert ALLOWED.keys() | set(LIGHT) <= {name.split(".")[0] for name in FILES}


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[0] in LIGHT])
def test_the_method_needs_jax_and_optax_only(name):
    roots = {i.split(".")[0] for i in imports(FILES[name])} - set(sys.stdlib_module_names)
    assert roots <= {"jax", "numpy", "optax", "scipy", "sega_jax"}


@pytest.mark.parametrize("name", FILES)
def test_no_torch(name):
    assert not {i.split(".")[0] for i in imports(FILES[name])} & {"torch", "diffusers", "accelerate", "convert"}


@pytest.mark.parametrize("name", CONVERT)
def test_conversion(name):
    """It needs no pipeline and no torch."""
    names = set(imports(CONVERT[name]))
    assert {ours(i) for i in names} - {None} <= OF_CONVERSION
    assert not {i.split(".")[0] for i in names} & {"torch", "diffusers"}


@pytest.mark.parametrize("name", FILES)
def test_pmap_is_in_one_file(name):
    names = [getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(ast.parse(FILES[name].read_text()))]
    assert ("pmap" in names) == (name == "parallel")


@pytest.mark.parametrize("package", ["sega_jax", "convert"])
def test_the_package_is_light(package):
    """No library that is for a checkpoint alone, no torch and no device, until one is loaded."""
    code = f"import jax, sys, {package}; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices('cpu')))"
    heavy = {"torch", "transformers", "diffusers", "orbax", "tensorstore", "matplotlib", "pandas", "scipy"}
    heavy |= {"huggingface_hub", "jax.experimental.pallas.tpu"}
    code += f"; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "set()"]


def public(module):
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


PUBLIC = public(sega_jax) | public(convert)


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if not inspect.ismodule(v)))
def test_public_names_have_docstrings(name):
    value = PUBLIC[name]
    assert (inspect.getdoc(value) or "").strip()
    if not inspect.isclass(value):
        return
    for method, function in public(value).items():
        if inspect.isfunction(function) and value.__module__.startswith("sega_jax"):
            assert function.__doc__, f"{name}.{method}"


@pytest.mark.parametrize("path", [*FILES.values(), *CONVERT.values()], ids=lambda path: path.name)
def test_files_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
