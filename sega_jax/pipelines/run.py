"""Runs a batch: encodes texts, prepares the initial state, runs the model calls in chunks, and decodes pictures."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sega_jax.method.sample import Carry
from sega_jax.pipelines.batch import Batch
from sega_jax.pipelines.execution.active_concepts import needed
from sega_jax.pipelines.execution.chunks import CHUNK, chunk
from sega_jax.pipelines.execution.compile_report import Compiled
from sega_jax.pipelines.execution.devices import Flat
from sega_jax.pipelines.execution.memory import check_programs, enough_memory, is_small
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import muted, warn
from sega_jax.pipelines.output import Output, is_finite
from sega_jax.pipelines.progress import bar
from sega_jax.pipelines.safety import check_pictures
from sega_jax.pipelines.texts import branch_texts
from sega_jax.systems import programs
from sega_jax.systems.base import Record
from sega_jax.systems.call import PICTURES


class Interruption(Exception):  # noqa: N818 - not an error
    """Raised by callbacks to stop sampling early. The current state is then decoded."""


class PictureWarning(RuntimeWarning, UserWarning):
    """Warns that some pictures in a batch are missing or black."""


class Begun(NamedTuple):
    """A batch that is ready for its first model call, with its arrays on the devices."""

    batch: Batch
    networks: Flat
    text: Any  # the text conditioning of all branches, on the devices
    settings: Any  # the batch's settings, on the devices
    carry: Carry
    situation: Hashable  # identifies the programs compiled for this batch
    needed: np.ndarray  # the number of concepts that each model call must predict, int [calls]


class Decoded(NamedTuple):
    """The decoded pictures of a batch, on the devices."""

    images: Any  # uint8 pictures [rows, height, width, 3], or the final states if the call requests these
    finite: Any = None  # bool [rows]; None for states
    floats: Any = None  # the pictures in [0, 1] if the call requests floats


def run(pipe: LoadedCheckpoint, batch: Batch) -> Output:
    """Runs a batch and returns its pictures."""
    # The devices may also run out of memory while the host waits for them.
    with enough_memory((batch.rows, *batch.shape)), bar(batch.calls, "call", batch.progress) as shown:
        begun = begin(pipe, batch, branch_texts(pipe, batch, batch.n))
        check_memory(pipe, begun)
        every, records = 0 if batch.callback is None else batch.callback_steps, []
        carry = begun.carry
        with suppress(Interruption):
            for done, carry, record in advance_in_chunks(pipe, begun, every):
                records.append(record)
                shown.update(done - shown.n)
                if batch.callback is not None and (done - 1) % every == 0:
                    x = pipe.devices.gather(carry.x, batch.rows)
                    batch.callback(done - 1, float(batch.table.timestep[done - 1]), x)
        return finish(pipe, batch, carry.x, records)


def check_memory(pipe: LoadedCheckpoint, begun: Begun) -> None:
    """Checks that the programs of a batch fit in memory, before they run. Small batches are not checked, because the
    check takes time.

    Raises:
        MemoryError: A program does not fit.
    """
    batch, sampler, device = begun.batch, pipe.system.sampler, pipe.devices.devices[0]
    factor, share = sampler.sizes(pipe.models).factor, -(-batch.rows // len(pipe.devices))
    if begun.situation in pipe.chunks.fits or is_small(share * batch.shape[0] * batch.shape[1] * factor**2, device):
        return
    program = _advance(pipe, begun, batch.n)
    arguments = begun.networks, begun.text, begun.carry, chunk(batch.table, 0, 0), begun.settings
    programs_of = {"predict": program.lower(*arguments)}
    if batch.output in PICTURES:
        decode: Any = pipe.devices.map(sampler.decode, (None, 0), **batch.decode)
        programs_of["decode"] = decode.lower(sampler.decoder(pipe.models), begun.carry.x)
    check_programs(programs_of, (batch.rows, *batch.shape), device)
    pipe.chunks.fits.add(begun.situation)


def compile_batch(pipe: LoadedCheckpoint, batch: Batch) -> Compiled:
    """Compiles all programs of a batch without running a model."""
    with pipe.devices.watch() as compiled, muted(), warnings.catch_warnings():
        # Only noise is decoded here, so warnings about the pictures would be meaningless.
        warnings.simplefilter("ignore")
        begun = begin(pipe, batch, branch_texts(pipe, batch, batch.n))
        for concepts in sorted({batch.n, *begun.needed.tolist()}, reverse=True):
            carry, record = advance(pipe, begun, begun.carry, chunk(batch.table, 0, 0), concepts)
            pipe.chunks.prepare(begun.situation, concepts)
        finish(pipe, batch, carry.x, [fetch_record(pipe, record, 1)])
    return Compiled(tuple(compiled))


def begin(
    pipe: LoadedCheckpoint,
    batch: Batch,
    text: Any,
    start: Callable[[LoadedCheckpoint, Batch, Any], Carry] | None = None,
) -> Begun:
    """Copies a batch to the devices, and prepares its first model call.

    Args:
        pipe: The pipeline.
        batch: The batch.
        text: The text conditioning of all branches, on the devices.
        start: A function (pipe, batch, settings on the devices) -> the initial carry; None means `start_batch`.
    """
    edits = batch.settings.edits
    # A record contains the predictions of all concepts.
    if edits is None or not batch.n or batch.static.record:
        needed_concepts = np.full(batch.calls, batch.n)
    else:
        needed_concepts = needed(edits, batch.calls)
    settings = pipe.devices.split(batch.settings)
    carry = (start or start_batch)(pipe, batch, settings)
    leaves, structure = jax.tree.flatten((text, carry, settings))
    shapes = [leaf.shape for leaf in leaves]
    situation = (batch.static, *shapes, structure, jax.tree.structure(batch.table))
    return Begun(
        batch, Flat(pipe.system.sampler.networks(pipe.models)), text, settings, carry, situation, needed_concepts
    )


def start_batch(pipe: LoadedCheckpoint, batch: Batch, settings: Any) -> Carry:
    """Returns the carry before the first model call.

    The state is noise or, if the call starts from a picture, that picture with added noise.
    """
    sampler, table = pipe.system.sampler, batch.table
    start = partial(
        pipe.devices.map,
        programs.start,
        sampler=sampler,
        static=batch.static,
        shape=batch.shape,
        dtype=pipe.wide,
    )
    x = pipe.devices.split(batch.x)
    if batch.picture is None:
        return start((0, 0, None))(settings, x, table.initial_scale[0])
    assert sampler.encode_image is not None
    encode = pipe.devices.map(sampler.encode_image, (None, 0, 0, 0))
    pictures, noise = pipe.devices.split((batch.picture, batch.picture_noise))
    with enough_memory(batch.picture.shape):
        clean = encode(sampler.encoder(pipe.models), settings.key, pictures, noise)
    return start((0, 0, None, 0, None))(settings, x, table.noise[0], clean, table.signal[0])


def advance(
    pipe: LoadedCheckpoint, begun: Begun, carry: Carry, table: Any, concepts: int
) -> tuple[Carry, Record | None]:
    """Runs the model calls of one chunk of the schedule.

    Args:
        pipe: The pipeline.
        begun: The batch.
        carry: The carry before the chunk.
        table: The chunk's lines of the schedule's table.
        concepts: The number of concepts to predict.

    Returns:
        The carry after the chunk, and the chunk's record (None if the call is not recorded).
    """
    with enough_memory(jax.tree.leaves(begun.text)[0].shape):
        return _advance(pipe, begun, concepts)(begun.networks, begun.text, carry, table, begun.settings)


def _advance(pipe: LoadedCheckpoint, begun: Begun, concepts: int) -> Any:
    return pipe.devices.map(
        programs.advance,
        (None, 0, 0, None, 0),
        sampler=pipe.system.sampler,
        static=begun.batch.static,
        concepts=concepts,
    )


def advance_in_chunks(
    pipe: LoadedCheckpoint, begun: Begun, every: int = 0
) -> Iterator[tuple[int, Carry, Record | None]]:
    """Runs all model calls of a batch.

    Args:
        pipe: The pipeline.
        begun: The batch.
        every: If positive, a chunk also ends after calls 0, `every`, 2 `every`, and so on.

    Yields:
        After each chunk, the number of finished calls, the carry, and the chunk's record.
    """
    program = partial(advance, pipe, begun)
    chunks = pipe.chunks.run(
        program, begun.carry, begun.batch.table, begun.situation, every, begun.needed, begun.batch.n
    )
    for done, live, carry, record in chunks:
        yield done, carry, fetch_record(pipe, record, live)


def fetch_record(pipe: LoadedCheckpoint, record: Record | None, live: int) -> Record | None:
    """Fetches the record of a chunk's first `live` calls, including the rows that pad the devices' shares."""
    if record is None or live > CHUNK // 2:
        return jax.tree.map(lambda leaf: leaf[:, :live], pipe.devices.gather(record))
    # At least half of the chunk is padding, so its live calls are fetched one by one.
    one = pipe.devices.map(programs.recorded_call, (0, None))
    calls = [pipe.devices.gather(one(record, i)) for i in range(live)]
    return jax.tree.map(lambda *leaves: np.stack(leaves, 1), *calls)


def finish(pipe: LoadedCheckpoint, batch: Batch, x: Any, records: Sequence[Record | None]) -> Output:
    """Decodes the final state of a batch and fetches the results."""
    record = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1)[: batch.rows], *records)
    if record is not None:
        record = record._replace(noise=jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), record.noise))
    arrays, finite, flagged = fetch(pipe, decode(pipe, batch, x), batch.rows)
    warn_of_pictures(finite, flagged)
    images: np.ndarray | list[Image.Image | None] = arrays
    if batch.output == "pil":
        images = [Image.fromarray(i) if ok else None for i, ok in zip(arrays, finite, strict=True)]
    return Output(images, finite, batch.seeds, record, flagged)


def decode(pipe: LoadedCheckpoint, batch: Batch, x: Any) -> Decoded:
    """Decodes final states to pictures, without waiting for the devices."""
    if batch.output not in PICTURES:
        return Decoded(x)
    sampler = pipe.system.sampler
    program = pipe.devices.map(sampler.decode, (None, 0), **batch.decode)
    with enough_memory(x.shape):
        floats, finite = program(sampler.decoder(pipe.models), x)
        # Converting to uint8 on the devices is faster and leaves only a quarter of the bytes to fetch.
        images = pipe.devices.map(programs.as_bytes, (0, 0))(floats, finite)
    return Decoded(images, finite, floats if batch.output == "float" else None)


def fetch(pipe: LoadedCheckpoint, decoded: Decoded, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Fetches the first `rows` pictures or states, with one mask of the finite ones and one of the flagged ones."""
    with enough_memory(decoded.images.shape):
        images = pipe.devices.gather(decoded.images, rows)
    if decoded.finite is None:
        return images, is_finite(images), None
    finite = pipe.devices.gather(decoded.finite, rows)
    flagged = check_pictures(pipe.safety, pipe.devices, images, finite)
    if decoded.floats is not None:
        images = np.where(finite[:, None, None, None], pipe.devices.gather(decoded.floats, rows), np.nan)
    if flagged is not None:
        images = np.where(flagged[:, None, None, None], 0, images)
    return images, finite, flagged


def warn_of_pictures(finite: np.ndarray, flagged: np.ndarray | None) -> None:
    """Warns about pictures that are not finite or that the safety checker flagged."""
    if not finite.all():
        warn(
            f"pictures {np.flatnonzero(~finite).tolist()} contain NaN or infinite values and are not shown; try"
            " smaller scales, or dtype float32 or bfloat16",
            PictureWarning,
        )
    if flagged is not None and flagged.any():
        warn(
            f"the safety checker flagged pictures {np.flatnonzero(flagged).tolist()}, which are replaced with"
            " black ones; try another prompt or seed",
            PictureWarning,
        )
