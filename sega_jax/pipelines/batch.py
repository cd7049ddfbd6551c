"""A call's arguments spread over the rows of a batch: one row for each picture, prompt by prompt."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sega_jax.method.arguments import arguments
from sega_jax.method.checks import brief, check_int, is_sequence
from sega_jax.method.guidance import Edit, Edits
from sega_jax.method.numerics import floating
from sega_jax.pipelines.execution.active_concepts import ordered
from sega_jax.pipelines.execution.chunks import CHUNK
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import warn
from sega_jax.systems.base import Given, Settings, Setup, Static
from sega_jax.systems.call import Call
from sega_jax.systems.conditioning import Text, check_rows
from sega_jax.systems.diffusion import cast

Words = str | Text  # words, or their conditioning, a text of one row


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A call that makes sense, ready to run."""

    prompts: list[Words]
    negatives: list[Words]
    edits: list[tuple[Edit, ...]]
    reading: Mapping[str, Any]  # arguments that say how words are read
    negative_reading: Mapping[str, Any]  # the same for negative prompts
    seeds: list[int] | None  # None where a key was given
    x: np.ndarray | None  # the state to start from, in the loop's dtype
    picture: np.ndarray | None  # [rows, height, width, 3] in [-1, 1], to start from
    picture_noise: np.ndarray | None  # [rows, *shape], with which its latents are drawn; None draws it
    shape: tuple[int, int, int]  # of a row's predictions
    table: Any  # of the schedule
    settings: Settings
    static: Static
    decode: Mapping[str, Hashable]  # static arguments of the family's `decode`
    output: str = "pil"
    callback: Callable[[int, float, np.ndarray], Any] | None = None
    callback_steps: int = 1
    progress: bool | None = None

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def n(self) -> int:
        """The number of concepts of a row."""
        return self.settings.n

    @property
    def calls(self) -> int:
        """The number of model calls."""
        return len(self.table.call)

    def select(self, rows: Sequence[int]) -> "Batch":
        """Returns the batch of some rows, which may occur several times."""
        index = np.array(rows)

        def some(values):
            return None if values is None else [values[i] for i in rows]

        return dataclasses.replace(
            self,
            prompts=some(self.prompts),
            negatives=some(self.negatives),
            edits=some(self.edits),
            seeds=some(self.seeds),
            x=None if self.x is None else self.x[index],
            picture=None if self.picture is None else self.picture[index],
            picture_noise=None if self.picture_noise is None else self.picture_noise[index],
            settings=jax.tree.map(lambda leaf: leaf[index], self.settings),
        )


def prepare(call: Call, pipe: LoadedCheckpoint) -> Batch:
    """Spreads a call's arguments over the rows of a batch, and checks them against the checkpoint.

    Raises:
        TypeError, ValueError: an argument does not fit the others or the checkpoint; nothing ran.
    """
    system, check = pipe.system, partial(_checked, pipe)
    reading = {name: one for name, one in arguments(type(call)).items() if one.of_text}
    if (networks := system.text.networks(pipe.models)) is not None:
        system.text.check_options(networks, {name: getattr(call, name) for name in reading})
    prompts = _texts("prompt", call.prompt, check)
    spread = Spread(len(prompts), call.images_per_prompt)
    negative = call.negative_prompt
    if negative is None:
        negative = system.text.negative(pipe.models, pipe.tokenizer, pipe.extras)
    negatives = _texts("negative_prompt", negative, check)
    if len(negatives) == 1:
        negatives *= spread.total
    edits = _edits(call.edits, spread, check)
    rows, seeds = spread("prompt", prompts), None if call.key is not None else _seeds(call.seed, spread.total)
    if not call.record:
        edits = ordered(edits, call.momentum_scale)
    stacked = Edits.stack(edits, momentum_scale=call.momentum_scale, momentum_beta=call.momentum_beta)
    given = Given(
        models=pipe.models,
        scheduler=pipe.scheduler,
        extras=pipe.extras,
        rows=spread.total,
        n=stacked.scale.shape[1],
        texts=rows,
        spread=spread,
        dtype=pipe.wide,
        platform=pipe.devices.devices[0].platform,
        devices=len(pipe.devices),
        warn=warn,
    )
    setup = system.sampler.setup(call, given)
    if setup.guidance_scale is not None:
        # Edits start from the empty text, whatever the negative prompt.
        negatives = _texts("negative_prompt", system.text.negative(pipe.models, pipe.tokenizer, pipe.extras), check)
        negatives *= spread.total
    _check_clocks(edits, len(setup.table.call), call.semantics, call.strict)
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


