"""How a pipeline runs a call whose arguments make sense: text, start, the schedule chunk by chunk, and pictures."""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sega_jax.method.guidance import SEMANTICS, SUPPORTS
from sega_jax.method.numerics import at_least_float32
from sega_jax.method.sample import Carry
from sega_jax.method.schedules import Row
from sega_jax.pipelines.batch import Rows, whole
from sega_jax.pipelines.execution.active_concepts import needed
from sega_jax.pipelines.execution.chunks import CHUNK, Chunks, chunk, enough_memory
from sega_jax.pipelines.execution.compile_report import Compiled
from sega_jax.pipelines.execution.devices import Devices, Flat
from sega_jax.pipelines.output import Output, is_whole
from sega_jax.pipelines.progress import bar
from sega_jax.systems import base
from sega_jax.systems.base import Record


class Plan(NamedTuple):
    """A call whose arguments make sense. Settings and method are of the pipeline's system."""

    rows: Rows
    x: np.ndarray | None  # the state to start from, in the loop's dtype
    shape: tuple[int, int, int]  # of a row's state, or of its logits
    table: Row
    settings: Any
    method: Any
    output: str
    callback: Callable[[int, float, np.ndarray], Any] | None
    callback_steps: int
    progress: bool | None
    pictures: np.ndarray | None = None  # [rows, height, width, 3] in [-1, 1], to start from
    tile: int | None = None  # positions of the state a side that are decoded at once; None is all

    @property
    def n(self) -> int:
        """Concepts of a row."""
        return 0 if self.settings.edits is None else self.settings.edits.scale.shape[1]


class _Begun(NamedTuple):
    """A call before its first model call."""

    call: Callable[[Carry, Row, int], tuple[Carry, Record | None]]  # of a chunk, with so many concepts predicted
    carry: Carry
    situation: Hashable  # of what the programs are compiled for
    needed: np.ndarray  # how many concepts each model call has to predict, int [calls]


class _Decoded(NamedTuple):
    """What a call made, on the devices."""

    images: Any  # uint8 pictures [rows, height, width, 3], or states where these are the output
    finite: Any = None  # bool [rows], of pictures
    floats: Any = None  # the pictures in [0, 1], where these are the output


