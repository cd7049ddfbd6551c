"""Determines the imports between the library's packages, and draws the import diagram in `sega_jax/README.md`.

`python tests/support/architecture.py` writes the diagram into that file.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import convert
import sega_jax

ROOT = Path(sega_jax.__file__).parent
PAGE = ROOT / "README.md"
START, END = "<!-- written by tests/support/architecture.py -->\n", "<!-- end of the diagram -->\n"


def files(package) -> dict[str, Path]:
    """Returns {dotted name within the package: file}."""
    root = Path(package.__file__).parent
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}


FILES, CONVERT = files(sega_jax), files(convert)
PACKAGES = sorted({name.split(".")[0] for name in FILES} - {"__init__", "__main__"})


def imports(path: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, at the top level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(package: str) -> list[Path]:
    """Returns the files of one package, or of `convert`."""
    if package == "convert":
        return list(CONVERT.values())
    return [path for name, path in FILES.items() if name.split(".")[0] == package]


def imported(package: str) -> set[str]:
    """Returns the packages of `sega_jax` that a package imports."""
    names = {name for path in files_of(package) for name in imports(path)}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "sega_jax" and len(part) > 1 and part[1] in PACKAGES} - {package}


def direct(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that are not implied by other imports. A diagram of all imports would be unreadable."""

    def reached(package: str) -> set[str]:
        return edges[package].union(*(reached(other) for other in edges[package]))

    edges_to_draw = []
    for package, targets in edges.items():
        indirect = set().union(*(reached(target) for target in targets))
        edges_to_draw += [(package, target) for target in sorted(targets - indirect)]
    return edges_to_draw


def diagram() -> str:
    """Returns the diagram in Mermaid. Each arrow points from a package to a package that it imports."""
    packages = [*PACKAGES, "convert"]
    arrows = direct({package: imported(package) for package in packages})
    return "\n".join(["```mermaid", "flowchart TD", *(f"    {a} --> {b}" for a, b in sorted(arrows)), "```", ""])


def with_diagram(page: str) -> str:
    """Returns the page with the current diagram."""
    before, rest = page.split(START)
    return before + START + diagram() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_diagram(PAGE.read_text()))
