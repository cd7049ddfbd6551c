"""Prompts to pictures: the `Pipeline` that `sega_jax.load` makes.

The way of a call: arguments -> rows (`sega_jax.pipelines.batch`) -> the compiled programs of the checkpoint's system
(`sega_jax.systems`), whose loop is `sega_jax.method.sample.sample` -> pictures.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np

from sega_jax.method.guidance import Edits
from sega_jax.method.numerics import floating, is_finite
from sega_jax.method.schedules import Scheduler
from sega_jax.pipelines import images
from sega_jax.pipelines.batch import EditLike, Rows, Text, number, prepare, whole
from sega_jax.pipelines.components import as_scheduler
from sega_jax.pipelines.execution.active_concepts import ordered
from sega_jax.pipelines.execution.chunks import CHUNK, Chunks, enough_memory
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.execution.embedding_cache import Embeddings, as_long
from sega_jax.pipelines.images import Noising
from sega_jax.pipelines.output import OUTPUTS
from sega_jax.pipelines.output import Output as Output
from sega_jax.pipelines.running import Plan, Running, check_callback, check_guidance, one_of
from sega_jax.pipelines.safety import Safety
from sega_jax.pipelines.sizes import shape_from, state_shape, tile_of, told
from sega_jax.systems import deepfloyd, sdxl, stable_diffusion
from sega_jax.systems.base import Method, Settings, Small
from sega_jax.text.prompt_weights import Reading
from sega_jax.text.tokenizers import T5Tokenizer, Tokenizer, TokenizerPair

Models = stable_diffusion.Models | sdxl.Models | deepfloyd.Models
_SYSTEMS = {system.Models: system for system in (stable_diffusion, sdxl, deepfloyd)}


def system_of(models: Models) -> ModuleType:
    """Whose programs these networks are of."""
    return _SYSTEMS[type(models)]


class _Usual:
    def __repr__(self) -> str:
        return "as usual"


USUAL = _Usual()
# diffusers' default.
_STRENGTH = 0.8


class Pipeline(Running):
    """A loaded checkpoint of Stable Diffusion, also XL, its x4 upscaler, or a stage of DeepFloyd-IF. Call it with a
    prompt and edits; `load` makes it.

    Compiled once for a batch size, picture size, number of concepts and choice of semantics, support and
    recording, at the first call or by `compile`; all numbers, seeds and words may change from call to call at no cost.
    Rows are spread over the devices: fewer pictures than devices leave some of them idle, so ask for several seeds at
    once.

    `safety` is the checkpoint's safety checker; `pipe.safety = None` turns it off. `noising` is of upscalers: how
    they noise the small pictures. `zeros` is of Stable Diffusion XL: whether no negative prompt is an embedding of
    zeros, as its checkpoint says, or that of no words.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: Tokenizer | TokenizerPair | T5Tokenizer | None,
        scheduler: Scheduler,
        devices: Devices,
        safety: Safety | None = None,
        noising: Noising | None = None,
        zeros: bool = False,
    ):
        if not isinstance(models, Models):
            raise TypeError(f"models={type(models).__name__} should be the Models of another pipeline (pipe.models)")
        if not (safety is None or isinstance(safety, Safety)):
            raise TypeError(f"safety={safety!r} should be another pipeline's (pipe.safety), or None")
        self.devices = devices if isinstance(devices, Devices) else Devices(devices)
        self._system = system_of(models)
        self._models = models.build(*models)
        self._check_noising(self._models, noising)
        self.tokenizer = tokenizer
        self._scheduler = as_scheduler(scheduler)
        self.safety = safety
        self.noising = noising
        self.zeros = zeros
        self._chunks = Chunks()
        self._embeddings = Embeddings(self._system.encode, self.devices)

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
            "noising": self.noising,
            "zeros": self.zeros,
        }

    @property
    def models(self) -> Models:
        """The networks, on the devices: `pipe.models = pipe.models._replace(unet=...)` exchanges one."""
        return self._models

    @models.setter
    def models(self, models: Models) -> None:
        if not isinstance(models, type(self._models)):
            raise TypeError(f"models={type(models).__name__} should be Models, as pipe.models._replace(unet=...)")
        built = models.build(*self.devices.place(models))
        self._check_noising(built, self.noising)
        self._models = built
        self._chunks = Chunks()
        self._embeddings.clear()

    @staticmethod
    def _check_noising(models: Models, noising: Noising | None) -> None:
        if (noising is None) == bool(models.sizes.enlarges):
            raise TypeError(
                f"noising={noising!r} should be another pipeline's (pipe.noising) for an upscaler, else None"
            )

    @property
    def _reads(self) -> bool:
        return self.models.text_encoder is not None and self.tokenizer is not None

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
        long_prompts: bool = False,
        weighted: bool = False,
        images_per_prompt: int = 1,
        image: Any = None,
        strength: float = USUAL,
        noise_level: int | Sequence[int] | None = None,
        noise_anew: bool = False,
        original_size: Any = None,
        crops_top_left: Any = None,
        target_size: Any = None,
        steps: int | str | Sequence[int] = USUAL,
        guidance_scale: float | Sequence[float] = USUAL,
        guidance_rescale: float | Sequence[float] = 0.0,
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
        rows_at_once: int | None = None,
        tiled: bool | int = False,
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
                here and in edits, their embedding may stand: [tokens, channels], as `encode` gives it; for Stable
                Diffusion XL with the pooled text as one more row (`sega_jax.systems.sdxl`).
            edits: words and `Edit`s for every row; or a list of such lists, one for each prompt or picture.
            negative_prompt: what to stay away from, one for all or one each. For Stable Diffusion XL none is not the
                same as "": it is zeros, where the checkpoint says so.
            long_prompts: whether texts longer than what CLIP reads, 75 tokens beside its first and last, are read in
                chunks of so many instead of cut; the UNet attends to all of them. Those that take fewer chunks than
                others of the call have chunks of no words after them. Other numbers of chunks are other programs.
            weighted: whether brackets in texts are weights, "(word:1.2)", "(word)" for 1.1 and "[word]" for 1 / 1.1
                (`sega_jax.text.prompt_weights.fragments`); the hidden states of such tokens are multiplied by them.
            images_per_prompt: pictures of each prompt, from different seeds.
            image: for Stable Diffusion the picture to start from, of the size of the one that is made: its latents,
                drawn from what the autoencoder's encoder says, with the noise of the first step that is run. For an
                upscaler the small picture that it enlarges: DeepFloyd-IF's second stage makes it 4 times larger, the
                x4 upscaler by its autoencoder's factor, which is 4, too. One for all or one each: of PIL; the path of
                a file; or an array [height, width, 3] of uint8, or of floats in [0, 1].
            strength: in (0, 1], the share of the steps that is run after a picture to start from, by default 0.8: the
                last int(steps strength), as in diffusers (`Scheduler.table`). Warm-ups and cool-downs count the calls
                that are run. 1 leaves what the noise of the first step leaves of the picture.
            noise_level: how much noise is put on it, a timestep of that noise's training; one for all or one each.
                None is the system's usual one.
            noise_anew: whether that noise is another one at every call, as in DeepFloyd-IF's own code, or the same, as
                in diffusers.
            original_size, crops_top_left, target_size: what Stable Diffusion XL is told besides, pairs (height, width)
                and (top, left) in pixels, one for all or one each: of the picture before it was made smaller and
                cropped, where it was cropped, and of the one to be made. By default this one's size, (0, 0), and its
                size. All branches of a row are told the same.
            steps: of the solver, 1 to the training's (1000); or timesteps, as `Scheduler.table` takes them. Usual are
                50 for Stable Diffusion, also XL, 75 for its upscaler, 100 and 50 for DeepFloyd-IF's two stages.
            guidance_scale: s of u + s (p - u), one for all or one each; 1 is no classifier-free guidance. Usual are
                7.5, 5 for XL, 9, 7 and 4.
            guidance_rescale: in [0, 1], how much of the excess in contrast of a high guidance scale is taken back
                (`sega_jax.method.guidance.rescale`), one for all or one each; 0.7 goes with zero-SNR betas. What edits
                add is not rescaled. A call where none has it is of another program.
            eta: DDIM's share of fresh noise in [0, 1], one for all or one each; PNDM has none.
            seed: s, meaning s, s + 1, ... for several pictures, or a list with one each; 0 by default.
            key: a JAX key in place of a seed, into which every row folds its number.
            latents: the initial noise, [pictures, height / f, width / f, channels], in place of the seed's.
            height, width: in pixels, multiples of the checkpoint's factor f; its own size by default. f is 1 for
                DeepFloyd-IF, where they are multiples of what its UNet halves.
            momentum_scale, momentum_beta: s_m and beta in [0, 1] of edits that name none.
            semantics, support: see `sega_jax.method.guidance.sega`.
            replay: guidance to add, recorded before, in any floating dtype: one for all pictures,
                [1, calls, height / f, width / f, channels], or one each. Calls beyond its last gain nothing.
            rows_at_once: pictures whose predictions a device makes at once, where its memory does not hold those of
                all. None is all, but one after another on CPUs, which are quicker so. Rows are equal but for rounding.
            tiled: whether larger pictures than those of the autoencoder's training are decoded in overlapping tiles of
                that size, which takes less memory and shows where a tile would be decoded otherwise than the whole, as
                in diffusers; or the size of tiles in pixels, a multiple of 4 times the checkpoint's factor.
            output: "pil", "uint8", "float" or "latent".
            record: whether to return every call's predictions.
            callback: called as (call, timestep, latents) after call 0 and every `callback_steps`-th after it.
            progress: whether to show a bar; None is in terminals and notebooks.
            strict: whether an edit with its cool-down before its warm-up is an error, or a warning.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, number, shape or range; nothing ran.
        """
        one_of("output", output, OUTPUTS)
        check_guidance(semantics, support)
        check_callback(callback, callback_steps)
        tile = tile_of(getattr(self.models, "vae", None), tiled)
        images = self._images(image)
        enlarges = bool(self.models.sizes.enlarges)
        starts = images is not None and not enlarges
        shape = shape_from(self.models.sizes, height, width, None if images is None else images.shape[1:3])
        steps = self.models.usual.steps if steps is USUAL else steps
        guidance_scale = self.models.usual.guidance_scale if guidance_scale is USUAL else guidance_scale
        table = self.scheduler.table(steps, _strength(strength, starts))
        if negative_prompt is None and self.zeros:
            most = self.models.text_encoder.config.max_position_embeddings
            tokens = most if self.tokenizer is None else self.tokenizer.length
            negative_prompt = np.zeros(self.models.text_shape(tokens), np.float32)
        rows = prepare(
            prompt,
            edits,
            negative_prompt=negative_prompt,
            reading=self._reading(long_prompts, weighted),
            images_per_prompt=images_per_prompt,
            seed=seed,
            key=key,
            latents=latents,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            image=images,
            noise_level=self.models.usual.noise_level if noise_level is None else noise_level,
            most_noise=None if self.noising is None else self.noising.most,
            shape=shape,
            calls=len(table.call),
            semantics=semantics,
            strict=strict,
        )
        predicts_variance = self.models.unet.config.out_channels > shape[2]
        if self.scheduler.options.get("variance_type") == "learned_range" and not predicts_variance:
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
        if not record:
            rows = Rows(**rows._asdict() | {"edits": ordered(rows.edits, momentum_scale)})
        stacked = Edits.stack(rows.edits, momentum_scale=momentum_scale, momentum_beta=momentum_beta)
        replay = _replayed(replay, len(rows), shape, self._wide)
        noisy = self._noised(rows, noise_anew) if enlarges else None
        settings = Settings(
            rows.keys,
            rows.guidance_scale,
            rows.eta,
            stacked if stacked.scale.size else None,
            replay,
            noisy,
            rows.guidance_rescale,
            self._told(len(rows), shape, original_size, crops_top_left, target_size),
        )
        latents = None if rows.latents is None else _cast("latents", rows.latents, self._wide)
        # On CPUs a row of a larger batch takes longer.
        usual = 1 if self.devices.devices[0].platform == "cpu" else None
        at_once = usual if rows_at_once is None else whole("rows_at_once", rows_at_once, 1)
        method = Method(self.scheduler.solver, semantics, support, record, at_once)
        pictures = rows.images.astype(self._wide) if starts else None
        plan = Plan(rows, latents, shape, table, settings, method, output, callback, callback_steps, progress)
        return self._run(plan._replace(pictures=pictures, tile=tile))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of a picture of this size in pixels.

        Raises:
            TypeError, ValueError: a size that is not a positive multiple of the checkpoint's factor, or none where
                the small picture says it.
        """
        return state_shape(self.models.sizes, height, width)

    def _images(self, image: Any) -> np.ndarray | None:
        """The pictures to start from, or to enlarge, as they are given, [pictures, height, width, 3] in [-1, 1]; None
        for none."""
        if image is None:
            if self.models.sizes.enlarges:
                raise ValueError("image=None should be the small picture that this upscaler makes larger")
            return None
        if not self.models.sizes.enlarges and not hasattr(self.models, "vae"):
            raise ValueError("image is what upscalers and Stable Diffusion take, and this is neither; leave it out")
        return images.read(image)

    def _noised(self, rows: Rows, anew: bool) -> Small:
        if not isinstance(anew, bool | np.bool_):
            raise TypeError(f"noise_anew={anew!r} should be True or False")
        signal, noise = self.noising.scheduler.shares(rows.levels)
        return Small(rows.images.astype(self._wide), rows.levels, signal, noise, np.full(len(rows), anew))

    def _told(self, rows: int, shape: tuple[int, int, int], *sizes: Any) -> np.ndarray | None:
        if self.models.unet.config.tells_sizes:
            height, width = (self.models.sizes.factor * side for side in shape[:2])
            return told((height, width), rows, *sizes).astype(self._wide)
        if any(size is not None for size in sizes):
            raise ValueError(
                "original_size, crops_top_left and target_size are of Stable Diffusion XL, and this checkpoint is none;"
                " leave them out"
            )
        return None

    def encode(
        self,
        texts: str | Sequence[str],
        second: str | Sequence[str] | None = None,
        *,
        long_prompts: bool = False,
        weighted: bool = False,
    ) -> np.ndarray:
        """Embeddings [texts, tokens, channels] of texts, in the networks' dtype; remembered by tokens. Those of Stable
        Diffusion XL have one row more; `second` are texts for its second text encoder where that reads others, one for
        all or one each.

        Args:
            long_prompts, weighted: as of a call; tokens are then those of the longest text's chunks.

        Raises:
            TypeError: it is not words or a non-empty list of them.
            ValueError: there is no text encoder, or no second one; not as many texts for it; or a weight that is no
                number.
        """
        reading = self._reading(long_prompts, weighted)
        texts = _listed("texts", texts)
        self._check_reads(texts)
        tokenizer = self.tokenizer
        if second is not None and not isinstance(tokenizer, TokenizerPair):
            raise ValueError("second is of Stable Diffusion XL, which has two text encoders; leave it out")
        if reading is not None:
            return np.stack(self._as_long(self._embeddings.read(self.models.reader, tokenizer, texts, reading)))
        if second is not None:
            second = _listed("second", second)
            if len(second) not in (1, len(texts)):
                raise ValueError(f"second has {len(second)} entries, expected {len(texts)}, one a text, or one for all")
            tokenizer = partial(tokenizer, second=second * (len(texts) // len(second)))
        return self._embeddings(self.models.reader, tokenizer, texts)

    def _reading(self, long_prompts: Any, weighted: Any) -> Reading | None:
        for name, value in (("long_prompts", long_prompts), ("weighted", weighted)):
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"{name}={value!r} should be True or False")
            if value and not isinstance(self.tokenizer, Tokenizer):
                raise ValueError(
                    f"{name}=True is of pipelines with one CLIP text encoder, and this is none; leave it out"
                )
        return Reading(bool(long_prompts), bool(weighted)) if long_prompts or weighted else None

    def _as_long(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Embeddings as long as the longest, by chunks of no words."""
        if len({len(text) for text in texts}) == 1:
            return list(texts)
        self._check_reads([""])
        return as_long(texts, self._embeddings(self.models.reader, self.tokenizer, [""])[0])

    def _text(self, rows: Rows, n: int) -> jax.Array:
        """Embeddings [rows, 2 + n, tokens, channels]."""
        branches = self._branches(rows, n)
        words = list(dict.fromkeys(branch for branch in branches if isinstance(branch, str)))
        given = next((branch.shape[0] for branch in branches if not isinstance(branch, str)), 0)
        tokens = given - self.models.text_shape(0)[0] if self.tokenizer is None else self.tokenizer.length
        shape = self.models.text_shape(tokens)
        for branch in branches:
            if not isinstance(branch, str) and not self._is_embedding(branch, shape):
                pooled = " + 1, the pooled text" if self.models.unet.config.tells_sizes else ""
                raise ValueError(f"an embedding has shape {branch.shape}, expected {shape} (tokens{pooled}, channels)")
        encoder, hidden = (self.models.reader, self.tokenizer), []
        if words and rows.reading is None:
            hidden = self._embeddings(*encoder, words)
        elif words:
            hidden = self._embeddings.read(*encoder, words, rows.reading)
        hidden = dict(zip(words, hidden, strict=True))
        text = [(hidden[b] if isinstance(b, str) else b).astype(self.dtype, copy=False) for b in branches]
        text = np.stack(self._as_long(text))
        return self.devices.split(text.reshape(len(rows), 2 + n, *text.shape[1:]))

    def _is_embedding(self, array: np.ndarray, shape: tuple[int, int]) -> bool:
        """Whether it is of this (tokens, channels), or for CLIP of several chunks of them."""
        if array.shape[1] != shape[1] or not len(array):
            return False
        return not len(array) % shape[0] if isinstance(self.tokenizer, Tokenizer) else len(array) == shape[0]

    def _flags(self, images: np.ndarray, finite: np.ndarray) -> np.ndarray | None:
        if self.safety is None:
            return None
        pixels = self.devices.split(self.safety.feature_extractor(images))
        program = self.devices.map(stable_diffusion.check, (None, 0))
        with enough_memory(pixels.shape):
            return self.devices.gather(program(self.safety.checker, pixels), len(images)) & finite


def _listed(name: str, texts: Any) -> list[str]:
    listed = [texts] if isinstance(texts, str) or not hasattr(texts, "__iter__") else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"{name}={listed!r} should be words or a non-empty list of them")
    return listed


def _strength(strength: Any, starts: bool) -> float:
    if strength is USUAL:
        return _STRENGTH if starts else 1.0
    if not starts:
        raise ValueError(f"strength={strength!r} is of a picture to start from; give it as image, or leave both out")
    return number("strength", strength, 0, 1)


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
    return np.pad(replay, ((0, 0), (0, -replay.shape[1] % CHUNK), (0, 0), (0, 0), (0, 0)))
