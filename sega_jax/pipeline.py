"""Prompts to pictures: the `Pipeline` that `sega_jax.load` makes.

The way of a call: arguments -> rows (`sega_jax.rows`) -> the compiled programs of
`sega_jax.systems.stable_diffusion`, whose loop is `sega_jax.sample.sample` -> pictures.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from PIL import Image

from sega_jax.arrays import at_least_float32, floating, is_finite
from sega_jax.components import as_scheduler
from sega_jax.guidance import SEMANTICS, SUPPORTS, Edits
from sega_jax.parallel import Devices
from sega_jax.progress import bar
from sega_jax.rows import EditLike, Rows, Text, number, prepare, whole
from sega_jax.safety import Safety
from sega_jax.sample import Carry
from sega_jax.schedules import Row, Scheduler
from sega_jax.systems import stable_diffusion as system
from sega_jax.systems.stable_diffusion import Method, Models, Record, Settings
from sega_jax.text import Tokenizer

OUTPUTS = ("pil", "uint8", "float", "latent")

# Rows of the schedule in one call of `advance`, which compiles for this number.
_CHUNK = 64
# Texts in one call of `encode`, and how many embeddings are remembered.
_BLOCK, _REMEMBERED = 8, 256
# Seconds of work handed to the devices at once: how often the progress bar moves and Ctrl-C is heard.
_PATIENCE = 0.5


@dataclasses.dataclass
class Output:
    """What a call made, one entry per picture, prompt by prompt.

    Attributes:
        images: PIL pictures; uint8 or float32 arrays [pictures, height, width, 3] (floats in [0, 1]); or
            latents [pictures, height / f, width / f, channels] in float32. A picture that is not finite
            is None, black, or NaN; one that is flagged is black.
        finite: bool [pictures], False where NaN or infinity came up; a warning said so, too.
        seeds: the integer seed of each picture; None where a key was given.
        record: with `record=True` every call's predictions and semantic guidance, arrays
            [pictures, calls, ...]; else None.
        flagged: bool [pictures], True where the safety checker found what it looks for; a warning said so, too.
            None where the pipeline has no safety checker, and for latents, which are not checked.
    """

    images: list[Image.Image | None] | np.ndarray
    finite: np.ndarray
    seeds: list[int] | None
    record: Record | None = None
    flagged: np.ndarray | None = None


class Pipeline:
    """A loaded checkpoint. Call it with a prompt and edits; `load` makes it.

    Compiled once for a batch size, picture size, number of concepts and choice of semantics, support and
    recording; all numbers, seeds and words may change from call to call at no cost. Rows are spread over
    the devices: fewer pictures than devices leave some of them idle, so ask for several seeds at once.

    `safety` is the checkpoint's safety checker; `pipe.safety = None` turns it off.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        devices: Devices,
        safety: Safety | None = None,
    ):
        if not isinstance(models, Models):
            raise TypeError(f"models={type(models).__name__} should be the Models of another pipeline (pipe.models)")
        if not (safety is None or isinstance(safety, Safety)):
            raise TypeError(f"safety={safety!r} should be another pipeline's (pipe.safety), or None")
        self.devices = devices if isinstance(devices, Devices) else Devices(devices)
        self._models = Models.build(*models)
        self.tokenizer = tokenizer
        self._scheduler = as_scheduler(scheduler)
        self.safety = safety
        self._pace: dict[tuple, float] = {}
        self._embeddings: dict[bytes, np.ndarray] = {}

    @property
    def components(self) -> dict[str, Any]:
        """What makes this pipeline: `Pipeline(**pipe.components)` is another one, with a scheduler of its own, that
        shares the weights and the compiled programs."""
        return {
            "models": self.models,
            "tokenizer": self.tokenizer,
            "scheduler": self.scheduler,
            "devices": self.devices,
            "safety": self.safety,
        }

    @property
    def models(self) -> Models:
        """The networks, on the devices: `pipe.models = pipe.models._replace(unet=...)` exchanges one."""
        return self._models

    @models.setter
    def models(self, models: Models) -> None:
        if not isinstance(models, Models):
            raise TypeError(f"models={type(models).__name__} should be Models, as pipe.models._replace(unet=...)")
        self._models = Models.build(*self.devices.place(models))
        self._embeddings.clear()

    @property
    def dtype(self) -> np.dtype:
        """Of the UNet, which is usually that of all networks."""
        return self.models.unet.conv_in.kernel.dtype

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler. It is exchanged by assigning a class name of diffusers', which takes over the options of
        the one before; a config; a folder; or another `Scheduler`. Most exchanges compile nothing."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self._scheduler = as_scheduler(value, self._scheduler.config)

    def __call__(
        self,
        prompt: Text | Sequence[Text],
        edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]] = (),
        *,
        negative_prompt: Text | Sequence[Text] | None = None,
        images_per_prompt: int = 1,
        steps: int = 50,
        guidance_scale: float | Sequence[float] = 7.5,
        eta: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] | None = None,
        key: jax.Array | None = None,
        latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        momentum_scale: float = 0.1,
        momentum_beta: float = 0.4,
        semantics: str = "diffusers",
        support: str = "channel",
        replay: Any = None,
        output: str = "pil",
        record: bool = False,
        callback: Callable[[int, float, np.ndarray], Any] | None = None,
        callback_steps: int = 1,
        progress: bool | None = None,
        strict: bool = True,
    ) -> Output:
        """Makes pictures of the prompts and guides them by the edits.

        Args:
            prompt: words, or a list; each is a row of the batch for each of its pictures. Wherever words stand,
                here and in edits, their embedding may stand: [tokens, channels], as `encode` gives it.
            edits: words and `Edit`s for every row; or a list of such lists, one for each prompt or picture.
            negative_prompt: what to stay away from, one for all or one each.
            images_per_prompt: pictures of each prompt, from different seeds.
            steps: of the solver, 1 to the training's (1000); or timesteps, as `Scheduler.table` takes them.
            guidance_scale: s of u + s (p - u), one for all or one each; 1 is no classifier-free guidance.
            eta: DDIM's share of fresh noise in [0, 1], one for all or one each; PNDM has none.
            seed: s, meaning s, s + 1, ... for several pictures, or a list with one each; 0 by default.
            key: a JAX key in place of a seed, into which every row folds its number.
            latents: the initial noise, [pictures, height / f, width / f, channels], in place of the seed's.
            height, width: in pixels, multiples of the checkpoint's factor f; its own size by default.
            momentum_scale, momentum_beta: s_m and beta in [0, 1] of edits that name none.
            semantics, support: see `sega_jax.guidance.sega`.
            replay: guidance to add, recorded before, in any floating dtype: one for all pictures,
                [1, calls, height / f, width / f, channels], or one each. Calls beyond its last gain nothing.
            output: "pil", "uint8", "float" or "latent".
            record: whether to return every call's predictions.
            callback: called as (call, timestep, latents) after call 0 and every `callback_steps`-th after it.
            progress: whether to show a bar; None is in terminals and notebooks.
            strict: whether an edit with its cool-down before its warm-up is an error, or a warning.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, number, shape or range; nothing ran.
        """
        for name, value, known in (
            ("output", output, OUTPUTS), ("semantics", semantics, SEMANTICS), ("support", support, SUPPORTS)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}={value!r} should be one of {', '.join(known)}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback={callback!r} should be a function of call, timestep and latents")
        whole("callback_steps", callback_steps, 1)
        shape = self.latent_shape(height, width)
        table = self.scheduler.table(steps)
        rows = prepare(
            prompt,
            edits,
            negative_prompt=negative_prompt,
            images_per_prompt=images_per_prompt,
            seed=seed,
            key=key,
            latents=latents,
            guidance_scale=guidance_scale,
            eta=eta,
            shape=shape,
            calls=len(table.call),
            semantics=semantics,
            strict=strict,
        )
        if self.scheduler.options.get("variance_type") == "learned_range":
            raise ValueError(
                f"{self.scheduler.name}: variance_type='learned_range' is of networks that predict their variance,"
                " which this one does not; give 'fixed_small'"
            )
        if rows.eta.any() and self.scheduler.solver != "ddim":
            message = f"eta={eta} is DDIM's, {self.scheduler.name} has none"
            if strict:
                raise ValueError(f"{message}; leave it 0")
            warnings.warn(f"{message}; it is ignored", stacklevel=2)
        momentum_scale = number("momentum_scale", momentum_scale, 0, 1)
        momentum_beta = number("momentum_beta", momentum_beta, 0, 1)
        stacked = Edits.stack(rows.edits, momentum_scale=momentum_scale, momentum_beta=momentum_beta)
        replay = _replayed(replay, len(rows), shape, self._wide)
        n = stacked.scale.shape[1]
        text = self._text(rows, n)

        settings = Settings(rows.keys, rows.guidance_scale, rows.eta, stacked if n else None, replay)
        settings, text = self.devices.split((settings, text))
        method = Method(self.scheduler.solver, semantics, support, record)
        start = self.devices.map(system.start, (0, 0, None), shape=shape, method=method, dtype=self._wide)
        latents = None if rows.latents is None else _cast("latents", rows.latents, self._wide)
        first = start(settings, self.devices.split(latents), table.initial_scale[0])
        every = None if callback is None else callback_steps
        parts = []
        with bar(len(table.call), "call", progress) as shown:
            for done, carry, part in self._advance(text, first, table, settings, method, every):
                parts.append(part)
                shown.update(done - shown.n)
                if every is not None and (done - 1) % every == 0:
                    callback(done - 1, float(table.timestep[done - 1]), self.devices.gather(carry.x, len(rows)))
        return self._finish(carry.x, parts, rows, output)

    @property
    def _wide(self) -> np.dtype:
        return at_least_float32(self.dtype)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of a picture of this size in pixels.

        Raises:
            TypeError, ValueError: a size that is not a positive multiple of the checkpoint's factor.
        """
        net, auto = self.models.unet.config, self.models.vae.config
        default = net.sample_size if isinstance(net.sample_size, tuple) else (net.sample_size,) * 2
        sizes = []
        for name, value, latent in zip(("height", "width"), (height, width), default, strict=True):
            value = latent * auto.factor if value is None else whole(name, value, 1)
            if value % auto.factor:
                near = max(value // auto.factor, 1) * auto.factor
                raise ValueError(
                    f"{name}={value} is not a multiple of {auto.factor}, this checkpoint's factor; try {near}"
                )
            sizes.append(value // auto.factor)
        return (*sizes, net.in_channels)

    def encode(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embeddings [texts, tokens, channels] of texts, in the networks' dtype; remembered by tokens.

        Raises:
            TypeError: it is not words or a non-empty list of them.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts={texts!r} should be words or a non-empty list of them")
        ids = self.tokenizer(texts)
        new = list({row.tobytes(): row for row in ids if row.tobytes() not in self._embeddings}.items())
        program = self.devices.map(system.encode, None)
        found = {}
        for i in range(0, len(new), _BLOCK):
            block = new[i : i + _BLOCK]
            padded = np.stack([row for _, row in block] + [block[0][1]] * (_BLOCK - len(block)))
            hidden = np.asarray(program(self.models.text_encoder, padded))
            found |= {name: vector for (name, _), vector in zip(block, hidden, strict=False)}
        found |= {row.tobytes(): self._embeddings[row.tobytes()] for row in ids if row.tobytes() in self._embeddings}
        self._embeddings |= found
        while len(self._embeddings) > _REMEMBERED:
            del self._embeddings[next(iter(self._embeddings))]
        return np.stack([found[row.tobytes()] for row in ids])

    def _text(self, rows: Rows, n: int) -> np.ndarray:
        """Embeddings [rows, 2 + n, tokens, channels]; concepts that pad a row are empty words."""
        scale = self.models.text_encoder.final_layer_norm.scale
        shape = (self.tokenizer.length, *scale.shape)
        branches = [
            branch
            for prompt, negative, edits in zip(rows.prompts, rows.negatives, rows.edits, strict=True)
            for branch in (negative, prompt, *(edit.concept for edit in edits), *[""] * (n - len(edits)))
        ]
        for branch in branches:
            if not isinstance(branch, str) and branch.shape != shape:
                raise ValueError(f"an embedding has shape {branch.shape}, expected {shape} (tokens, channels)")
        words = list(dict.fromkeys(branch for branch in branches if isinstance(branch, str)))
        hidden = dict(zip(words, self.encode(words), strict=True)) if words else {}
        text = [hidden[b] if isinstance(b, str) else b.astype(scale.dtype) for b in branches]
        return np.stack(text).reshape(len(rows), 2 + n, *shape)

    def _advance(
        self, text: Any, carry: Carry, table: Row, settings: Settings, method: Method, every: int | None
    ) -> Iterator[tuple[int, Carry, Record | None]]:
        """Runs the table, some calls at a time: between, the bar moves and an interruption is heard.

        Yields the calls done so far, the carry and the record of the last ones; with `every`, after call 0
        and every so many after it, too.
        """
        program = self.devices.map(system.advance, (None, 0, 0, None, 0), method=method)
        situation = (method, text.shape, carry.x.shape, settings.replay is None, jax.tree.structure(table))
        calls, done = len(table.call), 0
        while done < calls:
            known = situation in self._pace
            live = int(_PATIENCE / self._pace[situation]) if known else 1
            live = min(max(live, 1), _CHUNK, calls - done)
            live = live if every is None else min(live, -done % every + 1)
            began = time.perf_counter()
            with _enough_memory(text.shape):
                carry, record = program(self.models.unet, text, carry, _chunk(table, done, live), settings)
                _wait(carry)
            # The first call of a program may have compiled: it says nothing about the pace.
            if known or done:
                self._pace[situation] = (time.perf_counter() - began) / live
            done += live
            yield done, carry, _calls(self.devices.gather(record), live)

    def _finish(self, x: Any, parts: Sequence[Record | None], rows: Rows, output: str) -> Output:
        record = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1)[: len(rows)], *parts)
        flagged = None
        if output == "latent":
            images = self.devices.gather(x, len(rows))
            finite = np.isfinite(images).all((1, 2, 3))
        else:
            program = self.devices.map(system.decode, (None, 0))
            with _enough_memory(x.shape):
                images, finite = self.devices.gather(program(self.models.vae, x), len(rows))
            if self.safety is not None:
                flagged = self._check(images, finite)
                images = np.where(flagged[:, None, None, None], 0, images)
        if not finite.all():
            warnings.warn(
                f"pictures {np.flatnonzero(~finite).tolist()} came out as NaN or infinite and are not shown; smaller"
                " scales, or dtype float32 or bfloat16, may help",
                RuntimeWarning,
                stacklevel=3,
            )
        if flagged is not None and flagged.any():
            warnings.warn(
                f"the safety checker flagged pictures {np.flatnonzero(flagged).tolist()}, which are returned black;"
                " another prompt or seed may help",
                stacklevel=3,
            )
        if output in ("pil", "uint8"):
            images = _bytes(images, finite)
        elif output == "float":
            images = np.where(finite[:, None, None, None], images, np.nan)
        if output == "pil":
            images = [Image.fromarray(i) if good else None for i, good in zip(images, finite, strict=True)]
        return Output(images, finite, rows.seeds, record, flagged)

    def _check(self, images: np.ndarray, finite: np.ndarray) -> np.ndarray:
        """Whether the safety checker flags each picture of [pictures, height, width, 3]; none that is not finite."""
        pixels = self.devices.split(self.safety.feature_extractor(_bytes(images, finite)))
        program = self.devices.map(system.check, (None, 0))
        with _enough_memory(pixels.shape):
            return self.devices.gather(program(self.safety.checker, pixels), len(images)) & finite


def _bytes(images: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Float pictures in [0, 1] as uint8, black where they are not finite."""
    return (np.where(finite[:, None, None, None], images, 0) * 255).round().astype(np.uint8)


