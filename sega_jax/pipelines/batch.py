"""Prepares a call's batch: checks the arguments and spreads them over the rows, one row for each picture."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sega_jax.method.arguments import arguments
from sega_jax.method.checks import brief, check_int, check_text, is_sequence
from sega_jax.method.guidance import Edit, Edits
from sega_jax.method.guidance.edits import warmup_of
from sega_jax.method.naming import assignment
from sega_jax.method.numerics import floating
from sega_jax.pipelines.execution.active_concepts import ordered
from sega_jax.pipelines.execution.chunks import CHUNK
from sega_jax.pipelines.execution.memory import check_size
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import warn
from sega_jax.systems.base import Given, Settings, Setup, Static
from sega_jax.systems.call import Call
from sega_jax.systems.conditioning import Text, check_rows
from sega_jax.systems.diffusion import cast

Words = str | Text  # a string, or text conditioning with one row


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The checked arguments of a call, with one row for each picture. The first prompt's pictures come first."""

    prompts: list[Words]
    negatives: list[Words]
    edits: list[tuple[Edit, ...]]
    reading: Mapping[str, Any]  # options for encoding prompts and concepts, such as `clip_skip`
    negative_reading: Mapping[str, Any]  # options for encoding negative prompts
    seeds: list[int] | None  # None if the call was given a key instead
    x: np.ndarray | None  # the initial state in the sampling loop's dtype; drawn if None
    picture: np.ndarray | None  # the pictures to start from, [rows, height, width, 3] in [-1, 1]
    picture_noise: np.ndarray | None  # noise [rows, *shape] for sampling the pictures' latents; drawn if None
    shape: tuple[int, int, int]  # the (height, width, channels) of a row's predictions
    table: Any  # the schedule, with one line for each model call
    settings: Settings
    static: Static
    decode: Mapping[str, Hashable]  # compile-time arguments for the family's `decode`
    output: str = "pil"
    callback: Callable[[int, float, np.ndarray], Any] | None = None
    callback_steps: int = 1
    progress: bool | None = None

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def n(self) -> int:
        """The number of concepts in each row, including padding."""
        return self.settings.n

    @property
    def calls(self) -> int:
        """The number of model calls."""
        return len(self.table.call)

    def select(self, rows: Sequence[int]) -> "Batch":
        """Returns a batch with the rows at the given indices; an index may occur more than once."""
        index = np.array(rows)

        def pick(values):
            return None if values is None else [values[i] for i in rows]

        return dataclasses.replace(
            self,
            prompts=pick(self.prompts),
            negatives=pick(self.negatives),
            edits=pick(self.edits),
            seeds=pick(self.seeds),
            x=None if self.x is None else self.x[index],
            picture=None if self.picture is None else self.picture[index],
            picture_noise=None if self.picture_noise is None else self.picture_noise[index],
            settings=jax.tree.map(lambda leaf: leaf[index], self.settings),
        )


