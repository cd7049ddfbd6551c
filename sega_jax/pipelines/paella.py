"""Prompts to pictures by way of tokens: the `PaellaPipeline` that `sega_jax.load` makes of a converted Paella.

The way of a call is that of `sega_jax.pipelines.pipeline`; the state is a grid of tokens, and what is guided are the
logits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sega_jax.method.guidance import Edits
from sega_jax.method.schedules.tokens import renoising
from sega_jax.method.solvers import CHOICES
from sega_jax.pipelines.batch import EditLike, Rows, Text, number, prepare, whole
from sega_jax.pipelines.execution.active_concepts import ordered
from sega_jax.pipelines.execution.chunks import CHUNK, Chunks
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import Embeddings
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import USUAL
from sega_jax.pipelines.running import Plan, Running, check_callback, check_guidance, one_of
from sega_jax.pipelines.sizes import state_shape
from sega_jax.systems import paella
from sega_jax.systems.paella import Method, Models, Settings
from sega_jax.text.tokenizers import ByteTokenizer, Tokenizer

OUTPUTS = ("pil", "uint8", "float", "tokens")
# Bytes of a record that devices are asked to hold.
_RECORD = 2**32


class PaellaPipeline(Running):
    """A loaded checkpoint of Paella, version 3. Call it with a prompt and edits; `load` makes it.

    What is compiled and when, rows and devices are as of `Pipeline`. A text's length is padded to a multiple of 64
    bytes, exactly; others compile anew.
    """

    _system = paella

    def __init__(self, models: Models, tokenizer: Tokenizer | None, devices: Devices):
        self.devices = devices if isinstance(devices, Devices) else Devices(devices)
        self.tokenizer = tokenizer
        self.models = models

    @property
    def components(self) -> dict[str, Any]:
        """What makes this pipeline: `PaellaPipeline(**pipe.components)` is another one that shares the weights and the
        compiled programs."""
        return {"models": self.models, "tokenizer": self.tokenizer, "devices": self.devices}

    @property
    def models(self) -> Models:
        """The networks, on the devices: `pipe.models = pipe.models._replace(denoiser=...)` exchanges one."""
        return self._models

    @models.setter
    def models(self, models: Models) -> None:
        if not isinstance(models, Models):
            raise TypeError(f"models={type(models).__name__} should be the Models of another pipeline (pipe.models)")
        if models.clip is not None and self.tokenizer is None:
            raise ValueError("models have a clip, and the pipeline no tokenizer of its words; give one, or clip=None")
        self._models = Models.build(*self.devices.place(models))
        self._chunks = Chunks()
        self._bytes = None if models.byt5 is None else ByteTokenizer(models.byt5.config.vocab_size)
        self._states, self._embeddings = (Embeddings(f, self.devices) for f in (paella.encode, paella.embed))

    @property
    def dtype(self) -> np.dtype:
        """Of the denoiser, which is usually that of all networks."""
        return self.models.denoiser.byt5_mapper.kernel.dtype

    @property
    def _reads(self) -> bool:
        return self.models.byt5 is not None

    def __call__(
        self,
        prompt: Text | Sequence[Text],
        edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]] = (),
        *,
        negative_prompt: Text | Sequence[Text] | None = None,
        images_per_prompt: int = 1,
        steps: int = USUAL,
        renoise_steps: int | None = None,
        temperature: float | tuple[float, float] = paella.TEMPERATURE,
        choice: str = "sample",
        influence: tuple[float, float] = (1.0, 1.0),
        guidance_scale: float | Sequence[float] = USUAL,
        seed: int | Sequence[int] | None = None,
        key: jax.Array | None = None,
        tokens: Any = None,
        height: int | None = None,
        width: int | None = None,
        momentum_scale: float = 0.1,
        momentum_beta: float = 0.4,
        semantics: str = "diffusers",
        support: str = "channel",
        centred: bool = False,
        output: str = "pil",
        record: bool = False,
        callback: Callable[[int, float, np.ndarray], Any] | None = None,
        callback_steps: int = 1,
        progress: bool | None = None,
        strict: bool = True,
    ) -> Output:
        """Makes pictures of the prompts and guides them by the edits.

        Guidance is of the logits, before the temperature divides them, so that with a temperature that falls it grows
        stronger from step to step. The rule of the method's authors' own code for Paella, which adds s (e - u) from the
        warm-up on, is that of edits with threshold 0 and momentum_scale 0.

        Args:
            prompt: words, or a list; each is a row of the batch for each of its pictures. Wherever words stand, here
                and in edits, states of ByT5 may stand, [bytes, channels]: such a branch is told no embeddings of CLIP.
            edits, negative_prompt, images_per_prompt, guidance_scale, seed, key, momentum_scale, momentum_beta,
                callback, callback_steps, progress, strict: as of `Pipeline`; the usual guidance_scale is 8.
            steps: of the model; 32 are usual, and warm-ups and cool-downs count these.
            renoise_steps: after how many of them no token is renoised any more; None is 13 of 16 of all.
            temperature: that the logits are divided by, at the first step and at the last, evenly between; or one.
            choice: "sample" draws tokens, "argmax" takes the likeliest; "nearest" is the token whose entry in the
                codebook is nearest to the expected one.
            influence: factors of what pictures attend to in the prompt, (1.2, 0.4) in the published inference scripts
                and (1, 1), which is none, in the published sampler: see `sega_jax.nn.paella.Paella.condition`. The
                second is for the tokens of a picture: other factors need a prior, and a prompt in words.
            tokens: to start from and to renoise by, integers [pictures, height / f, width / f], in place of the seed's.
            height, width: in pixels, multiples of 32 for the published networks, whose own size is 256.
            semantics, support: see `sega_jax.method.guidance.sega`. The "channel"s are the tokens of the vocabulary: by
                default each has a threshold over the picture, as in the authors' code.
            centred: whether logits are taken less their mean over the vocabulary, which decides nothing but what the
                threshold compares.
            output: "pil", "uint8", "float" or "tokens".
            record: whether to return every call's predictions, of logits, which is for small networks.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, number, shape or range; nothing ran.
        """
        one_of("output", output, OUTPUTS)
        one_of("choice", choice, CHOICES)
        check_guidance(semantics, support)
        check_callback(callback, callback_steps)
        for name, value in (("centred", centred), ("record", record)):
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"{name}={value!r} should be True or False")
        shape = state_shape(self.models.sizes, height, width)
        steps = whole("steps", self.models.usual.steps if steps is USUAL else steps, 1)
        renoise_steps = int(steps * paella.RENOISED) if renoise_steps is None else renoise_steps
        table = renoising(
            steps,
            renoise_steps=whole("renoise_steps", renoise_steps, 0, steps),
            temperature=_pair("temperature", temperature),
        )
        rows = prepare(
            prompt,
            edits,
            negative_prompt=negative_prompt,
            images_per_prompt=images_per_prompt,
            seed=seed,
            key=key,
            latents=None,
            guidance_scale=self.models.usual.guidance_scale if guidance_scale is USUAL else guidance_scale,
            eta=0.0,
            shape=shape,
            calls=steps,
            semantics=semantics,
            strict=strict,
        )
        momentum_scale = number("momentum_scale", momentum_scale, 0, 1)
        momentum_beta = number("momentum_beta", momentum_beta, 0, 1)
        if not record:
            rows = Rows(**rows._asdict() | {"edits": ordered(rows.edits, momentum_scale)})
        stacked = Edits.stack(rows.edits, momentum_scale=momentum_scale, momentum_beta=momentum_beta)
        if record:
            self._check_record(len(rows), stacked.scale.shape[1], shape)
        influence = _pair("influence", influence)
        if influence != (1, 1) and (self.models.prior is None or not all(isinstance(p, str) for p in rows.prompts)):
            raise ValueError(
                f"influence={influence} is of the tokens of a picture, which a prior makes of words; it should be (1,"
                " 1) without a prior, or where a prompt is given as states"
            )
        influence = np.tile(influence, (len(rows), 1)).astype(np.float32)
        settings = Settings(rows.keys, rows.guidance_scale, influence, stacked if stacked.scale.size else None)
        method = Method(choice, semantics, support, bool(centred), bool(record))
        tokens = None if tokens is None else _grid(tokens, len(rows), shape)
        return self._run(Plan(rows, tokens, shape, table, settings, method, output, callback, callback_steps, progress))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) of the grid of a picture of this size in pixels.

        Raises:
            TypeError, ValueError: a size that is not a positive multiple of the checkpoint's factor.
        """
        return state_shape(self.models.sizes, height, width)[:2]

    def _check_record(self, rows: int, n: int, shape: tuple[int, int, int]) -> None:
        size = CHUNK * rows * (3 + n) * int(np.prod(shape)) * self._wide.itemsize
        if size > _RECORD * len(self.devices):
            raise ValueError(
                f"record=True would hold {size / 2**30:,.0f} GiB of logits; take smaller pictures or a smaller network,"
                f" of {_RECORD / 2**30:.0f} GiB at most a device"
            )

    def _text(self, rows: Rows, n: int) -> paella.Text:
        branches = self._branches(rows, n)
        words = list(dict.fromkeys(branch for branch in branches if isinstance(branch, str)))
        states: dict[str, np.ndarray] = {}
        if words:
            made = self._bytes(words)
            hidden = self._states(self.models.byt5, lambda _: made, words)
            states = {word: one[mask] for word, one, mask in zip(words, hidden, made[:, 1].astype(bool), strict=True)}
        width = self.models.denoiser.config.byt5_embd
        for branch in branches:
            if not isinstance(branch, str) and (branch.shape[1] != width or not len(branch)):
                raise ValueError(f"an embedding has shape {branch.shape}, expected (bytes, {width}), ByT5's states")
        found = [states[branch] if isinstance(branch, str) else branch for branch in branches]
        longest = -(-max(map(len, found)) // ByteTokenizer.block) * ByteTokenizer.block
        byt5 = np.zeros((len(found), longest, width), self.dtype)
        mask = np.zeros((len(found), longest), bool)
        for i, one in enumerate(found):
            byt5[i, : len(one)], mask[i, : len(one)] = one, True

        told, clip = np.array([isinstance(branch, str) for branch in branches]), None
        if words and self.models.clip is not None:
            known = dict(zip(words, self._embeddings(self.models.clip, self.tokenizer, words), strict=True))
            none = np.zeros_like(known[words[0]])
            clip = np.stack([known[branch] if isinstance(branch, str) else none for branch in branches])
        text = paella.Text(byt5, mask, clip, told)
        text = jax.tree.map(lambda array: array.reshape(len(rows), 2 + n, *array.shape[1:]), text)
        text = self.devices.split(text)
        if clip is None or self.models.prior is None:
            return text
        keys = self.devices.split(rows.keys)
        return self.devices.map(paella.imagine, (None, 0, 0))(self.models.prior, text, keys)


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers from 0 on, or one for both."""
    pair = tuple(value) if np.ndim(value) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}={value!r} should be a number, or two")
    low, high = (number(name, one) for one in pair)
    if min(low, high) < 0 or (name == "temperature" and not min(low, high)):
        raise ValueError(f"{name}={value!r} should be {'above' if name == 'temperature' else 'at least'} 0")
    return low, high


def _grid(tokens: Any, rows: int, shape: tuple[int, int, int]) -> np.ndarray:
    grid, labels = np.asarray(tokens), shape[2]
    if grid.dtype.kind not in "iu" or grid.shape != (rows, *shape[:2]):
        raise ValueError(
            f"tokens are of {grid.dtype} {grid.shape}, expected integers {(rows, *shape[:2])} (pictures, height, width)"
        )
    if grid.min() < 0 or grid.max() >= labels:
        raise ValueError(f"tokens are from {grid.min()} to {grid.max()}, expected from 0 to {labels - 1}")
    return grid.astype(np.int32)
