"""Checks which packages each package imports, and which libraries `import sega_jax` loads."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support.architecture import CONVERT, FILES, PACKAGES, files_of, imported, imports

import convert
import sega_jax

# The packages that each package may import.
ALLOWED = {
    "method": set(),
    "text": set(),
    "nn": {"method"},
    "weights": {"method", "nn", "text"},
    "systems": {"method", "nn", "text", "weights"},
    "pipelines": {"method", "nn", "text", "weights", "systems"},
    "diffusers_api": {"method", "nn", "text", "weights", "systems", "pipelines"},
    "demo": {"method", "nn", "text", "weights", "systems", "pipelines"},
    "sweep": {"method", "nn", "text", "weights", "systems", "pipelines", "demo"},
    "cli": {"method", "nn", "text", "weights", "systems", "pipelines", "diffusers_api", "demo", "sweep"},
    "convert": {"method", "nn", "text", "weights", "systems", "pipelines"},
}
# {package: the only libraries that it may import}.
LIBRARIES = {
    "method": {"jax", "numpy", "optax", "scipy", "sega_jax"},
    "nn": {"jax", "numpy", "flax", "sega_jax"},
}


def test_every_package_has_a_rule():
    assert set(PACKAGES) | {"convert"} == ALLOWED.keys()


def test_the_root_has_few_entries():
    root = Path(sega_jax.__file__).parent
    assert len([path for path in root.iterdir() if path.name != "__pycache__"]) <= 14


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_what_is_below_them(package):
    assert imported(package) <= ALLOWED[package]


def test_modules_have_no_cycles():
    """No module imports itself through other modules. Imports inside functions count."""
    known = {f"sega_jax.{name}".removesuffix(".__init__"): path for name, path in FILES.items()}

    def targets(path):
        """Yields the imported modules. For `from package import module`, the module is yielded, not the package."""
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in known else node.module for name in names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    edges = {name: {i for i in targets(path) if i in known and i != name} for name, path in known.items()}
    done, path = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for other in sorted(edges[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)


@pytest.mark.parametrize("package", LIBRARIES)
def test_the_theory_needs_few_libraries(package):
    roots = {i.split(".")[0] for path in files_of(package) for i in imports(path)} - set(sys.stdlib_module_names)
    assert roots <= LIBRARIES[package]


def test_no_torch():
    for path in FILES.values():
        assert not {i.split(".")[0] for i in imports(path)} & {"torch", "diffusers", "accelerate", "convert"}, path
    for path in CONVERT.values():
        assert not {i.split(".")[0] for i in imports(path)} & {"torch", "diffusers"}, path


def test_pmap_is_in_one_file():
    def names(path):
        return [getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(ast.parse(path.read_text()))]

    assert [name for name, path in FILES.items() if "pmap" in names(path)] == ["pipelines.execution.devices"]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["sega_jax", "convert"])
def test_the_package_is_light(package):
    """Importing the package initialises no device and loads none of the libraries that are needed only for
    checkpoints."""
    code = f"import jax, sys, {package}; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices('cpu')))"
    heavy = {"torch", "transformers", "diffusers", "orbax", "tensorstore", "matplotlib", "pandas", "scipy", "fsspec"}
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
            assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_files_have_docstrings():
    for path in [*FILES.values(), *CONVERT.values()]:
        assert ast.get_docstring(ast.parse(path.read_text())), path
