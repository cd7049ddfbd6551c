"""Writes the API reference as a folder of HTML pages: `python tests/support/reference.py FOLDER`.

pdoc makes the pages from the docstrings. This script chooses the modules and names, and adds documentation that pdoc
does not find: comments on class fields, and call arguments.
"""

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import jax
import pdoc
from pdoc import doc_ast, docstrings

import sega_jax
import sega_jax.diffusers_api
import sega_jax.sweep
from sega_jax.method.arguments import arguments, documented
from sega_jax.pipelines.pipeline import Pipeline, pipeline_class
from sega_jax.systems.call import Call
from sega_jax.systems.registry import systems

ROOT = Path(sega_jax.__file__).parent
PACKAGES = (sega_jax, sega_jax.sweep, sega_jax.diffusers_api)  # all their names are public
# Modules that define base classes and returned types but are not on the architecture page.
FURTHER = ["pipelines.loaded_checkpoint", "pipelines.pure", "pipelines.execution.compile_report"]
FURTHER += ["diffusers_api.base", "diffusers_api.switches"]
# The order of public names on a page, by the modules that define them.
ORDER = ["pipelines.loading", "pipelines.pipeline", "method.guidance.edits", "pipelines", "method.guidance"]
ORDER += ["diffusers_api", "text", "systems", "method"]
_google = docstrings.google


def page_modules() -> list[str]:
    """Returns the modules that the architecture page names, such as `method/solvers.py`."""
    files = re.findall(r"`((?:\w+/)*\w+)\.py`", (ROOT / "README.md").read_text())
    known = [name for name in dict.fromkeys(files) if (ROOT / f"{name}.py").exists()]
    return [name.replace("/", ".").removesuffix(".__init__") for name in known]


def module_names() -> list[str]:
    """Returns the names of all modules that have a page."""
    inner = [f"sega_jax.{name}" for name in dict.fromkeys([*page_modules(), *FURTHER])]
    return [*(package.__name__ for package in PACKAGES), *inner]


def exports(package: ModuleType) -> list[str]:
    """Returns the public classes and functions of a package, including those that the package imports only when they
    are first used."""
    names = [name for name in dict.fromkeys([*vars(package), *dir(package)]) if not name.startswith("_")]
    return sorted((name for name in names if is_ours(getattr(package, name))), key=lambda name: place(package, name))


def place(package: ModuleType, name: str) -> int:
    """Returns a name's position on its page, which depends on the module that defines the name."""
    home = getattr(package, name).__module__.removeprefix("sega_jax.") + "."
    return next((i for i, module in enumerate(ORDER) if home.startswith(f"{module}.")), len(ORDER))


def is_ours(value: Any) -> bool:
    """Returns whether a value is a class or a function of this library."""
    return str(getattr(value, "__module__", "")).startswith("sega_jax") and hasattr(value, "__qualname__")


def field_comments(cls: type) -> Iterator[tuple[str, str]]:
    """Yields the fields of a class that have comments, either on the same line or on the lines above it."""
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        parts = [comments[node.end_lineno]] if node.end_lineno in comments else above
        text = " ".join(comment.lstrip("# ") for comment in parts)
        if text:
            yield node.target.id, text[:1].upper() + text[1:] if re.match("[a-z]+ ", text) else text


def document_class(cls: type) -> None:
    """Documents the fields of a class, and its `__call__` if it has one."""
    if "__annotations__" in vars(cls):
        fields = doc_ast.walk_tree(cls).var_docstrings  # pdoc keeps this dictionary and reads it later
        for name, text in field_comments(cls):
            fields.setdefault(name, text)
        if hasattr(cls, "__dataclass_fields__"):
            for name, one in arguments(cls).items():
                fields.setdefault(name, one.documentation)
    if issubclass(cls, tuple):
        for name in getattr(cls, "_fields", ()):
            vars(cls)[name].__doc__ = ""  # instead of "Alias for field number 0"
        cls.__new__.__doc__ = None
        if str(cls.__doc__).startswith(f"{cls.__name__}("):
            cls.__doc__ = None
    for name, value in list(vars(cls).items()):
        if (shown := undecorated(value)) is not value:
            setattr(cls, name, shown)
    call = vars(cls).get("__call__")
    if inspect.isfunction(call) and call.__doc__ and "@public" not in call.__doc__:
        call.__doc__ = f"{inspect.cleandoc(call.__doc__)}\n\n@public"  # tells pdoc to show it