class Spread:
    """Spreads entries for each prompt, or for each picture, over the rows."""

    def __init__(self, prompts: int, images_per_prompt: int):
        self.prompts, self.count = prompts, images_per_prompt
        self.total = prompts * images_per_prompt

    def __call__(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Returns one entry for each row.

        Raises:
            ValueError: another number of entries.
        """
        if len(values) == self.total:
            return list(values)
        if len(values) == self.prompts:
            return [value for value in values for _ in range(self.count)]
        pictures = f", or {self.total}, one a picture" if self.count > 1 else ""
        raise ValueError(f"{name} has {len(values)} entries, expected {self.prompts}, one a prompt{pictures}")

    def numbers(self, name: str, value: Any) -> np.ndarray:
        """Returns one number for each row, from one for all or a list."""
        return np.asarray(self(name, value)) if isinstance(value, list) else np.full(self.total, value)


def _texts(name: str, value: Any, check: Callable[[Any], Text]) -> list[Words]:
    """Returns words and conditioning, one entry for each prompt."""
    if isinstance(value, Text):
        check_rows(name, value)
    if isinstance(value, Text) or getattr(value, "ndim", 0) == 3:
        entries = list(value)
    else:
        entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError(f"{name} has shape {value.shape} and holds no texts; give at least one")
    return [text if isinstance(text, str) else _conditioning(name, text, check) for text in entries]


def _checked(pipe: LoadedCheckpoint, value: Any) -> Text:
    """Returns the conditioning that a user gave, checked by its family."""
    reader = pipe.system.text
    if isinstance(value, Text) and not isinstance(value, reader.type):
        raise TypeError(f"{value!r} is of another family, expected {reader.type.__name__}")
    text = reader.check(pipe.models, pipe.tokenizer, value)
    if not isinstance(text, reader.type):
        raise TypeError(f"{pipe.system.title} takes {reader.type.__name__} in place of words, not an array")
    return text


def _conditioning(name: str, value: Any, check: Callable[[Any], Text]) -> Text:
    if isinstance(value, Text):
        check_rows(name, value)
        if len(value) != 1:
            raise ValueError(f"{name} has {value!r} in a list, expected a text of one row; give text[i], or it alone")
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
            return edit
        return dataclasses.replace(edit, concept=_conditioning("edits", edit.concept, check))

    if isinstance(edits, Edit | str | Text) or getattr(edits, "ndim", 0) == 2:
        edits = [edits]
    if not is_sequence(edits):
        raise TypeError(f"edits={brief(edits)} should be a list of strings and Edits, or one such list a prompt")
    nested = [isinstance(entry, list | tuple) for entry in edits]
    if any(nested):
        if not all(nested):
            raise TypeError("edits mixes lists with single edits; give one list for all, or one a prompt")
        return [tuple(one(edit) for edit in row) for row in spread("edits", edits)]
    return [tuple(one(edit) for edit in edits)] * spread.total


def _check_clocks(rows: list[tuple[Edit, ...]], calls: int, semantics: str, strict: bool) -> None:
    gate = ", and the momentum of the others waits for it" if semantics == "diffusers" else ""
    for edit in {id(edit): edit for row in rows for edit in row}.values():
        name = brief(edit.concept)
        if edit.cooldown is not None and edit.cooldown <= edit.warmup:
            message = f"the edit {name} ends at cooldown={edit.cooldown}, before it begins at warmup={edit.warmup}"
            if strict:
                raise ValueError(f"{message}; give a cooldown above the warmup, or None")
            acts = "only its momentum acts" if semantics == "diffusers" else "it changes nothing"
            warn(f"{message}: {acts}")
        elif edit.warmup >= calls:
            warn(
                f"the edit {name} begins at warmup={edit.warmup}, after the last of {calls} model calls, and"
                f" changes nothing{gate}; lower its warmup or take more steps"
            )


def _replay(replay: np.ndarray | None, rows: int, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray | None:
    if replay is None:
        return None
    axes = "(pictures, calls, height, width, channels)"
    if replay.ndim != 5 or replay.shape[0] not in (1, rows) or replay.shape[2:] != shape or not replay.shape[1]:
        raise ValueError(
            f"replay has shape {replay.shape}, expected ({rows}, calls, {', '.join(map(str, shape))}) {axes}, or one"
            " picture's for all"
        )
    replay = np.broadcast_to(cast("replay", replay, dtype), (rows, *replay.shape[1:]))
    # Zeros add nothing, and records of other lengths then share a program.
    return np.pad(replay, ((0, 0), (0, -replay.shape[1] % CHUNK), (0, 0), (0, 0), (0, 0)))


def _with_noise(settings: Settings, call: Call, pipe: LoadedCheckpoint, setup: Setup) -> Settings:
    """Returns the settings with the noise that a user gave.

    Raises:
        TypeError, ValueError: it is of another shape, or the solver uses none; without `strict` that is a warning.
    """
    if not setup.draws:
        what = "record_noise=True" if call.noise is None else "noise"
        message = f"{what} is for solvers that add noise at model calls, and this call's adds none"
        if call.strict:
            raise ValueError(f"{message}; leave it out, or take another scheduler or eta")
        warn(f"{message}; it is ignored")
    elif call.noise is not None:
        return settings._replace(noise=_noise(call.noise, pipe, settings, setup))
    return settings


def _noise(noise: Any, pipe: LoadedCheckpoint, settings: Settings, setup: Setup) -> Any:
    """Returns the noise that a user gave, in the form that the family draws it, arrays [rows, calls, ...]."""
    sampler, rows, calls = pipe.system.sampler, len(settings.key), len(setup.table.call)

    def draw(networks, x, call):
        return sampler.draw(networks, settings, x)(call, (rows, *setup.shape))

    x = jax.ShapeDtypeStruct((rows, *setup.shape), pipe.wide)
    first = jax.tree.map(lambda column: column[0], setup.table)
    drawn = jax.eval_shape(draw, sampler.networks(pipe.models), x, first)
    expected, structure = jax.tree.flatten(drawn)
    alone = len(expected) == 1
    given = [noise] if alone else noise
    if not isinstance(given, list | tuple) or len(given) != len(expected):
        raise TypeError(f"noise={brief(noise)} should be {len(expected)} arrays, {type(drawn).__name__}")
    arrays = []
    for i, (array, one) in enumerate(zip(given, expected, strict=True)):
        name = "noise" if alone else f"noise[{i}]"
        array, shape = floating(name, array, "(calls, pictures, ...)"), (calls, *one.shape)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} (calls, pictures, height, width, ...)")
        array = np.swapaxes(cast(name, array, one.dtype), 0, 1)
        # Zeros that no call reads, so that other numbers of calls share a program.
        arrays.append(np.pad(array, ((0, 0), (0, -calls % CHUNK), *[(0, 0)] * (array.ndim - 2))))
    return jax.tree.unflatten(structure, arrays)


def _seeds(seed: Any, total: int) -> list[int]:
    top = 2**32 - 1
    if seed is None:
        seed = 0
    if is_sequence(seed) or isinstance(seed, np.ndarray):
        if len(seed) != total:
            raise ValueError(f"seed has {len(seed)} entries, expected {total}, one a picture (or one number)")
        return [check_int("seed", s, 0, top) for s in seed]
    return [check_int("seed", seed, 0, top - total + 1) + i for i in range(total)]


# A seed means one picture whatever JAX is set to. Other generators, vectorised over rows, would also make a row's noise
# depend on its neighbours.
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
        raise TypeError(f"key={brief(key)} should be a JAX key, as of jax.random.key(0)")
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            raise TypeError(f"key={brief(key)} should be a JAX key, as of jax.random.key(0)") from None
    if key.shape:
        raise ValueError(f"key has shape {key.shape}, expected one key; every row folds its number in")
    return _fold(key, np.arange(total, dtype=np.uint32))
