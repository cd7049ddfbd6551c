"""Estimates the memory that a sweep needs and the number of rows that fit, using the compiler's analysis before weights
are loaded."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.pipelines.batch import Batch as BatchOfRows
from sega_jax.pipelines.execution.chunks import chunk
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.sweep.description.facts import Facts
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.sweep.planning.outline import outline, prepared
from sega_jax.sweep.planning.plan import Batch, Plan, plan
from sega_jax.systems import programs
from sega_jax.systems.base import Encode

# The maximum number of rows per device. More rows are not faster, and a crash would lose more work. `DEFAULT` applies
# if the device does not report its memory.
MOST, DEFAULT = 64, 8
# The fraction of memory that is left free for fragmentation and libraries.
_SPARE = 0.1
# A plan is accepted if its evaluations exceed the minimum among the tried plans by at most this fraction.
_WORTH = 0.03
# The number of rows in the analysed program. With two rows, only half of the memory that does not depend on the rows is
# counted per row.
_ROWS = 2


class Memory(NamedTuple):
    """The memory that a plan needs on each device, in bytes.

    Attributes:
        weights: the memory that the weights take.
        row: the maximum memory that each row takes.
        there: the device's memory; None if the device does not report it.
        rows: the number of rows that fit.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.Memory(weights=2_000_000_000, row=200_000_000, there=16_000_000_000).rows
        62
    """

    weights: int
    row: int
    there: int | None

    @property
    def rows(self) -> int:
        """The number of rows that fit, from 1 to 64; 8 if the device does not report its memory."""
        if self.there is None:
            return DEFAULT
        return int(min(max(((1 - _SPARE) * self.there - self.weights) // self.row, 1), MOST))


def needed(plan: Plan) -> Memory:
    """Estimates the memory of a plan's largest program by compiling it for a few rows, without loading or running it.

    Args:
        plan: the plan; for a cascade, the plan for one stage.

    Raises:
        FileNotFoundError, CheckpointError: as for `sega_jax.load`.
        TypeError, ValueError: a planned call is not valid for the checkpoint.

    Example:
        >>> from sega_jax import sweep
        >>> small = sweep.Sweep(call={"prompt": "a portrait", "height": 16, "width": 16})
        >>> memory = sweep.needed(sweep.plan(small, sweep.Facts.of(small)))
        >>> memory.weights > memory.row > 0
        True
    """
    pipe, weights = outline(plan.facts)
    if any(batch.adapters for batch in plan.batches):
        # Networks that adapters change are kept twice: with and without the adapters.
        names = pipe.system.checkpoint.adapters.lora
        changed = [module for part, module in pipe.models._asdict().items() if part in names]
        weights += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(changed))

    def size(batch: Batch) -> int:
        height, width = batch.program.size
        return (2 + batch.program.concepts) * height * width

    number = max(range(len(plan.batches)), key=lambda i: (size(plan.batches[i]), plan.batches[i].shares))
    batch, point = plan.batches[number], plan.point(plan.batches[number].points[0])
    call = prepared(pipe, plan.facts, point)
    row = _row(pipe, call.select([0] * _ROWS), batch.shares)
    # Recorded predictions are kept twice: as the trunk computes them, and rearranged for the trunk's pictures.
    state = int(np.prod(call.shape))
    past = 2 * plan.depth * (2 + batch.program.concepts) * state * 4 if batch.shares else 0
    stats = pipe.devices.devices[0].memory_stats() or {}
    return Memory(weights, row + past, stats.get("bytes_limit"))


def _row(pipe: Pipeline, batch: BatchOfRows, records: bool) -> int:
    """Returns the bytes that a row takes in the program that needs the most memory.

    Args:
        records: whether the program records its predictions, as a trunk does.
    """
    system, models = pipe.system, pipe.models
    sampler, reader = system.sampler, system.text
    static = batch.static._replace(record=records)
    concepts = [edit.concept for edits in batch.edits for edit in edits]
    words = [text for text in (*batch.prompts, *batch.negatives, *concepts) if isinstance(text, str)]
    encode = Encode(reader.networks(models), partial(_encoded, reader.encode))
    texts = reader.read(words, pipe.tokenizer, encode, _ignore, **batch.reading)
    longest = max(texts, key=lambda text: sum(leaf.size for leaf in jax.tree.leaves(text)))
    text = jax.tree.map(lambda leaf: _struct((batch.rows, 2 + batch.n, *leaf.shape[1:]), leaf, pipe.dtype), longest)
    if reader.sample_prior is not None and (prior := reader.prior(models)) is not None:
        text = jax.eval_shape(reader.sample_prior, prior, text, batch.settings.key)
    start = partial(programs.start, sampler=sampler, static=static, shape=batch.shape, dtype=pipe.wide)
    carry = jax.eval_shape(start, batch.settings, None, batch.table.initial_scale[0])
    advance = jax.jit(pipe.devices.with_options(programs.advance, {"sampler": sampler, "static": static}))
    one = chunk(batch.table, 0, 1)
    bytes_of = [_bytes(advance.lower(sampler.networks(models), text, carry, one, batch.settings))]
    decode = jax.jit(pipe.devices.with_options(sampler.decode, batch.decode))
    bytes_of.append(_bytes(decode.lower(sampler.decoder(models), carry.x)))
    return max(bytes_of) // batch.rows


def _encoded(encode: Any, networks: Any, ids: Any) -> list[Any]:
    """Returns encoded texts of the right shapes, filled with ones. The text encoder does not run."""
    shapes = jax.eval_shape(encode, networks, ids)
    texts = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    return [texts[i] for i in range(len(texts))]


def _struct(shape: tuple[int, ...], leaf: Any, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(shape, dtype if floats else leaf.dtype)


def _ignore(message: str) -> None:
    del message


def _bytes(lowered: Any) -> int:
    """Returns the memory of a program in bytes, without its arguments; 0 if the compiler does not report it."""
    analysis = lowered.compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def fitted(sweep: Sweep, facts: Facts, *, share: bool = True) -> Plan:
    """Plans a sweep with as many rows as the devices' memory can hold, or fewer if this saves padding.

    Args:
        sweep: the sweep.
        facts: the facts about its model.
        share: as for `plan`.

    Returns:
        The plan. Among the numbers of rows tried, it has the largest number for which the evaluations exceed the
        minimum by at most 3 %.

    Raises:
        FileNotFoundError, CheckpointError, TypeError, ValueError: as for `plan`.

    Example:
        >>> from sega_jax import sweep
        >>> seeds = sweep.Sweep(call={"prompt": "a portrait"}, grid={"seed": {"from": 0, "count": 100}})
        >>> sweep.fitted(seeds, sweep.Facts.of(seeds)).counts.pictures
        100
    """
    devices = jax.local_device_count()
    # Stages are loaded one after another, so each may have as many rows as its own model allows.
    earlier = None if facts.earlier is None else fitted(sweep, facts.earlier, share=share)
    planned = partial(plan, sweep, facts, share=share, earlier=earlier)
    first = planned(DEFAULT * devices)
    stats = jax.local_devices()[0].memory_stats() or {}
    # If the device reports no memory limit, skip the analysis.
    most = needed(first).rows if "bytes_limit" in stats else DEFAULT
    counts = [most]
    while counts[-1] > DEFAULT:
        counts.append(-(-counts[-1] // 2))
    plans = [first if count == DEFAULT else planned(count * devices) for count in counts]
    least = min(one.counts.evaluations for one in plans)
    return next(one for one in plans if one.counts.evaluations <= (1 + _WORTH) * least)
