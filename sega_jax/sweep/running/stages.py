"""Loads the stages of a cascade one after another, and passes each stage the pictures of the previous stage."""

import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sega_jax.pipelines import loading, part_loading
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.adapters import lora_changes
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.sweep.description.facts import Facts, Readers, described
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.stages import Earlier, earlier
from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running.folder import Folder, picture
from sega_jax.weights.lora import merged


class Loader:
    """Loads the models of a sweep's stages one after another.

    It keeps the first stage's text encoders for later stages that use the same encoded text. Everything else is dropped
    before the next stage is loaded.

    Args:
        pipe: the loaded model of a sweep without stages; None loads it.
    """

    def __init__(self, pipe: Pipeline | None = None):
        self._given = pipe
        self._in_advance: Pipeline | None = None
        self._readers: Readers | None = None

    def load_in_advance(self, facts: Facts) -> None:
        """Loads the model of the stage that runs next, so that `loaded` does not load it.

        Raises:
            FileNotFoundError, CheckpointError: as for `sega_jax.load`.
        """
        if self._given is None:
            self._in_advance = self._load(facts)

    @contextmanager
    def loaded(self, facts: Facts) -> Iterator[Pipeline]:
        """Loads the model of a stage, and drops it when the context ends.

        Raises:
            FileNotFoundError, CheckpointError: as for `sega_jax.load`.
        """
        pipe, self._in_advance = self._given or self._in_advance, None
        pipe = pipe or self._load(facts)
        if facts.stage is not None and facts.earlier is None:
            reader = pipe.system.text
            networks = {part: module for part, module in pipe.models._asdict().items() if part in reader.parts}
            self._readers = Readers(reader.type, networks, pipe.tokenizer)
        # Yield a copy, so that the schedulers and adapters of the run do not change the caller's pipeline.
        yield Pipeline(**pipe.components)
        del pipe
        gc.collect()

    def _load(self, facts: Facts) -> Pipeline:
        model = dict(facts.model)
        source = model.pop("source", loading.DEMO)
        if not facts.shares_text:
            self._readers = None
            gc.collect()
            return loading.load(source, **model)
        if self._readers is None:
            self._readers = _readers(facts.first)
        return loading.load(source, **model, tokenizer=self._readers.tokenizer, networks=self._readers.networks)


def with_text_adapters(models: Any, facts: Facts, adapters: tuple[tuple[str, Pairs], ...]) -> Any:
    """Returns a later stage's networks with the first stage's LoRAs merged into their text encoder, as in a `Cascade`.

    Raises:
        CheckpointError: a file does not fit the first stage's checkpoint.
    """
    first = described(facts.first)
    networks = {part: network for part, network in models._asdict().items() if part in first.system.text.parts}
    changes = lora_changes(first.models, dict(dict(adapters)["lora"]))
    alone = first.system.checkpoint.models(**dict.fromkeys(first.models._fields) | networks)
    changed = merged(alone, changes)._asdict()
    return models._replace(**{part: changed[part] for part in networks})


def _readers(facts: Facts) -> Readers:
    """Loads the first stage's text encoders when that stage is already finished."""
    model = {name: value for name, value in facts.model.items() if name in ("revision", "dtype", "variant")}
    return Readers(facts.family.text.type, *part_loading.load_readers(facts.model["source"], **model))


def encoded(picture: np.ndarray) -> bytes:
    """Returns a picture as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, picture, allow_pickle=False)
    return file.getvalue()


class EarlierPictures:
    """The pictures of the previous stage, as float32 arrays [height, width, 3] in [0, 1].

    Args:
        folder: the folder of the previous stage; None if there is none.
        plan: the plan of the previous stage; None if there is none.
        names: the names of the call's arguments that are pictures.
    """

    def __init__(self, folder: Folder | None, plan: Plan | None, names: Sequence[str]):
        self._folder, self._plan, self._names = folder, plan, names
        self._finite: dict[str, bool] = {}  # {name: whether the picture is finite} for the pictures read so far

    def given(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Replaces the picture names in a call's lists of arguments with the pictures themselves. NaN becomes grey, as
        in `Cascade`.
        """
        return {name: self._pictures(values) if name in self._names else values for name, values in call.items()}

    def finite(self, point: Point) -> bool:
        """Returns whether the pictures that a point starts from are finite."""
        inputs = [picture for name in self._names if (picture := earlier(point.call[name])) is not None]
        return all(self._finite[one.name] if one.name in self._finite else self._is_finite(one) for one in inputs)

    def _pictures(self, values: Sequence[Any]) -> list[Any]:
        parsed = [earlier(value) for value in values]
        return [
            value if one is None else np.nan_to_num(self._read(one), nan=0.5)
            for value, one in zip(values, parsed, strict=True)
        ]

    def _is_finite(self, source: Earlier) -> bool:
        return bool(np.isfinite(self._read(source)).all())

    def _read(self, source: Earlier) -> np.ndarray:
        assert self._folder is not None
        assert self._plan is not None
        file = picture(self._plan, source.name)
        data = self._folder.store.read(file)
        if data is None:
            raise ValueError(f"{self._folder}/{file} is missing, but a later stage needs it; run the sweep again")
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
        self._finite[source.name] = bool(np.isfinite(pixels).all())
        return pixels
