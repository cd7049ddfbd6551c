"""Text conditioning: what the branches of a call are told, a pytree of each family's own type.

text = pipe.encode(["a castle", "a house"])     # ClipText(states=float32[2, 77, 768])
pipe(text)                                      # in place of the words
text[0].save("castle.safetensors")
"""

import dataclasses
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

T = TypeVar("T", bound="Text")
_TYPE = "sega_jax_text"


class Text:
    """Texts as a family's network takes them: fields are arrays whose first axis is that of the texts, or None.

    A subclass is declared by `@conditioning`. `text[i]` is one text, with an axis of length 1 for it.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __len__(self) -> int:
        return len(jax.tree.leaves(self)[0])

    def __getitem__(self: T, i: int | slice) -> T:
        if not isinstance(i, slice):
            i = operator.index(i)
            if not -len(self) <= i < len(self):
                raise IndexError(f"text {i} of {len(self)}")
            i = slice(i, i + 1 or None)
        return jax.tree.map(lambda leaf: leaf[i], self)

    def __iter__(self: T) -> Iterator[T]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = [f"{field.name}={_shown(getattr(self, field.name))}" for field in fields]
        return f"{type(self).__name__}({', '.join(shown)})"

    def save(self, path: str | Path) -> None:
        """Writes the texts as a safetensors file, in their own dtype; a file that is there is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(self).items() if value is not None}
        try:
            save_file(arrays, os.path.expanduser(path), {_TYPE: type(self).__name__})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from None

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Reads texts that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, or holds something else.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with safe_open(os.path.expanduser(path), framework="numpy") as file:
                kind = (file.metadata() or {}).get(_TYPE)
                found = set(file.keys())
                if kind != cls.__name__:
                    raise ValueError(f"{path} holds {kind or 'no text conditioning'}, expected {cls.__name__}")
                if not found or not found <= set(names):
                    held = ", ".join(sorted(found)) or "nothing"
                    raise ValueError(f"{path} holds {held}, expected the arrays {', '.join(names)} of {cls.__name__}")
                return cls(**{name: file.get_tensor(name) if name in found else None for name in names})
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist") from None
        except (SafetensorError, TypeError, OSError) as error:
            raise ValueError(f"{path} is no readable text conditioning ({error}); write it with save") from None


@dataclass_transform(eq_default=False, frozen_default=True)
def conditioning(cls: type[T]) -> type[T]:
    """Makes a subclass of `Text` a frozen dataclass and a pytree."""
    made = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    return jax.tree_util.register_dataclass(made)


def check_rows(name: str, text: Text) -> None:
    """Checks that a text has at least one row, and as many in each of its arrays.

    Args:
        name: of the argument, for errors.

    Raises:
        TypeError: a field is no array, or there is none.
        ValueError: there are no rows, or arrays have different numbers of them.
    """
    arrays = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    arrays = {field: value for field, value in arrays.items() if value is not None}
    wrong = [field for field, value in arrays.items() if not getattr(value, "shape", ())]
    if wrong or not arrays:
        raise TypeError(f"{name} has {text!r}, expected arrays with one row for each text, as encode returns them")
    rows = {field: value.shape[0] for field, value in arrays.items()}
    if len(set(rows.values())) > 1:
        counts = " and ".join(f"{count} of {field}" for field, count in rows.items())
        raise ValueError(f"{name} has {counts}, expected one of each for every text")
    if 0 in rows.values():
        raise ValueError(f"{name} has {text!r}, which holds no texts; give at least one")


def stacked(texts: Sequence[T]) -> T:
    """Joins texts of equal shapes to one, on the host.

    Raises:
        ValueError: their shapes differ.
    """
    if len({tuple(leaf.shape[1:] for leaf in jax.tree.leaves(text)) for text in texts}) > 1:
        shapes = " and ".join(dict.fromkeys(map(repr, texts)))
        raise ValueError(f"texts have different shapes: {shapes}; encode them in one call")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *texts)


def _shown(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__ if value is not None else "None"