def prepare(call: Call, pipe: LoadedCheckpoint) -> Batch:
    """Checks that a call's arguments fit the checkpoint, and spreads them over the rows of a batch.

    Raises:
        TypeError, ValueError: An argument does not fit another argument or the checkpoint. Raised before any model
            runs.
    """
    system, check = pipe.system, partial(_checked, pipe)
    reading = {name: one for name, one in arguments(type(call)).items() if one.of_text}
    if (networks := system.text.networks(pipe.models)) is not None:
        system.text.check_options(networks, {name: getattr(call, name) for name in reading})
    prompts = _texts("prompt", call.prompt, check)
    spread = Spread(len(prompts), call.images_per_prompt)
    _check_memory(spread.total, call, pipe)
    negative = call.negative_prompt
    if negative is None:
        negative = system.text.negative(pipe.models, pipe.tokenizer, pipe.extras)
    negatives = _texts("negative_prompt", negative, check)
    if len(negatives) == 1:
        negatives *= spread.total
    edits = _edits(call.edits, spread, check)
    rows, seeds = spread("prompt", prompts), None if call.key is not None else _seeds(call.seed, spread.total)
    context = Given(
        models=pipe.models,
        scheduler=pipe.scheduler,
        extras=pipe.extras,
        rows=spread.total,
        n=max(map(len, edits)),
        texts=rows,
        spread=spread,
        dtype=pipe.wide,
        platform=pipe.devices.devices[0].platform,
        devices=len(pipe.devices),
        warn=warn,
    )
    setup = system.sampler.setup(call, context)
    if setup.guidance_scale is not None:
        # Distilled networks take the guidance scale as an input; edit directions are relative to the empty text.
        negatives = _texts("negative_prompt", system.text.negative(pipe.models, pipe.tokenizer, pipe.extras), check)
        negatives *= spread.total
    edits = [tuple(pipe.recommended.edit(edit, len(setup.table.call)) for edit in row) for row in edits]
    _check_clocks(edits, len(setup.table.call), call)
    if not call.record:
        edits = ordered(edits, call.momentum_scale)
    stacked = Edits.stack(edits, momentum_scale=call.momentum_scale, momentum_beta=call.momentum_beta)
    settings = Settings(
        key=_keys(seeds, call.key, spread.total),
        guidance_scale=spread.numbers("guidance_scale", call.guidance_scale)
        if setup.guidance_scale is None
        else setup.guidance_scale,
        edits=stacked if stacked.scale.size else None,
        guidance_rescale=setup.guidance_rescale,
        replay=_replay(call.replay, spread.total, setup.shape, pipe.wide),
        own=setup.own,
    )
    if call.noise is not None or call.record_noise:
        settings = _with_noise(settings, call, pipe, setup)
    return Batch(
        prompts=rows,
        negatives=spread("negative_prompt", negatives),
        edits=edits,
        reading={name: getattr(call, name) for name in reading},
        negative_reading={
            name: getattr(call, name) if one.of_negative else one.default for name, one in reading.items()
        },
        seeds=seeds,
        x=setup.x,
        picture=setup.picture,
        picture_noise=setup.picture_noise,
        shape=setup.shape,
        table=setup.table,
        settings=settings,
        static=Static(call.semantics, call.support, call.record, call.record_noise and setup.draws, setup.static),
        decode=setup.decode,
        output=call.output,
        callback=call.callback,
        callback_steps=call.callback_steps,
        progress=call.progress,
    )


def _check_memory(rows: int, call: Call, pipe: LoadedCheckpoint) -> None:
    """Checks that the pictures of a call fit in memory, before any argument is spread over the rows."""
    sizes = pipe.system.sampler.sizes(pipe.models)
    given = getattr(call, "height", None), getattr(call, "width", None)
    height, width = (side or default for side, default in zip(given, sizes.default or (1, 1), strict=True))
    check_size(rows, height, width, pipe.devices.devices[0], len(pipe.devices))