class Running:
    """What pipelines of all systems share. They say what `models` are, of what system, and what text becomes."""

    devices: Devices
    models: Any  # of the system
    dtype: np.dtype
    _system: ModuleType
    _chunks: Chunks
    _reads: bool  # whether there is what reads words

    def _text(self, rows: Rows, n: int) -> Any:
        """What `advance` is told, arrays [rows, 2 + n, ...] on the devices; concepts that pad a row are empty words."""
        raise NotImplementedError

    def _flags(self, images: np.ndarray, finite: np.ndarray) -> np.ndarray | None:
        """Whether each of uint8 pictures [pictures, height, width, 3] is flagged, none that is not finite; None where
        nothing looks."""
        del images, finite

    @property
    def _wide(self) -> np.dtype:
        return at_least_float32(self.dtype)

    def compile(self, *args: Any, **options: Any) -> Compiled:
        """Compiles all that a call with these arguments needs, without a model call; a later one compiles nothing.

        Words and numbers may be any, but for Paella, where the longest text counts. Beside the program for all n
        concepts there is one for each fewer number that some model call of the schedule has to predict, where concepts
        are past their cool-down in all rows, or without momentum not yet at their warm-up. These take as long to
        compile as the first, so calls use them only where they are prepared, with equal results but for rounding.

        Args:
            As of a call.

        Returns:
            The programs, with the seconds each took and the bytes of temporary memory that it takes.

        Raises:
            As a call.
        """
        other = copy.copy(self)
        other._run = self._compile  # all before it is of the call, and checks its arguments
        return other(*args, **options)

    def _run(self, plan: Plan) -> Output:
        table = plan.table
        every, parts = 0 if plan.callback is None else plan.callback_steps, []
        begun = self._begin(plan, self._text(plan.rows, plan.n))
        with bar(len(table.call), "call", plan.progress) as shown:
            for done, carry, part in self._advance(plan, begun, every):
                parts.append(part)
                shown.update(done - shown.n)
                if every and (done - 1) % every == 0:
                    x = self.devices.gather(carry.x, len(plan.rows))
                    plan.callback(done - 1, float(table.timestep[done - 1]), x)
        return self._finish(carry.x, parts, plan.rows, plan.output, plan.tile)

    def _compile(self, plan: Plan) -> Compiled:
        with self.devices.watch() as programs, warnings.catch_warnings():
            # The picture is of noise.
            warnings.simplefilter("ignore")
            begun = self._begin(plan, self._text(plan.rows, plan.n))
            for concepts in sorted({plan.n, *begun.needed.tolist()}, reverse=True):
                carry, record = begun.call(begun.carry, chunk(plan.table, 0, 0), concepts)
                self._chunks.prepare(begun.situation, concepts)
            self._finish(carry.x, [self._recorded(record, 1)], plan.rows, plan.output, plan.tile)
        return Compiled(tuple(programs))

    def _begin(self, plan: Plan, text: Any, start: Callable[[Plan, Any], Carry] | None = None) -> _Begun:
        """With the carry that `start` makes of the plan and its settings on the devices; None is the beginning."""
        method, calls = plan.method, len(plan.table.call)
        # What is recorded is recorded of all concepts.
        few = np.full(calls, plan.n) if not plan.n or method.record else needed(plan.settings.edits, calls)
        settings = self.devices.split(plan.settings)
        carry = (start or self._start)(plan, settings)
        predictor = Flat(self.models.predictor)
        given, structure = jax.tree.flatten((text, carry, settings))
        shapes = [leaf.shape for leaf in given]
        situation = (method, *shapes, structure, jax.tree.structure(plan.table))

        def call(carry, rows, concepts):
            axes = (None, 0, 0, None, 0)
            program = self.devices.map(self._system.advance, axes, method=method, concepts=concepts)
            with enough_memory(shapes[0]):
                return program(predictor, text, carry, rows, settings)

        return _Begun(call, carry, situation, few)

    def _start(self, plan: Plan, settings: Any) -> Carry:
        start = partial(self.devices.map, self._system.start, shape=plan.shape, method=plan.method, dtype=self._wide)
        x = self.devices.split(plan.x)
        if plan.pictures is None:
            return start((0, 0, None))(settings, x, plan.table.initial_scale[0])
        embed, pictures = self.devices.map(self._system.embed, (None, 0, 0)), self.devices.split(plan.pictures)
        with enough_memory(plan.pictures.shape):
            clean = embed(self.models.vae, settings.key, pictures)
        return start((0, 0, None, 0, None))(settings, x, plan.table.noise[0], clean, plan.table.signal[0])

    def _advance(self, plan: Plan, begun: _Begun, every: int) -> Iterator[tuple[int, Carry, Record | None]]:
        """Yields the calls done so far, the carry and the record of the last ones; with `every`, after call 0 and
        every so many after it, too."""
        run = self._chunks.run(begun.call, begun.carry, plan.table, begun.situation, every, begun.needed, plan.n)
        for done, live, now, record in run:
            yield done, now, self._recorded(record, live)

    def _recorded(self, record: Record | None, live: int) -> Record | None:
        """The chunk's live calls on the host, still with the rows that fill the devices up."""
        if record is None or live > CHUNK // 2:
            return jax.tree.map(lambda leaf: leaf[:, :live], self.devices.gather(record))
        # One by one, since the others are more bytes than these.
        of = self.devices.map(base.recorded, (0, None))
        calls = [self.devices.gather(of(record, i)) for i in range(live)]
        return jax.tree.map(lambda *leaves: np.stack(leaves, 1), *calls)

    def _finish(
        self, x: Any, parts: Sequence[Record | None], rows: Rows, output: str, tile: int | None = None
    ) -> Output:
        record = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1)[: len(rows)], *parts)
        images, finite, flagged = self._fetch(self._decode(x, output, tile), len(rows))
        warn(finite, flagged, 5)
        if output == "pil":
            images = [Image.fromarray(i) if ok else None for i, ok in zip(images, finite, strict=True)]
        return Output(images, finite, rows.seeds, record, flagged)

    def _decode(self, x: Any, output: str, tile: int | None = None) -> _Decoded:
        """Does not wait for the devices."""
        if output in ("latent", "tokens"):
            return _Decoded(x)
        decode = self.devices.map(self._system.decode, (None, 0), **({} if tile is None else {"tile": tile}))
        with enough_memory(x.shape):
            floats, finite = decode(self.models.decoder, x)
            # On the devices, which is quicker, and a quarter of the bytes to fetch.
            images = self.devices.map(base.as_bytes, (0, 0))(floats, finite)
        return _Decoded(images, finite, floats if output == "float" else None)

    def _fetch(self, decoded: _Decoded, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Of so many rows the pictures or states, whether each is finite, and whether it is flagged."""
        with enough_memory(decoded.images.shape):
            images = self.devices.gather(decoded.images, count)
        if decoded.finite is None:
            return images, is_whole(images), None
        finite = self.devices.gather(decoded.finite, count)
        flagged = self._flags(images, finite)
        if decoded.floats is not None:
            images = np.where(finite[:, None, None, None], self.devices.gather(decoded.floats, count), np.nan)
        if flagged is not None:
            images = np.where(flagged[:, None, None, None], 0, images)
        return images, finite, flagged

    def _branches(self, rows: Rows, n: int) -> list[str | np.ndarray]:
        """The texts of all rows' branches, one after another.

        Raises:
            ValueError: there are words, and nothing that reads them.
        """
        branches = [
            branch
            for prompt, negative, edits in zip(rows.prompts, rows.negatives, rows.edits, strict=True)
            for branch in (
                negative,
                prompt,
                *(edit.concept for edit in edits),
                *["" if self._reads else negative] * (n - len(edits)),
            )
        ]
        self._check_reads([branch for branch in branches if isinstance(branch, str)])
        return branches

    def _check_reads(self, words: Sequence[str]) -> None:
        if words and not self._reads:
            raise ValueError(
                f"{words[0][:40]!r} cannot be read: this pipeline has no text encoder. Give embeddings, as `encode` of"
                " another stage makes them, for all words (also negative_prompt), or load it with its text encoder"
            )


def warn(finite: np.ndarray, flagged: np.ndarray | None, stacklevel: int) -> None:
    """Of pictures that are not shown; by the stack level of whom to tell, from here."""
    if not finite.all():
        warnings.warn(
            f"pictures {np.flatnonzero(~finite).tolist()} came out as NaN or infinite and are not shown; smaller"
            " scales, or dtype float32 or bfloat16, may help",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    if flagged is not None and flagged.any():
        warnings.warn(
            f"the safety checker flagged pictures {np.flatnonzero(flagged).tolist()}, which are returned black;"
            " another prompt or seed may help",
            stacklevel=stacklevel,
        )


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """ValueError for what is not known."""
    if value not in known:
        raise ValueError(f"{name}={value!r} should be one of {', '.join(known)}")


def check_guidance(semantics: str, support: str) -> None:
    one_of("semantics", semantics, SEMANTICS)
    one_of("support", support, SUPPORTS)


def check_callback(callback: Any, steps: Any) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"callback={callback!r} should be a function of call, timestep and latents")
    whole("callback_steps", steps, 1)
