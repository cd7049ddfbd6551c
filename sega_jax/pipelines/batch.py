"""The arguments of a call, checked before anything runs and spread to one row per picture."""

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.guidance import Edit
from sega_jax.method.numerics import floating
from sega_jax.text.prompt_weights import Reading

Text = str | np.ndarray | jax.Array
EditLike = Edit | Text


class Rows(NamedTuple):
    """A call's pictures, prompt by prompt, the pictures of one prompt side by side."""

    prompts: list[str | np.ndarray]  # words, or their embedding [tokens, channels]
    negatives: list[str | np.ndarray]
    edits: list[tuple[Edit, ...]]
    seeds: list[int] | None  # None where a key was given
    keys: jax.Array  # typed keys [rows]
    latents: np.ndarray | None  # float [rows, height, width, channels]
    guidance_scale: np.ndarray  # float [rows]
    eta: np.ndarray  # float [rows]
    images: np.ndarray | None = None  # float [rows, height, width, 3] in [-1, 1], of upscalers
    levels: np.ndarray | None = None  # int32 [rows], of the noise on them
    guidance_rescale: np.ndarray | None = None  # float [rows]; None for none
    reading: Reading | None = None  # how words are read; None as they stand, and cut

    def __len__(self) -> int:
        return len(self.prompts)