def undecorated(function: Any) -> Any:
    """Returns the function that a decorator from `sega_jax.method.arguments` wraps, with the decorator's signature."""
    if not (inspect.isfunction(function) and hasattr(function, "__wrapped__") and hasattr(function, "__signature__")):
        return function
    inner = function.__wrapped__
    copy = FunctionType(inner.__code__, inner.__globals__, function.__name__, inner.__defaults__, inner.__closure__)
    copy.__doc__, copy.__module__, copy.__qualname__ = function.__doc__, inner.__module__, function.__qualname__
    copy.__kwdefaults__, copy.__signature__ = inner.__kwdefaults__, function.__signature__  # type: ignore[attr-defined]
    return copy


def document_pipelines() -> list[str]:
    """Documents `Pipeline` with the arguments that all families share, and each family's class with that family's
    arguments.

    Returns:
        The names of the classes, which are added to `sega_jax.pipelines.pipeline`.
    """
    for name, method in (("__call__", Pipeline._call), ("compile", Pipeline._compile)):
        placeholder = vars(Pipeline)[name]
        self_parameter, *_ = inspect.signature(method).parameters.values()
        shared = inspect.signature(Call).parameters.values()
        result = inspect.signature(method).return_annotation
        placeholder.__signature__ = inspect.Signature([self_parameter, *shared], return_annotation=result)
        placeholder.__doc__ = documented(method.__doc__ or "", Call)
    home = import_module(Pipeline.__module__)
    names = []
    for system in systems().values():
        cls = pipeline_class(Pipeline, system)
        cls.__doc__ = f"The pipeline for {system.title}, which `sega_jax.load` returns for such a checkpoint."
        setattr(home, cls.__name__, cls)
        names.append(cls.__name__)
    return ["Pipeline", *names]


def markdown(text: str) -> str:
    """Converts a docstring to Markdown. Asterisks, as in [batch, *space], stay literal, and examples become code."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("    ") or lines[i - 1].endswith((":", ".", ",", ";")):
            parts = re.split(r"(`[^`]*`)", line)
            lines[i] = "".join(part if part.startswith("`") else re.sub(r"\*(?=\w)", r"\\*", part) for part in parts)
    # Markdown needs an empty line before code, but section headings are not followed by one.
    text = re.sub(r"^(?![A-Z]\w*:$)(\S.*:)\n(?=    )", r"\1\n\n", "\n".join(lines), flags=re.MULTILINE)
    sections = re.compile(r"^Examples?:\n((?:(?: +.*)?\n?)+)", re.MULTILINE)
    return _google(sections.sub(example, text))


def example(match: re.Match[str]) -> str:
    """Turns an example into a block of highlighted code."""
    return f"###### Example:\n\n```pycon\n{inspect.cleandoc(match[1]).rstrip()}\n```\n"


def build(folder: Path) -> None:
    """Writes the reference to a folder. This changes docstrings, so it must run in a separate process."""
    docstrings.google = markdown
    for cls in (jax.Array, jax.Device):
        cls.__module__, cls.__qualname__ = "jax", cls.__name__.rpartition(".")[2]  # annotations show the public names
    names = module_names()
    modules = [import_module(name) for name in names]
    for package in modules:
        if hasattr(package, "__path__"):
            public = exports(package)
            package.__all__ = public  # type: ignore[attr-defined]
            vars(package).update({name: getattr(package, name) for name in public})
    import_module(Pipeline.__module__).__all__ = document_pipelines()  # type: ignore[attr-defined]
    for module in modules:
        for name, value in list(vars(module).items()):
            setattr(module, name, undecorated(value))
            if isinstance(value, type) and is_ours(value):
                document_class(value)
    abouts = (str(module.__doc__).partition("\n\n")[0].replace("\n", " ") for module in modules)
    titles = [f"- `{name}`: {about}" for name, about in zip(names, abouts, strict=True)][1:]
    sega_jax.__doc__ = "\n".join([str(sega_jax.__doc__), "", "Other pages:", "", *titles])
    pdoc.render.configure(docformat="google", math=True, footer_text=f"sega_jax {sega_jax.__version__}")
    only_these = f"!(?!(?:{'|'.join(map(re.escape, names))})$)"
    pdoc.pdoc(*names, only_these, output_directory=folder)
    for page in [*folder.rglob("*.html"), folder / "search.js"]:
        page.write_text(polished(page.read_text()))


def polished(text: str) -> str:
    """Removes decorators whose effect is visible in the signature, empty lists, and the path of this checkout."""
    text = re.sub(r'<div class="decorator decorator-(takes|declared_by)">.*?</div>', "", text)
    text = re.sub(r"<h2>Submodules</h2>\s*<ul>\s*</ul>", "", text)
    return text.replace(str(ROOT), "sega_jax")


def main(words: Sequence[str]) -> None:
    """Runs the command."""
    if len(words) != 1:
        sys.exit("usage: python tests/support/reference.py FOLDER")
    build(Path(words[0]))
    print(f"The reference is in {words[0]}/index.html")


if __name__ == "__main__":
    main(sys.argv[1:])
