"""Classes that check the LoRA and new-word options and convert their values for plans, tables and `load`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sega_jax.method.argument_kinds import Kind
from sega_jax.method.checks import check_float
from sega_jax.method.naming import assignment
from sega_jax.text.files import CheckpointError, absolute_path
from sega_jax.weights.lora_files import digest, pinned

Pairs = tuple[tuple[Any, Any], ...]


class Files(Kind):
    """An option whose value maps files to scales, or words to files.

    In plans and tables, each value is stored as a tuple of pairs, which is empty if there are no files.
    """

    of_files = True

    def check_one(self, name: str, value: Any) -> Pairs:
        """Converts a value to pairs without reading the files.

        Raises:
            TypeError, ValueError: The value has the wrong type, or a scale is not a finite number.
        """
        return self.pairs(name, value)

    def label(self, value: Any) -> str:
        return ", ".join(self.words(self.shortened(value))) or "none"

    def shortened(self, pairs: Pairs) -> Pairs:
        """Returns the pairs, with each path shortened to its file name."""
        raise NotImplementedError

    def files(self, value: Any) -> list[str]:
        return [self.path(pair) for pair in value]

    def known(self, path: str) -> dict[str, Any]:
        return {"digest": digest(path)}

    def pairs(self, name: str, value: Any) -> Pairs:
        """Converts a value in any accepted form to pairs.

        Raises:
            TypeError, ValueError: The value has the wrong type, or a scale is not a finite number.
        """
        raise NotImplementedError

    def path(self, pair: tuple[Any, Any]) -> str:
        """Returns the path in a pair."""
        raise NotImplementedError

    def given(self, pairs: Pairs) -> Any:
        """Converts pairs to the form that `sega_jax.load` accepts."""
        return dict(pairs)

    def words(self, pairs: Pairs) -> list[str]:
        """Formats pairs for the command line."""
        raise NotImplementedError

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        return {name: ", ".join(self.words(value)) or None}


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(str(value))


class Loras(Files):
    """LoRAs, as (path or hub name, scale) pairs."""

    noun = "a LoRA file, a folder that contains one, owner/name on the hub, or {file: scale}"

    def pairs(self, name: str, value: Any) -> Pairs:
        if _is_path(value):
            value = {value: 1.0}
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple) or not all(isinstance(one, list | tuple) for one in pairs):
            raise TypeError(f"{assignment(name, value)} should be {self.noun}; {{}} adds none")
        if not all(len(one) == 2 and _is_path(one[0]) for one in pairs):
            raise TypeError(f"{assignment(name, value)} should be {self.noun}; {{}} adds none")
        return tuple((os.fspath(path), check_float(f"{name}: the scale of {path}", scale)) for path, scale in pairs)

    def path(self, pair: tuple[Any, Any]) -> str:
        return pair[0]

    def located(self, name: str, value: Any, folder: Path) -> Pairs:
        """Converts a value to pairs, replacing folders and repositories with the LoRA files that they contain."""
        pairs = self.pairs(name, value)
        try:
            return tuple((pinned(path, folder), scale) for path, scale in pairs)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def words(self, pairs: Pairs) -> list[str]:
        return [f"{path}:{scale!r}" for path, scale in pairs]

    def shortened(self, pairs: Pairs) -> Pairs:
        return tuple((Path(path).name, scale) for path, scale in pairs)


class NewWords(Files):
    """Textual-inversion embeddings, as (word, path) pairs; the word is None if the file specifies it."""

    noun = "{word: file}, or a file that specifies its word"

    def pairs(self, name: str, value: Any) -> Pairs:
        if _is_path(value):
            value = [(None, value)]
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple) or not all(isinstance(one, list | tuple) for one in pairs):
            raise TypeError(f"{assignment(name, value)} should be {self.noun}; {{}} adds none")
        words = [one[0] for one in pairs]
        alone = len(pairs) == 1 and words == [None]
        if not all(len(one) == 2 and _is_path(one[1]) for one in pairs) or not (
            alone or all(isinstance(word, str) for word in words)
        ):
            raise TypeError(f"{assignment(name, value)} should be {self.noun}; {{}} adds none")
        return tuple((word, os.fspath(path)) for word, path in pairs)

    def path(self, pair: tuple[Any, Any]) -> str:
        return pair[1]

    def located(self, name: str, value: Any, folder: Path) -> Pairs:
        return tuple((word, absolute_path(path, folder)) for word, path in self.pairs(name, value))

    def given(self, pairs: Pairs) -> Any:
        return pairs[0][1] if pairs and pairs[0][0] is None else dict(pairs)

    def words(self, pairs: Pairs) -> list[str]:
        return [path if word is None else f"{word}={path}" for word, path in pairs]

    def shortened(self, pairs: Pairs) -> Pairs:
        return tuple((word, Path(path).name) for word, path in pairs)