def _chunk(table: Row, start: int, live: int) -> Row:
    """Rows of the table from `start`, filled up to a chunk by copies of the last that are not live."""
    index = np.minimum(start + np.arange(_CHUNK), start + live - 1)
    return jax.tree.map(lambda column: column[index], table)._replace(live=np.arange(_CHUNK) < live)


def _calls(record: Record | None, live: int) -> Record | None:
    """The record of a chunk without its filling, still with the rows that fill the devices up."""
    return jax.tree.map(lambda leaf: leaf[:, :live], record)


def _wait(arrays: Any) -> None:
    """Until the devices are done, also when interrupted: to end the process while they work is to crash."""
    try:
        jax.block_until_ready(arrays)
    except KeyboardInterrupt:
        jax.block_until_ready(arrays)
        raise


@contextmanager
def _enough_memory(shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"the device's memory does not hold this batch, {shape} (rows first); ask for fewer pictures or"
            " concepts at once, a smaller size, or load with dtype bfloat16"
        ) from error


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In the loop's dtype, so that those of others share a program."""
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not is_finite(array):
        raise ValueError(f"{name} has entries beyond the range of {dtype}")
    return array


def _replayed(replay: Any, rows: int, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray | None:
    if replay is None:
        return None
    axes = "(pictures, calls, height, width, channels)"
    replay = floating("replay", replay, axes)
    if replay.ndim != 5 or replay.shape[0] not in (1, rows) or replay.shape[2:] != shape or not replay.shape[1]:
        raise ValueError(
            f"replay has shape {replay.shape}, expected ({rows}, calls, {', '.join(map(str, shape))}) {axes}, or one"
            " picture's for all"
        )
    replay = np.broadcast_to(_cast("replay", replay, dtype), (rows, *replay.shape[1:]))
    # Zeros add nothing, and records of other lengths then share a program.
    return np.pad(replay, ((0, 0), (0, -replay.shape[1] % _CHUNK), (0, 0), (0, 0), (0, 0)))
