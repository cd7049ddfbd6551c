"""Views of the library's behaviour, and how a fault is put into the library and looked for.

A view computes arrays, numbers or words. It is compared with what the public code gave (recorded in
`tests/reference`), with a plain NumPy version, or with its own result before the damage.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from reference import cases
from support import tiny

from faults.damage import Damage

REFERENCE = Path(cases.__file__).parent
# Programs of a fault run once: to optimise them would take longer than it saves.
QUICK = {"xla_backend_optimization_level": 0}


class View(NamedTuple):
    """A view of the library.

    Attributes:
        show: computes the values.
        expected: gives the right values; None takes those of `show` without a fault.
        tolerance: of the relative L2 error of every array; 0 compares exactly.
    """

    show: Callable[[], Any]
    expected: Callable[[], Any] | None = None
    tolerance: float = 0.0


class Fault(NamedTuple):
    """An object of the library and its damage.

    Attributes:
        view: the name of the view that has to show the fault.
        owner: the module, class or dictionary that has the object.
        name: of the attribute or entry.
        damage: from the sound object to the damaged one.
    """

    view: str
    owner: Any
    name: str
    damage: Damage

    def insert(self, monkeypatch: Any) -> None:
        """Replaces the object, also where modules of the package have imported it by name."""
        if isinstance(self.owner, Mapping):
            monkeypatch.setitem(self.owner, self.name, self.damage(self.owner[self.name]))
            return
        kept = vars(self.owner)[self.name]
        if isinstance(kept, classmethod | staticmethod):
            damaged = type(kept)(self.damage(kept.__func__))
        else:
            damaged = self.damage(kept)
        for place, name in {(self.owner, self.name), *_imports(self.owner, kept)}:
            monkeypatch.setattr(place, name, damaged)


def _imports(owner: Any, function: Any) -> Iterator[tuple[ModuleType, str]]:
    """Finds the modules of a package that have imported a function, and its names in them."""
    if isinstance(owner, ModuleType) and callable(function):
        package = owner.__name__.partition(".")[0]
        for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == package]:
            yield from ((module, name) for name, value in list(vars(module).items()) if value is function)


class Views:
    """The views of one file of faults; the expected values are computed once."""

    def __init__(self, views: Mapping[str, View]):
        self.views = views
        self.expected = cache(self._expected)

    def _expected(self, name: str) -> Any:
        view = self.views[name]
        return jax.device_get((view.expected or view.show)())

    def differs(self, name: str) -> bool:
        """Tells whether a view differs from its expected values by more than its tolerance."""
        expected, view = self.expected(name), self.views[name]
        shown = jax.device_get(view.show())
        if view.tolerance:
            return error(shown, expected) > view.tolerance
        pairs = jax.tree.leaves(shown), jax.tree.leaves(expected)
        return len(pairs[0]) != len(pairs[1]) or not all(map(np.array_equal, *pairs))

    def sees(self, fault: Fault, monkeypatch: Any) -> bool:
        """Tells whether the fault's view shows the fault."""
        self.expected(fault.view)
        with monkeypatch.context() as patch:
            fault.insert(patch)
            return self.differs(fault.view)

    def wrong(self) -> set[str]:
        """Returns the names of the views that differ from their expected values."""
        return {name for name in self.views if self.differs(name)}


def error(shown: Any, expected: Any) -> float:
    """Returns the largest relative L2 error of the arrays; it is infinite if an array is not finite."""
    errors = []
    for a, b in zip(jax.tree.leaves(shown), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
    return max(e if np.isfinite(e) else np.inf for e in errors)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Compiles a function as one program and runs it."""
    # A function of its own, so that JAX does not take the program of an earlier, sound trace.
    return jax.jit(lambda *args: function(*args), compiler_options=QUICK)(*args)


@cache
def recorded(name: str) -> dict[str, np.ndarray]:
    """Reads the arrays of a recorded file."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Draws standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(part: str) -> Any:
    """Builds one network of the small Stable Diffusion checkpoint, with its weights."""
    return tiny.filled(getattr(tiny.networks(), part))


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns the result of a call, or the name of the error that it raises for wrong values.

    Other errors pass: a damage that is itself broken must not look like one that is seen.
    """
    try:
        return function(*args, **options)
    except (ValueError, LookupError) as error:
        return type(error).__name__