def prepare(
    prompt: Text | Sequence[Text],
    edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]],
    *,
    negative_prompt: Text | Sequence[Text] | None,
    images_per_prompt: int,
    seed: int | Sequence[int] | None,
    key: jax.Array | None,
    latents: Any,
    guidance_scale: float | Sequence[float],
    eta: float | Sequence[float],
    shape: tuple[int, int, int],
    calls: int,
    semantics: str,
    strict: bool,
    image: np.ndarray | None = None,
    noise_level: int | Sequence[int] | None = None,
    most_noise: int | None = None,
    guidance_rescale: float | Sequence[float] = 0.0,
    reading: Reading | None = None,
) -> Rows:
    """Checks and spreads; `shape` is that of one row's latents, `calls` the number of model calls, `image`
    [1 or entries, height, width, 3] and `most_noise` the highest `noise_level`, both None but for upscalers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, number, shape or range; with `strict`, also
            an edit that ends before it begins.
    """
    prompts = _texts("prompt", prompt)
    if not prompts:
        raise TypeError(f"prompt={_show(prompt)} should be words or a non-empty list of them")
    count = whole("images_per_prompt", images_per_prompt, 1)
    total = len(prompts) * count

    def spread(name: str, values: Sequence) -> list:
        """Entries for each prompt, or for each picture."""
        if len(values) == total:
            return list(values)
        if len(values) == len(prompts):
            return [value for value in values for _ in range(count)]
        pictures = f", or {total}, one a picture" if count > 1 else ""
        raise ValueError(f"{name} has {len(values)} entries, expected {len(prompts)}, one a prompt{pictures}")

    negatives = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if len(negatives) == 1:
        negatives *= total
    rows = _edits(edits, total, spread)
    _check_clocks(rows, calls, semantics, strict)
    rescaled = _numbers("guidance_rescale", guidance_rescale, total, spread, 0, 1)
    return Rows(
        prompts=spread("prompt", prompts),
        negatives=spread("negative_prompt", negatives),
        edits=rows,
        seeds=(seeds := _seeds(seed, total) if key is None else None),
        keys=_keys(seed, seeds, key, total),
        latents=_latents(latents, total, shape),
        guidance_scale=_numbers("guidance_scale", guidance_scale, total, spread, -math.inf, math.inf),
        eta=_numbers("eta", eta, total, spread, 0, 1),
        images=None if image is None else np.stack(list(image) * total if len(image) == 1 else spread("image", image)),
        levels=_levels(noise_level, most_noise, total, spread),
        guidance_rescale=rescaled if rescaled.any() else None,
        reading=reading,
    )


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """A whole number in a range.

    Raises:
        TypeError, ValueError: anything else.
    """
    limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={_show(value)} should be a whole number, {limit}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} should be {limit}")
    return int(value)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in a range.

    Raises:
        TypeError, ValueError: anything else.
    """
    limit = "a finite number" if low == -math.inf else f"a number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number):
        raise TypeError(f"{name}={_show(value)} should be {limit}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={_show(value)} should be {limit}")
    return float(value)


def _texts(name: str, value: Any) -> list[str | np.ndarray]:
    """Words or embeddings: one, or several."""
    several = isinstance(value, list | tuple) or getattr(value, "ndim", 2) == 3
    texts = list(value) if several else [value]
    for i, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if not hasattr(text, "ndim"):
            raise TypeError(f"{name}={_show(value)} should be words, their embedding, or a non-empty list of them")
        texts[i] = floating(name, text, "(tokens, channels)")
    return texts


def _edits(edits: Any, total: int, spread: Callable[[str, Sequence], list]) -> list[tuple[Edit, ...]]:
    def one(edit: Any) -> Edit:
        if isinstance(edit, Edit):
            return edit
        if isinstance(edit, str) or hasattr(edit, "ndim"):
            return Edit(edit)
        raise TypeError(f"edits: {_show(edit)} should be words or an Edit")

    if isinstance(edits, Edit | str) or getattr(edits, "ndim", 0) == 2:
        edits = [edits]
    if not isinstance(edits, Sequence):
        raise TypeError(f"edits={_show(edits)} should be a list of words and Edits, or one such list a prompt")
    nested = [isinstance(entry, list | tuple) for entry in edits]
    if any(nested):
        if not all(nested):
            raise TypeError("edits mixes lists with single edits; give one list for all, or one a prompt")
        return [tuple(one(edit) for edit in row) for row in spread("edits", edits)]
    return [tuple(one(edit) for edit in edits)] * total


def _check_clocks(rows: list[tuple[Edit, ...]], calls: int, semantics: str, strict: bool) -> None:
    gate = ", and the momentum of the others waits for it" if semantics == "diffusers" else ""
    for edit in {id(edit): edit for row in rows for edit in row}.values():
        name = _show(edit.concept)
        if edit.cooldown is not None and edit.cooldown <= edit.warmup:
            message = f"the edit {name} ends at cooldown={edit.cooldown}, before it begins at warmup={edit.warmup}"
            if strict:
                raise ValueError(f"{message}; give a cooldown above the warmup, or None")
            acts = "only its momentum acts" if semantics == "diffusers" else "it changes nothing"
            warnings.warn(f"{message}: {acts}", stacklevel=4)
        elif edit.warmup >= calls:
            warnings.warn(
                f"the edit {name} begins at warmup={edit.warmup}, after the last of {calls} model calls, and"
                f" changes nothing{gate}; lower its warmup or take more steps",
                stacklevel=4,
            )


def _seeds(seed: Any, total: int) -> list[int]:
    top = 2**32 - 1
    if seed is None:
        seed = 0
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        if len(seed) != total:
            raise ValueError(f"seed has {len(seed)} entries, expected {total}, one a picture (or one number)")
        return [whole("seed", s, 0, top) for s in seed]
    return [whole("seed", seed, 0, top - total + 1) + i for i in range(total)]


# A seed means one picture whatever JAX is set to; other generators, vectorised over rows, would also make
# a row's noise depend on its neighbours.
_IMPLEMENTATION = "threefry2x32"


@jax.jit
def _from_seeds(seeds: jax.Array) -> jax.Array:
    return jax.vmap(partial(jax.random.key, impl=_IMPLEMENTATION))(seeds)


@jax.jit
def _fold(key: jax.Array, rows: jax.Array) -> jax.Array:
    if str(jax.random.key_impl(key)) != _IMPLEMENTATION:
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,), "uint32"), impl=_IMPLEMENTATION)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _keys(seed: Any, seeds: list[int] | None, key: Any, total: int) -> jax.Array:
    if seeds is not None:
        return _from_seeds(np.asarray(seeds, np.uint32))
    if seed is not None:
        raise ValueError("seed and key were both given; they say the same thing, give one")
    if not isinstance(key, jax.Array):
        raise TypeError(f"key={_show(key)} should be a JAX key, as of jax.random.key(0)")
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            raise TypeError(f"key={_show(key)} should be a JAX key, as of jax.random.key(0)") from None
    if key.shape:
        raise ValueError(f"key has shape {key.shape}, expected one key; every row folds its number in")
    return _fold(key, np.arange(total, dtype=np.uint32))


def _latents(latents: Any, total: int, shape: tuple[int, int, int]) -> np.ndarray | None:
    if latents is None:
        return None
    array = floating("latents", latents, "(pictures, height, width, channels)")
    if array.shape != (total, *shape):
        hint = "; latents are channels last here" if array.shape == (total, shape[2], *shape[:2]) else ""
        raise ValueError(
            f"latents have shape {array.shape}, expected {(total, *shape)} (pictures, height, width, channels){hint}"
        )
    return array


def _numbers(
    name: str, value: Any, total: int, spread: Callable[[str, Sequence], list], low: float, high: float
) -> np.ndarray:
    """A number for all rows, or one each."""
    if (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", 0) == 1:
        return np.asarray(spread(name, [number(name, v, low, high) for v in value]))
    return np.full(total, number(name, value, low, high))


def _levels(level: Any, most: int | None, total: int, spread: Callable[[str, Sequence], list]) -> np.ndarray | None:
    if most is None:
        if level is not None:
            raise ValueError(f"noise_level={_show(level)} is of upscalers, and this checkpoint is none; leave it out")
        return None
    several = isinstance(level, list | tuple) or getattr(level, "ndim", 0) == 1
    levels = [whole("noise_level", one, 0, most) for one in (level if several else [level])]
    return np.asarray(spread("noise_level", levels) if several else levels * total, np.int32)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
