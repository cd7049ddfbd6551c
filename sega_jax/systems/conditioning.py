"""Text conditioning: the encoded texts of a call's branches, as a pytree. Each family defines its own type.

text = pipe.encode(["a castle", "a house"])     # ClipText(states=float32[2, 77, 768])
pipe(text)                                      # instead of the words
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
    """The base class of text conditioning: encoded texts in the form that a family's network takes.

    Each field is None or an array whose first axis runs over the texts. Declare subclasses with `@conditioning`.
    `text[i]` is one text; its arrays keep a first axis of length 1. Texts can also be sliced and iterated over.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from sega_jax import ClipText
        >>> text = ClipText(np.zeros((2, 77, 768), np.float32))
        >>> text[0]
        ClipText(states=float32[1, 77, 768])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text.save(f"{folder}/texts.safetensors")
        ...     type(text).load(f"{folder}/texts.safetensors")
        ClipText(states=float32[2, 77, 768])
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __len__(self) -> int:
        return len(jax.tree.leaves(self)[0])

    def __getitem__(self: T, i: int | slice) -> T:
        if not isinstance(i, slice):
            i = operator.index(i)
            if not -len(self) <= i < len(self):
                raise IndexError(f"text index {i} is out of range for {len(self)} texts")
            i = slice(i, i + 1 or None)
        return jax.tree.map(lambda leaf: leaf[i], self)

    def __iter__(self: T) -> Iterator[T]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        summaries = [f"{field.name}={_summary(getattr(self, field.name))}" for field in fields]
        return f"{type(self).__name__}({', '.join(summaries)})"

    def save(self, path: str | Path) -> None:
        """Writes the texts to a safetensors file, keeping their dtypes. An existing file is replaced.

        Raises:
            OSError: The file cannot be written.
        """
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(self).items() if value is not None}
        try:
            save_file(arrays, os.path.expanduser(path), {_TYPE: type(self).__name__})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from None

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Reads texts from a file written by `save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged, or does not contain texts of this class.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with safe_open(os.path.expanduser(path), framework="numpy") as file:
                kind = (file.metadata() or {}).get(_TYPE)
                stored = set(file.keys())
                if kind != cls.__name__:
                    raise ValueError(f"{path} holds {kind or 'no text conditioning'}, expected {cls.__name__}")
                if not stored or not stored <= set(names):
                    held = ", ".join(sorted(stored)) or "nothing"
                    raise ValueError(f"{path} holds {held}, expected the arrays {', '.join(names)} of {cls.__name__}")
                return cls(**{name: file.get_tensor(name) if name in stored else None for name in names})
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist") from None
        except (SafetensorError, TypeError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as text conditioning ({error}); give a file that `save` wrote"
            ) from None


@dataclass_transform(eq_default=False, frozen_default=True)
def conditioning(cls: type[T]) -> type[T]:
    """Turns a subclass of `Text` into a frozen dataclass and registers it as a pytree.

    Example:
        >>> from typing import Any
        >>> import numpy as np
        >>> from sega_jax import Text, conditioning
        >>> @conditioning
        ... class Letters(Text):
        ...     letters: Any  # [texts, 4]
        >>> Letters(np.zeros((2, 4), np.float32))
        Letters(letters=float32[2, 4])
    """
    frozen = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    return jax.tree_util.register_dataclass(frozen)


def check_rows(name: str, text: Text) -> None:
    """Checks that all arrays of a text have the same number of rows, and at least one.

    Args:
        name: The argument's name, used in error messages.

    Raises:
        TypeError: A field is not an array, or all fields are None.
        ValueError: There are no rows, or the arrays have different numbers of rows.
    """
    arrays = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    arrays = {field: value for field, value in arrays.items() if value is not None}
    wrong = [field for field, value in arrays.items() if not getattr(value, "shape", ())]
    if wrong or not arrays:
        raise TypeError(f"{name}={text!r} should hold arrays with one row for each text, as `encode` returns them")
    rows = {field: value.shape[0] for field, value in arrays.items()}
    if len(set(rows.values())) > 1:
        counts = " and ".join(f"{count} of {field}" for field, count in rows.items())
        raise ValueError(f"{name} has {counts}; give every array the same number of rows, one for each text")
    if 0 in rows.values():
        raise ValueError(f"{name}={text!r} holds no texts; give at least one")


def stacked(texts: Sequence[T]) -> T:
    """Concatenates texts that have the same shapes, on the host.

    Raises:
        ValueError: The shapes differ.
    """
    if len({tuple(leaf.shape[1:] for leaf in jax.tree.leaves(text)) for text in texts}) > 1:
        shapes = " and ".join(dict.fromkeys(map(repr, texts)))
        raise ValueError(f"texts have different shapes: {shapes}; encode them in one call")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *texts)


def _summary(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__ if value is not None else "None"
