"""Views of the library's behaviour, and functions that insert a fault and compare a view with its expected values.

A view computes arrays, numbers or strings. These values are compared with results recorded from the original code (in
`tests/reference`), with results from plain NumPy code, or with the view's own values without the fault.
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
# Programs with a fault run only once, so optimising them would cost more time than it saves.
QUICK = {"xla_backend_optimization_level": 0}


class View(NamedTuple):
    """A view of the library.

    Attributes:
        show: computes the values.
        expected: returns the expected values; None means the values of `show` without a fault.
        tolerance: the largest relative L2 error allowed for an array; 0 compares exactly.
    """

    show: Callable[[], Any]
    expected: Callable[[], Any] | None = None
    tolerance: float = 0.0


class Fault(NamedTuple):
    """A fault: an object in the library, and the damage done to it.

    Attributes:
        view: the name of the view that must show the fault.
        owner: the module, class or dictionary that contains the object.
        name: the name of the attribute or entry.
        damage: maps the original object to the damaged one.
    """

    view: str
    owner: Any
    name: str
    damage: Damage

    def insert(self, monkeypatch: Any) -> None:
        """Replaces the object in its owner and in the package's modules that import it by name."""
        if isinstance(self.owner, Mapping):
            monkeypatch.setitem(self.owner, self.name, self.damage(self.owner[self.name]))
            return
        sound = vars(self.owner)[self.name]
        if isinstance(sound, classmethod | staticmethod):
            damaged = type(sound)(self.damage(sound.__func__))
        else:
            damaged = self.damage(sound)
        for place, name in {(self.owner, self.name), *_imports(self.owner, sound)}:
            monkeypatch.setattr(place, name, damaged)


def _imports(owner: Any, function: Any) -> Iterator[tuple[ModuleType, str]]:
    """Yields the modules of the package that have imported a function, and the function's name in each module."""
    if isinstance(owner, ModuleType) and callable(function):
        package = owner.__name__.partition(".")[0]
        for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == package]:
            yield from ((module, name) for name, value in list(vars(module).items()) if value is function)


class Views:
    """The views of one test file. Expected values are computed once."""

    def __init__(self, views: Mapping[str, View]):
        self.views = views
        self.expected = cache(self._expected)

    def _expected(self, name: str) -> Any:
        view = self.views[name]
        return jax.device_get((view.expected or view.show)())

    def differs(self, name: str) -> bool:
        """Returns whether a view differs from its expected values by more than its tolerance."""
        expected, view = self.expected(name), self.views[name]
        shown = jax.device_get(view.show())
        if view.tolerance:
            return error(shown, expected) > view.tolerance
        pairs = jax.tree.leaves(shown), jax.tree.leaves(expected)
        return len(pairs[0]) != len(pairs[1]) or not all(map(np.array_equal, *pairs))

    def sees(self, fault: Fault, monkeypatch: Any) -> bool:
        """Returns whether the fault's view shows the fault."""
        self.expected(fault.view)
        with monkeypatch.context() as patch:
            fault.insert(patch)
            return self.differs(fault.view)

    def wrong(self) -> set[str]:
        """Returns the names of the views whose values differ from the expected ones."""
        return {name for name in self.views if self.differs(name)}


def error(shown: Any, expected: Any) -> float:
    """Returns the largest relative L2 error of the arrays, or infinity if an array is not finite."""
    errors = []
    for a, b in zip(jax.tree.leaves(shown), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
    return max(e if np.isfinite(e) else np.inf for e in errors)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Compiles a function as one program and runs it."""
    # JAX must not reuse a program that was traced without the fault, so this is a new function each time.
    return jax.jit(lambda *args: function(*args), compiler_options=QUICK)(*args)


@cache
def recorded(name: str) -> dict[str, np.ndarray]:
    """Returns {name: array} for the arrays in a recorded file."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Draws float32 values from the standard normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(part: str) -> Any:
    """Builds one of the small Stable Diffusion checkpoint's networks, with its weights."""
    return tiny.filled(getattr(tiny.networks(), part))


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns the result of a call, or the name of the ValueError or LookupError that it raises.

    Other errors propagate, so that an error in the damage itself is not mistaken for a detected fault.
    """
    try:
        return function(*args, **options)
    except (ValueError, LookupError) as error:
        return type(error).__name__