class Spread:
    """A function that spreads values over the rows of a batch.

    The value for a prompt is repeated for each of the prompt's pictures.
    """

    def __init__(self, prompts: int, images_per_prompt: int):
        self.prompts, self.count = prompts, images_per_prompt
        self.total = prompts * images_per_prompt

    def __call__(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Returns one entry for each row.

        Raises:
            ValueError: The number of entries equals neither the number of prompts nor the number of pictures.
        """
        if len(values) == self.total:
            return list(values)
        if len(values) == self.prompts:
            return [value for value in values for _ in range(self.count)]
        pictures = f", or {self.total}, one for each picture" if self.count > 1 else ""
        raise ValueError(f"{name} has {len(values)} entries, expected {self.prompts}, one for each prompt{pictures}")

    def numbers(self, name: str, value: Any) -> np.ndarray:
        """Returns one number for each row, given either a list of numbers or one number for all rows."""
        return np.asarray(self(name, value)) if isinstance(value, list) else np.full(self.total, value)


def _texts(name: str, value: Any, check: Callable[[Any], Text]) -> list[Words]:
    """Converts a text argument to a list with one entry for each prompt."""
    if isinstance(value, Text):
        check_rows(name, value)
    if isinstance(value, Text) or getattr(value, "ndim", 0) == 3:
        entries = list(value)
    else:
        entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError(f"{name} has shape {value.shape} and holds no texts; give at least one")
    return [check_text(name, text) if isinstance(text, str) else _conditioning(name, text, check) for text in entries]


def _checked(pipe: LoadedCheckpoint, value: Any) -> Text:
    """Checks that text conditioning from the user fits the family, and returns it."""
    reader = pipe.system.text
    if isinstance(value, Text) and not isinstance(value, reader.type):
        raise TypeError(
            f"{value!r} belongs to another family, expected {reader.type.__name__}; encode texts with pipe.encode"
        )
    text = reader.check(pipe.models, pipe.tokenizer, value)
    if not isinstance(text, reader.type):
        raise TypeError(
            f"{pipe.system.title} expects strings or {reader.type.__name__}, got an array; encode texts with"
            " pipe.encode"
        )
    return text


def _conditioning(name: str, value: Any, check: Callable[[Any], Text]) -> Text:
    if isinstance(value, Text):
        check_rows(name, value)
        if len(value) != 1:
            raise ValueError(
                f"{name} has {value!r} in a list, but texts in a list should have one row; give text[i], or"
                " text without a list"
            )
        return check(value)
    floating(name, value, "(tokens, channels)")
    return check(value)


def _edits(edits: Any, spread: Spread, check: Callable[[Any], Text]) -> list[tuple[Edit, ...]]:
    def one(edit: Any) -> Edit:
        if not isinstance(edit, Edit):
            if not isinstance(edit, str | Text) and not hasattr(edit, "ndim"):
                raise TypeError(f"edits: {brief(edit)} should be a string or an Edit")
            edit = Edit(edit)
        if isinstance(edit.concept, str):
            check_text("edits", edit.concept)
            return edit
        return dataclasses.replace(edit, concept=_conditioning("edits", edit.concept, check))

    if isinstance(edits, Edit | str | Text) or getattr(edits, "ndim", 0) == 2:
        edits = [edits]
    if not is_sequence(edits):
        raise TypeError(f"edits={brief(edits)} should be a list of strings and Edits, or one such list for each prompt")
    nested = [isinstance(entry, list | tuple) for entry in edits]
    if any(nested):
        if not all(nested):
            raise TypeError("edits mixes lists with single edits; give one list for all prompts, or one for each")
        return [tuple(one(edit) for edit in row) for row in spread("edits", edits)]
    return [tuple(one(edit) for edit in edits)] * spread.total


def _check_clocks(rows: list[tuple[Edit, ...]], calls: int, call: Call) -> None:
    for edit in {id(edit): edit for row in rows for edit in row}.values():
        name = brief(edit.concept)
        if edit.cooldown is not None and edit.cooldown <= warmup_of(edit):
            message = f"the edit {name} ends at cooldown={edit.cooldown}, before it begins at warmup={edit.warmup}"
            if call.strict:
                raise ValueError(f"{message}; give a cooldown above the warmup, or leave it out")
            acts = "only its momentum acts" if call.semantics == "diffusers" else "it has no effect"
            warn(f"{message}: {acts}")
        elif warmup_of(edit) >= calls:
            counts = isinstance(call.steps, int) and call.steps != calls
            counted = f" ({assignment('steps', call.steps)} gives {calls} calls)" if counts else ""
            others = any(len(row) > 1 and any(edit is one for one in row) for row in rows)
            gate = ", and the other edits of the same picture get no momentum" if others else ""
            warn(
                f"the edit {name} begins at warmup={edit.warmup}, after the last of {calls} model calls{counted}, so it"
                f" has no effect{gate if call.semantics == 'diffusers' else ''}; lower its warmup or use more steps"
            )


def _replay(replay: np.ndarray | None, rows: int, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray | None:
    if replay is None:
        return None
    axes = "(pictures, calls, height, width, channels)"
    if replay.ndim != 5 or replay.shape[0] not in (1, rows) or replay.shape[2:] != shape or not replay.shape[1]:
        raise ValueError(
            f"replay has shape {replay.shape}, expected ({rows}, calls, {', '.join(map(str, shape))}) {axes};"
            " a first axis of length 1 is shared by all pictures"
        )
    replay = np.broadcast_to(cast("replay", replay, dtype), (rows, *replay.shape[1:]))
    # Padding with zeros does not change the result, but lets records of different lengths share a compiled program.
    return np.pad(replay, ((0, 0), (0, -replay.shape[1] % CHUNK), (0, 0), (0, 0), (0, 0)))


def _with_noise(settings: Settings, call: Call, pipe: LoadedCheckpoint, setup: Setup) -> Settings:
    """Adds the user's noise, if any, to the settings.

    Raises:
        TypeError, ValueError: The noise has the wrong shape, or the solver uses no noise. In the latter case,
            `strict=False` turns the error into a warning.
    """
    if not setup.draws:
        what = "record_noise=True" if call.noise is None else "noise"
        message = f"{what} needs a solver that adds noise at model calls, but this call's solver adds none"
        if call.strict:
            raise ValueError(f"{message}; leave it out, or use another scheduler or another eta")
        warn(f"{message}; it is ignored")
    elif call.noise is not None:
        return settings._replace(noise=_noise(call.noise, pipe, settings, setup))
    return settings


def _noise(noise: Any, pipe: LoadedCheckpoint, settings: Settings, setup: Setup) -> Any:
    """Converts the user's noise to the family's structure: a pytree of arrays [rows, calls, ...]."""
    sampler, rows, calls = pipe.system.sampler, len(settings.key), len(setup.table.call)

    def draw(networks, x, call):
        return sampler.draw(networks, settings, x)(call, (rows, *setup.shape))

    x = jax.ShapeDtypeStruct((rows, *setup.shape), pipe.wide)
    first = jax.tree.map(lambda column: column[0], setup.table)
    drawn = jax.eval_shape(draw, sampler.networks(pipe.models), x, first)
    expected, structure = jax.tree.flatten(drawn)
    single = len(expected) == 1
    entries = [noise] if single else noise
    if not isinstance(entries, list | tuple) or len(entries) != len(expected):
        raise TypeError(f"noise={brief(noise)} should be {len(expected)} arrays, {type(drawn).__name__}")
    arrays = []
    for i, (array, one) in enumerate(zip(entries, expected, strict=True)):
        name = "noise" if single else f"noise[{i}]"
        array, shape = floating(name, array, "(calls, pictures, ...)"), (calls, *one.shape)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} (calls, pictures, height, width, ...)")
        array = np.swapaxes(cast(name, array, one.dtype), 0, 1)
        # No call reads this padding. It lets batches with different numbers of calls share a compiled program.
        arrays.append(np.pad(array, ((0, 0), (0, -calls % CHUNK), *[(0, 0)] * (array.ndim - 2))))
    return jax.tree.unflatten(structure, arrays)


def _seeds(seed: Any, total: int) -> list[int]:
    top = 2**32 - 1
    if seed is None:
        seed = 0
    if is_sequence(seed) or isinstance(seed, np.ndarray):
        if len(seed) != total:
            raise ValueError(
                f"seed has {len(seed)} entries, expected {total}, one for each picture, or a single number"
            )
        return [check_int("seed", s, 0, top) for s in seed]
    return [check_int("seed", seed, 0, top - total + 1) + i for i in range(total)]


# The random generator is fixed, so that a seed gives the same picture regardless of JAX's settings. With other
# generators, a row's noise would also depend on the other rows that are drawn at the same time.
_IMPLEMENTATION = "threefry2x32"


@jax.jit
def _from_seeds(seeds: jax.Array) -> jax.Array:
    return jax.vmap(partial(jax.random.key, impl=_IMPLEMENTATION))(seeds)


@jax.jit
def _fold(key: jax.Array, rows: jax.Array) -> jax.Array:
    if str(jax.random.key_impl(key)) != _IMPLEMENTATION:
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,), "uint32"), impl=_IMPLEMENTATION)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _keys(seeds: list[int] | None, key: Any, total: int) -> jax.Array:
    if seeds is not None:
        return _from_seeds(np.asarray(seeds, np.uint32))
    if not isinstance(key, jax.Array):
        raise TypeError(f"key={brief(key)} should be a JAX key, such as jax.random.key(0)")
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            raise TypeError(f"key={brief(key)} should be a JAX key, such as jax.random.key(0)") from None
    if key.shape:
        raise ValueError(f"key has shape {key.shape}, expected a single key; each row's index is folded into it")
    return _fold(key, np.arange(total, dtype=np.uint32))
