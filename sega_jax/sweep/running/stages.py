"""The stages of a cascade while a sweep runs: each is loaded once, and is given what the stage before has made."""

import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sega_jax.pipelines import loading
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.sweep.description.facts import Facts, Readers
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.stages import Earlier, earlier
from sega_jax.sweep.running.folder import PICTURES, Folder


class Loader:
    """Loads the model of one stage after another. The first stage's networks that read text are kept for the stages
    that take the same text; everything else is dropped before the next stage is loaded.

    Args:
        pipe: the model of a sweep without stages, loaded; None loads it.
    """

    def __init__(self, pipe: Pipeline | None = None):
        self._given, self._readers = pipe, dict[str, Readers]()

    @contextmanager
    def loaded(self, facts: Facts) -> Iterator[Pipeline]:
        """Loads the model of a stage, for as long as it is needed.

        Raises:
            FileNotFoundError, CheckpointError: as `sega_jax.load`.
        """
        pipe = self._load(facts) if self._given is None else self._given
        if facts.stage is not None and facts.earlier is None:
            reader = pipe.system.text
            networks = {part: module for part, module in pipe.models._asdict().items() if part in reader.parts}
            self._readers["first"] = Readers(reader.type, networks, pipe.tokenizer)
        # Which has a scheduler and adapters of its own.
        yield Pipeline(**pipe.components)
        del pipe
        gc.collect()

    def _load(self, facts: Facts) -> Pipeline:
        model = dict(facts.model)
        source = model.pop("source", loading.DEMO)
        if not facts.shares_text:
            return loading.load(source, **model)
        if "first" not in self._readers:
            self._readers["first"] = _readers(facts.first)
        readers = self._readers["first"]
        return loading.load(source, **model, tokenizer=readers.tokenizer, networks=readers.networks)


def _readers(facts: Facts) -> Readers:
    """Loads the networks that read text, where the stage that they are of is done."""
    model = {name: value for name, value in facts.model.items() if name in ("revision", "dtype", "variant")}
    return Readers(facts.family.text.type, *loading.load_readers(facts.model["source"], **model))


def encoded(picture: np.ndarray) -> bytes:
    """Returns a picture as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, picture, allow_pickle=False)
    return file.getvalue()


class EarlierPictures:
    """The pictures of the stage before, float32 [height, width, 3] in [0, 1].

    Args:
        folder: of the stage before; None for a stage that is given no pictures.
        names: the arguments of a call that are pictures.
    """

    def __init__(self, folder: Folder | None, names: Sequence[str]):
        self._folder, self._names = folder, names

    def given(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the lists of a call's arguments with pictures in place of their names. What is not finite is grey, as
        in `Cascade`."""
        return {name: self._pictures(values) if name in self._names else values for name, values in call.items()}

    def finite(self, point: Point) -> bool:
        """Tells whether the picture that a point's is made from is finite."""
        made = [found for name in self._names if (found := earlier(point.call[name])) is not None]
        return all(np.isfinite(self._read(one)).all() for one in made)

    def _pictures(self, values: Sequence[Any]) -> list[Any]:
        found = [earlier(value) for value in values]
        return [
            value if one is None else np.nan_to_num(self._read(one), nan=0.5)
            for value, one in zip(values, found, strict=True)
        ]

    def _read(self, picture: Earlier) -> np.ndarray:
        assert self._folder is not None
        file = f"{PICTURES}/{picture.name}.npy"
        data = self._folder.store.read(file)
        if data is None:
            raise ValueError(f"{self._folder}/{file} is missing, from which a later stage goes on; run the sweep again")
        return np.load(io.BytesIO(data), allow_pickle=False)
