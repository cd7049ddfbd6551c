"""Checks the code's structure: only a family's own files may check which family a checkpoint belongs to, and files and
functions must be short."""

import ast
from pathlib import Path

import pytest

import convert
import sega_jax
from sega_jax.systems import registry

ROOT = Path(sega_jax.__file__).parent
FILES = sorted([*ROOT.rglob("*.py"), *Path(convert.__file__).parent.rglob("*.py")])
FAMILIES = ("stable_diffusion", "sdxl", "sdxl_text", "deepfloyd", "upscaler", "paella", "paella_text", "paella_call")
FAMILIES += ("paella_prior",)
# A family's own files: its system, its pipeline with diffusers' arguments, and its converter.
OWN = {ROOT / "systems" / f"{name}.py" for name in FAMILIES} | {
    ROOT / "systems" / "registry.py",  # lists all families
    ROOT / "__init__.py",  # exports their text types
    *(ROOT / "diffusers_api").glob("*.py"),
    Path(convert.__file__).parent / "paella.py",
    Path(convert.__file__).parent / "deepfloyd.py",
}
CLASSES = {"Models", "Extras", "SDXLText", "T5Text", "PaellaText"}
CLASSES |= {system.call.__name__ for system in registry.systems().values()}


def imported_families(node):
    """Returns the family modules and classes that are imported by a statement."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    families = {f"sega_jax.systems.{name}" for name in FAMILIES}
    return [name for name in names if any(name == one or name.startswith(f"{one}.") for one in families)]


def mentions(node, words):
    return any(getattr(n, "attr", getattr(n, "id", None)) in words for n in ast.walk(node))


def questions(tree):
    """Yields the places where a file checks the family.

    These are imports of a family's class, `isinstance` checks for such a class, comparisons with a registered system or
    its name, and uses of `getattr` or `hasattr` on models.
    """
    for node in ast.walk(tree):
        yield from (f"line {node.lineno}: imports {name}" for name in imported_families(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "isinstance" and mentions(node.args[1], CLASSES):
                yield f"line {node.lineno}: isinstance against a family's class"
            if node.func.id in ("getattr", "hasattr") and mentions(node.args[0], {"models"}):
                yield f"line {node.lineno}: {node.func.id} on models"
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(mentions(side, {"SYSTEM", "STAGE_1", "STAGE_2"}) for side in sides):
                yield f"line {node.lineno}: comparison with a system"
            known = set(registry.systems()) | {system.title for system in registry.systems().values()}
            if any(isinstance(side, ast.Constant) and side.value in known for side in sides):
                yield f"line {node.lineno}: comparison with the name of a family"


@pytest.mark.parametrize("path", [path for path in FILES if path not in OWN], ids=lambda path: path.name)
def test_only_a_familys_own_files_ask_for_it(path):
    assert list(questions(ast.parse(path.read_text()))) == []


def test_the_check_finds_questions():
    asked = """
from sega_jax.systems.sdxl import Models
if isinstance(call, PaellaCall) or system is stable_diffusion.SYSTEM or pipe.system.name == "sdxl":
    getattr(pipe.models, "vae", None)
"""
    assert len(list(questions(ast.parse(asked)))) == 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                assert body[-1].end_lineno - body[0].lineno < 80, node.name
