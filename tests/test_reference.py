"""Checks that every public name has an example that runs, and that every name in a docstring exists."""

import ast
import builtins
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import sega_jax
import sega_jax.sweep

ROOT = Path(sega_jax.__file__).parents[1]
FILES = sorted([*(ROOT / "sega_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])
EXAMPLES = [path for path in FILES if ">>> " in path.read_text()]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Names in docstrings that do not occur in this library's code, because they belong to other libraries or to files.
FOREIGN = {
    *("BREAK", "CLIPImageProcessorPil", "FlaxPNDMScheduler", "align_corners", "desc", "flax", "leave", "modelspec"),
    *("distributed", "export"),
    *("predict_key", "resnets_0", "serialization", "shard_map", "tiled_decode", "to_bytes", "updates"),
}
FILE_ENDINGS = ("json", "yml", "toml", "bin", "pt", "ckpt", "npy", "npz", "safetensors", "msgpack", "png", "py", "md")


def dotted(path):
    """Returns the dotted name of one of the library's files."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(path):
    return ast.parse(path.read_text())


# Examples


def public_names():
    """Returns {dotted name: class or function} for all public names except constants and aliases."""
    found = {}
    for package, prefix in ((sega_jax, ""), (sega_jax.sweep, "sweep.")):
        for name in (name for name in dir(package) if not name.startswith("_")):
            value = getattr(package, name)
            home = str(getattr(value, "__module__", ""))
            if home.startswith("sega_jax") and getattr(value, "__name__", "") == name:
                found[prefix + name] = value
    return found


def test_public_names_have_examples():
    assert [name for name, value in public_names().items() if ">>> " not in str(inspect.getdoc(value))] == []


class Finder(doctest.DocTestFinder):
    """A doctest finder that also finds functions whose decorator is defined in a different module."""

    def _from_module(self, module, object):
        return getattr(object, "__module__", None) == module.__name__ or super()._from_module(module, object)


def run_examples(path):
    """Runs the examples in the docstrings of a file. Each docstring must import the names that it uses."""
    module = importlib.import_module(dotted(path))
    runner, report = doctest.DocTestRunner(optionflags=OPTIONS), []
    tests = [test for test in Finder().find(module) if test.examples]
    for test in tests:
        test.globs = {"__name__": "__main__"}
        runner.run(test, out=report.append)
    return len(tests), "".join(report)


@pytest.fixture(scope="module")
def examples_folder(tmp_path_factory):
    """Runs the examples in a folder with the sweep from `sega_jax.sweep.run`'s example, which other examples need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        run_examples(ROOT / "sega_jax" / "sweep" / "running" / "run.py")
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_by_default", "examples_folder")
@pytest.mark.parametrize("path", EXAMPLES, ids=dotted)
def test_examples_run(path):
    count, report = run_examples(path)
    assert count
    assert not report, report


# References


def identifiers(tree):
    """Yields the names that a file defines or uses, and the strings in the file that look like names."""
    for node in ast.walk(tree):
        for field in ("id", "name", "attr", "arg", "asname", "module"):
            if isinstance(name := getattr(node, field, None), str):
                yield from name.split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


@cache
def known_names():
    """Returns all names in the library, the names of its modules, and Python's built-in names."""
    names = {part for path in FILES for part in dotted(path).split(".")}
    return names.union(dir(builtins), FOREIGN, *(identifiers(parsed(path)) for path in FILES))


@cache
def members():
    """Returns {class name: names in the class and its bases, including attributes that methods set}."""
    found, bases = {}, {}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(identifiers(node))
                bases.setdefault(node.name, set()).update(getattr(base, "id", "") for base in node.bases)
    for _ in range(4):  # bases of bases
        for name, parents in bases.items():
            found[name] = found[name].union(*(found.get(parent, ()) for parent in parents))
    return found


def resolves(name):
    """Returns whether a dotted name resolves to a module, a name in a module, or a member of a class."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(value, part) and part not in getattr(value, "__annotations__", ()):
                return False
            value = getattr(value, part, None)
        return True
    return False


def is_known(reference):
    """Returns whether a name in backticks exists in this library, in Python, or in `FOREIGN`."""
    first, *rest = reference.removesuffix("()").split(".")
    if rest and (rest[-1] in FILE_ENDINGS or rest[-1].isdigit()):
        return True
    if first in ("sega_jax", "convert") and rest:
        return resolves(reference.removesuffix("()"))
    if rest and first in members():
        return rest[0] in members()[first] | FOREIGN
    return {first, *rest} <= known_names()


def references(path):
    """Yields the names in backticks in the docstrings of a file, and their locations."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            for reference in re.findall(r"(?<![\w`])`([A-Za-z_]\w*(?:\.\w+)*(?:\(\))?)`", text):
                yield getattr(node, "name", "the module"), reference


def test_names_in_docstrings_exist():
    wrong = [
        f"{dotted(path)}, {where}: {reference}"
        for path in FILES
        for where, reference in references(path)
        if not is_known(reference)
    ]
    assert wrong == []


def test_a_wrong_name_is_found():
    wrong = ["sega_jax.lod", "sega_jax.Pipeline.kompile", "Pipeline.kompile", "a_function_that_was_renamed()"]
    right = ["sega_jax.load", "sega_jax.sweep.Sweep", "Pipeline.compile", "jax.pmap", "model_index.json"]
    assert [name for name in wrong + right if not is_known(name)] == wrong


@pytest.mark.slow
def test_the_reference_is_complete(tmp_path):
    """The command writes pages that contain all public names and call arguments and that have no broken links."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "reference.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    targets = {name: set(re.findall(r'id="([^"]+)"', text)) for name, text in pages.items()}
    for name in public_names():
        package, _, last = f"sega_jax.{name}".rpartition(".")
        assert last in targets[f"{package.replace('.', '/')}.html"]
    assert {"Pipeline.__call__", "StableDiffusionPipeline.__call__"} <= targets["sega_jax/pipelines/pipeline.html"]
    assert re.search(r"<strong>eta:</strong>", pages["sega_jax/pipelines/pipeline.html"])
    for name, text in pages.items():
        for link in set(re.findall(r'href="([^"]+)"', text)):
            page, target = urldefrag(unquote(link))
            if not page.startswith(("http", "data:", "$")):  # "$" begins a link in the search script
                where = (tmp_path / name).parent / page if page else tmp_path / name
                where = where.resolve().relative_to(tmp_path.resolve()).as_posix()
                assert where in pages, f"{name}: {link}"
                assert not target or target in targets[where], f"{name}: {link}"
