"""How much memory a sweep takes, by the compiler's own analysis, before any weights are loaded; and the rows that a
device's memory holds."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.guidance import Edit, Edits
from sega_jax.pipelines import loading
from sega_jax.pipelines.execution.chunks import chunk
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.pipeline import system_of
from sega_jax.sweep.description.points import Facts, described
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.sweep.planning.plan import Batch, Plan, plan
from sega_jax.systems.base import Method, Settings

# Rows of a device: more are no faster, and a crash loses more; as many as usual where the memory is not known.
MOST, USUAL = 64, 8
# What fragmentation and the libraries take.
_SPARE = 0.1
# Fewer rows for so many fewer evaluations, which are filling.
_WORTH = 0.03
# Rows of the program that is analysed: some of what it takes is not of the rows, and counts half.
_ROWS = 2


class Memory(NamedTuple):
    """Of each device, in bytes."""

    weights: int
    row: int  # that every row takes, at most
    there: int | None  # None where the device does not say

    @property
    def rows(self) -> int:
        """That fit, at least 1 and at most `MOST`."""
        if self.there is None:
            return USUAL
        return int(min(max(((1 - _SPARE) * self.there - self.weights) // self.row, 1), MOST))


def needed(plan: Plan) -> Memory:
    """What the largest program of a plan takes, by compiling it for a few rows; nothing is loaded and nothing runs."""
    where, sizes = Devices(), plan.facts.sizes
    said = plan.facts.model
    dtype = loading.pick_dtype(said.get("dtype"), where)
    found = described(said, loading.pick_attention(said.get("attention"), dtype, where))
    networks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), found.networks)
    models = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), found.models)
    weights = sum(leaf.size * dtype.itemsize for leaf in jax.tree.leaves(networks))

    def size(batch: Batch) -> int:
        one = batch.program
        return (2 + one.concepts) * one.height * one.width

    batch = max(plan.batches, key=lambda batch: (size(batch), batch.shares))
    row = _row(plan, batch, found, models, dtype)
    state = batch.program.height * batch.program.width // sizes.factor**2 * sizes.channels
    # The shared predictions, as they are told and as they are taken in.
    past = 2 * plan.depth * (2 + batch.program.concepts) * state * 4 if batch.shares else 0
    stats = where.devices[0].memory_stats() or {}
    return Memory(weights, row + past, stats.get("bytes_limit"))


def _row(plan: Plan, batch: Batch, found: Any, models: Any, dtype: np.dtype) -> int:
    """Of a row, in the program that takes most."""
    program, sizes, net = batch.program, plan.facts.sizes, models.unet.config
    shape = program.height // sizes.factor, program.width // sizes.factor, sizes.channels
    edits = Edits.stack([[Edit("")] * program.concepts] * _ROWS) if program.concepts else None
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), _ROWS))
    settings = Settings(keys, np.ones(_ROWS, np.float32), np.zeros(_ROWS, np.float32), edits)
    table = plan.facts.scheduler_of(batch.scheduler).table(batch.steps)
    tokens = 77 if found.tokenizer is None else found.tokenizer.length
    channels = net.encoder_hid_dim or net.level("cross_attention_dim", 0)
    text = jax.ShapeDtypeStruct((_ROWS, 2 + program.concepts, tokens, channels), dtype)
    # What pictures have in common is recorded.
    method = Method(program.solver, program.semantics, program.support, batch.shares)
    system, wide = system_of(models), jnp.promote_types(dtype, np.float32)
    start = partial(system.start, shape=shape, method=method, dtype=wide)
    carry = jax.eval_shape(start, settings, None, table.initial_scale[0])
    advance = jax.jit(partial(system.advance, method=method))
    bytes_of = [_bytes(advance.lower(models.predictor, text, carry, chunk(table, 0, 1), settings))]
    bytes_of.append(_bytes(jax.jit(system.decode).lower(models.decoder, carry.x)))
    return max(bytes_of) // _ROWS


def _bytes(lowered: Any) -> int:
    """Of a program beside its arguments."""
    found = lowered.compile().memory_analysis()
    return 0 if found is None else found.temp_size_in_bytes + found.output_size_in_bytes


def fitted(sweep: Sweep, facts: Facts, *, share: bool = True) -> Plan:
    """The plan with as many rows as the memory of the devices holds; with fewer where these leave less unfilled.

    Raises:
        TypeError, ValueError: as of `plan`.
    """
    devices = jax.local_device_count()
    first = plan(sweep, facts, USUAL * devices, share=share)
    stats = jax.local_devices()[0].memory_stats() or {}
    # Without a limit there is nothing to find out.
    most = needed(first).rows if "bytes_limit" in stats else USUAL
    counts = [most]
    while counts[-1] > USUAL:
        counts.append(-(-counts[-1] // 2))
    plans = [first if count == USUAL else plan(sweep, facts, count * devices, share=share) for count in counts]
    least = min(one.counts.evaluations for one in plans)
    return next(one for one in plans if one.counts.evaluations <= (1 + _WORTH) * least)
