"""What the families of continuous states share, latents or pixels with a UNet: how a call is set up, and the pure
functions of their `Sampler`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.checks import check_int
from sega_jax.method.guidance import Predictions
from sega_jax.method.numerics import is_finite
from sega_jax.method.schedules import Row, Scheduler
from sega_jax.method.solvers import SOLVERS, Solver
from sega_jax.nn.unet import Projected, UNet2DConditionModel, UNetConfig, guidance_embedding
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.systems.base import Given, Settings, Setup, Sizes
from sega_jax.systems.diffusion_call import STRENGTH, ConditionedCall, DiffusionCall, StartingCall
from sega_jax.systems.low_res import LowResCondition, noised, resized
from sega_jax.systems.programs import INITIAL, normal
from sega_jax.systems.sizes import shape_from, tile_side

_CALLS = 64


class DiffusionSettings(NamedTuple):
    """The arrays of these families in `Settings.own`."""

    eta: Any  # [rows]
    low_res: LowResCondition | None = None  # of upscalers
    guidance: Any = None  # [rows, channels], embedded for networks that take the guidance scale as an input
    size_conditioning: Any = None  # of SDXL: [rows, 6], original height and width, crop's top and left, target's


class DiffusionStatic(NamedTuple):
    """What these families compile in, in `Static.own`."""

    solver: str = "ddim"
    rows_at_once: int | None = None  # whose predictions a device makes at once; None is all


def table(call: DiffusionCall, scheduler: Scheduler) -> Row:
    """Returns the schedule's table of a call."""
    return scheduler.table(call.steps)


def table_from_picture(call: StartingCall, scheduler: Scheduler) -> Row:
    """Returns the schedule's table of a call; a call that starts from a picture enters the schedule later."""
    if call.image is None:
        return scheduler.table(call.steps)
    return scheduler.table(call.steps, STRENGTH if call.strength is None else call.strength)


def static(call: DiffusionCall, scheduler: Scheduler) -> DiffusionStatic:
    """Returns what a call compiles in."""
    return DiffusionStatic(scheduler.solver, call.rows_at_once)


def setup(
    call: DiffusionCall,
    given: Given,
    sizes: Sizes,
    table: Row,
    *,
    image: np.ndarray | None = None,
    low_res: LowResCondition | None = None,
    image_noise: np.ndarray | None = None,
    size_conditioning: Callable[[tuple[int, int]], np.ndarray] | None = None,
    vae: AutoencoderKL | None = None,
    tiled: bool | int = False,
) -> Setup:
    """Checks the arguments of these families against the checkpoint, and sets the call up.

    Args:
        table: of the schedule.
        image: pictures [1 or entries, height, width, 3] that decide about the size.
        low_res: their conditioning, where they are enlarged; else they are what the sampling starts from.
        image_noise: as of the call.
        size_conditioning: (height, width) in pixels -> [rows, 6].
        vae: what decodes, where it can do so in tiles.
        tiled: as of the call.

    Raises:
        TypeError, ValueError: arguments that do not fit the checkpoint.
    """
    shape = shape_from(sizes, call.height, call.width, None if image is None else image.shape[1:3])
    _check_variance(given, shape)
    check(call, given.scheduler, given.warn)
    rows = given.rows
    rescaled = per_row("guidance_rescale", call.guidance_rescale, given)
    if low_res is not None:
        low_res = low_res._replace(z=_low_res_noise(image_noise, low_res, (len(table.call), rows, *shape), given.dtype))
    eta = per_row("eta", defaults(given.scheduler)["eta"] if call.eta is None else call.eta, given)
    own = DiffusionSettings(
        eta,
        low_res,
        _guidance_input(call, given, rescaled),
        None if size_conditioning is None else size_conditioning((sizes.factor * shape[0], sizes.factor * shape[1])),
    )
    picture = picture_noise = None
    if image is not None and low_res is None:
        picture = np.stack(spread_pictures(image, given)).astype(given.dtype)
        picture_noise = _noise("image_noise", image_noise, (rows, *shape), given.dtype)
    made = static(call, given.scheduler)
    if made.rows_at_once is None and given.platform == "cpu":
        # On CPUs a row of a larger batch takes longer.
        made = made._replace(rows_at_once=1)
    tile = tile_side(vae, tiled)
    return Setup(
        shape=shape,
        table=table,
        own=own,
        static=made,
        x=_noise("latents", call.latents, (rows, *shape), given.dtype),
        picture=picture,
        picture_noise=picture_noise,
        draws=draws_noise(eta, given.scheduler, table),
        guidance_scale=None if own.guidance is None else np.ones(rows),
        guidance_rescale=rescaled if rescaled.any() else None,
        decode={} if tile is None else {"tile": tile},
    )


def _guidance_input(call: DiffusionCall, given: Given, rescaled: np.ndarray) -> np.ndarray | None:
    """Returns the embedded guidance scales [rows, channels] of a network that was distilled from classifier-free
    guidance and takes them as an input; None for other networks.

    Raises:
        ValueError: arguments of classifier-free guidance, which there is none of then; without `strict` those without
            an effect are warned about.
    """
    channels = given.models.unet.config.time_cond_proj_dim
    if not channels:
        return None
    scale = per_row("guidance_scale", call.guidance_scale, given)
    distilled = "this network was distilled from classifier-free guidance and takes guidance_scale as its input"
    if scale.min() < 1:
        raise ValueError(f"guidance_scale={scale.min():g}: {distilled}; give at least 1")
    negative = call.negative_prompt
    words = negative if isinstance(negative, list | tuple) else [negative]
    for name, is_given in (
        ("negative_prompt", not all(text is None or (isinstance(text, str) and not text) for text in words)),
        ("guidance_rescale", rescaled.any()),
    ):
        if is_given and call.strict:
            raise ValueError(f"{name} does not change the pictures: {distilled}; leave it out")
        if is_given:
            given.warn(f"{name} does not change the pictures: {distilled}")
    return guidance_embedding(scale.astype(given.dtype), channels)


def per_row(name: str, value: Any, given: Given) -> np.ndarray:
    """Returns a number for each row, from one for all, or one for each prompt or picture."""
    if isinstance(value, list):
        return np.asarray(given.spread(name, value))
    return np.full(given.rows, value)


def spread_pictures(image: np.ndarray, given: Given) -> list[np.ndarray]:
    """Returns a picture for each row, from one for all, or one for each prompt or picture."""
    return list(image) * given.rows if len(image) == 1 else given.spread("image", list(image))


def check(call: DiffusionCall, scheduler: Scheduler, warn: Callable[[str], None]) -> None:
    """Checks the arguments that depend on the scheduler.

    Raises:
        ValueError: eta is given and the solver has none; without `strict` that is a warning.
    """
    if np.any(call.eta) and scheduler.eta is None:
        message = f"eta={call.eta} is for DDIM and TCD, {scheduler.name} has none"
        if call.strict:
            raise ValueError(f"{message}; leave it out")
        warn(f"{message}; it is ignored")


def defaults(scheduler: Scheduler) -> dict[str, float]:
    """Returns the arguments of a call that depend on the scheduler where they are None."""
    return {"eta": scheduler.eta or 0.0}


def _check_variance(given: Given, shape: tuple[int, int, int]) -> None:
    predicts_variance = given.models.unet.config.out_channels > shape[2]
    if given.scheduler.options.get("variance_type") == "learned_range" and not predicts_variance:
        raise ValueError(
            f"{given.scheduler.name}: variance_type='learned_range' is for networks that predict their variance, and"
            " this one does not; give 'fixed_small'"
        )


def draws_noise(eta: np.ndarray, scheduler: Scheduler, table: Row) -> bool:
    """Tells whether the solver adds noise at some model call; `eta` are the rows' shares of it."""
    if scheduler.eta is None:
        return bool(np.any(table.solver.noise))
    return bool(np.any(eta) and np.any(table.solver.sigma))


def _noise(name: str, noise: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """Returns noise that a user gave, checked and in the loop's dtype; None stays None.

    Raises:
        ValueError: it has another shape, or an entry is out of range.
    """
    if noise is None:
        return None
    if noise.shape != shape:
        calls, verb = "calls, " if len(shape) == 5 else "", "have" if name.endswith("s") else "has"
        channels_first = (*shape[:-3], shape[-1], *shape[-3:-1])
        hint = f"; {name} are channels last here" if noise.shape == channels_first else ""
        raise ValueError(
            f"{name} {verb} shape {noise.shape}, expected {shape} ({calls}pictures, height, width, channels){hint}"
        )
    return cast(name, noise, dtype)


def _low_res_noise(
    noise: np.ndarray | None, low_res: LowResCondition, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray | None:
    """Returns the noise that a user gave for low-resolution pictures, [rows, 1 or calls, height, width, 3].

    Args:
        shape: calls, rows, height, width and channels of the states.
    """
    anew, shape = low_res.anew.all(), (*shape[:-1], low_res.picture.shape[-1])
    noise = _noise("image_noise", noise, shape if anew else shape[1:], dtype)
    if noise is None:
        return None
    if not anew:
        return noise[:, None]
    # Zeros that no call reads, so that other numbers of calls share a program.
    return np.pad(np.swapaxes(noise, 0, 1), ((0, 0), (0, -len(noise) % _CALLS), *[(0, 0)] * 3))


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns an array in the loop's dtype, so that arrays of other dtypes share a program.

    Raises:
        ValueError: an entry is out of its range.
    """
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not is_finite(array):
        raise ValueError(f"{name} has entries beyond the range of {dtype}")
    return array


def initial(
    settings: Settings, x: Any, scale: Any, clean: Any, signal: Any, *, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Returns the first state: standard normal noise, given or drawn, times the scale; with `clean`, plus that times
    its signal."""
    if x is None:
        x = normal(settings.key, INITIAL, shape, dtype)
    x = jnp.asarray(x, dtype) * jnp.asarray(scale).astype(dtype)
    if clean is not None:
        x += jnp.asarray(clean, dtype) * jnp.asarray(signal).astype(dtype)
    return x


def solver(networks: Any, settings: Settings, own: DiffusionStatic) -> Solver:
    """Returns the solver of these choices."""
    del networks
    return SOLVERS[own.solver](settings.own.eta)


def draw(networks: Any, settings: Settings, x: jax.Array) -> Callable:
    """Returns the function that draws the noise of a call."""
    del networks

    def noise(call, shape):
        return normal(settings.key, call.call, shape[1:], x.dtype)

    return noise


def denoiser(
    unet: UNet2DConditionModel, context: Any, settings: Settings, own: DiffusionStatic, x: jax.Array
) -> Callable[[jax.Array, Any], Predictions]:
    """Returns (x, call) -> predictions of all branches. The UNet projects the context once, for all calls.

    Args:
        context: what the UNet is told of each branch, arrays [rows, branches, ...].
    """
    texts = unet.project(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), context))
    low_res = settings.own.low_res
    if low_res is not None:
        picture = resized(jnp.asarray(low_res.picture, x.dtype), x.shape[1:3])
        low_res = low_res._replace(picture=picture)

    def predictions(x, call):
        seen = None if low_res is None else (noised(settings.key, low_res, call), low_res.level)

        def some(x, texts, seen, guidance):
            return predict(unet, texts, x, call, seen, guidance)

        return in_chunks(some, own.rows_at_once, x, texts, seen, settings.own.guidance)

    return predictions


def predict(
    unet: UNet2DConditionModel,
    texts: Projected,
    x: jax.Array,
    call: Row,
    low_res: tuple[jax.Array, Any] | None = None,
    guidance: jax.Array | None = None,
) -> Predictions:
    """Predicts all 2 + n branches of every row in one call of the network.

    `low_res` is an upscaler's noisy low-resolution picture [rows, height, width, 3], as large as x, and its noise
    level [rows]; diffusers multiplies DeepFloyd-IF's by the solver's `input_scale`, too, which is 1 for its scheduler.

    `guidance` [rows, channels] is the embedded guidance scale of networks that take it as an input; the unconditional
    branch is then the empty text at the same input, from which edits take their directions.

    Where the network predicts the variance as well, the solver takes the prompt's, as in diffusers: guidance changes
    the estimate alone.
    """
    seen = x * call.input_scale.astype(x.dtype)
    level: tuple[Any, ...] = ()
    if low_res is not None:
        seen, level = jnp.concatenate([seen, low_res[0].astype(x.dtype)], -1), (low_res[1],)
    timestep = jnp.broadcast_to(call.timestep.astype(x.dtype), x.shape[:1])
    known = {} if guidance is None else {"guidance": guidance.reshape(len(x), -1)}
    out = unet(seen, timestep, texts, *level, **known)
    out = out.reshape(len(x), -1, *out.shape[1:])
    estimate, variance = out[..., : x.shape[-1]], out[:, 1, ..., x.shape[-1] :]
    return Predictions(estimate[:, 0], estimate[:, 1], estimate[:, 2:], variance if variance.size else None)


def in_chunks(function: Callable[..., Any], most: int | None, x: jax.Array, *trees: Any) -> Any:
    """Applies `function` in equal chunks of at most `most` rows; None means all at once.

    Args:
        function: of x [rows, ...] and of arrays whose first axis is that of the rows, or of their branches.
    """
    rows = len(x)
    if most is None or most >= rows:
        return function(x, *trees)
    parts = -(-rows // most)
    size = -(-rows // parts)
    # Copies of the last row pad the last chunk.
    index = np.minimum(np.arange(parts * size), rows - 1)

    def cut(leaf):
        leaf = leaf.reshape(rows, -1, *leaf.shape[1:])
        leaf = leaf if len(index) == rows else leaf[index]
        return leaf.reshape(parts, size * leaf.shape[1], *leaf.shape[2:])

    made = jax.lax.map(lambda part: function(*part), jax.tree.map(cut, (x, *trees)))
    return jax.tree.map(lambda leaf: leaf.reshape(parts * size, *leaf.shape[2:])[:rows], made)


def check_context(net: UNetConfig, channels: int, what: str) -> None:
    """Checks that a UNet attends to text of so many channels on every level.

    Raises:
        ValueError: it does not.
    """
    for level in range(len(net.block_out_channels)):
        if (context := net.level("cross_attention_dim", level)) != channels:
            raise ValueError(f"the UNet's cross_attention_dim {context} is not {what}; do they belong together?")


def low_res_of(call: ConditionedCall, given: Given) -> tuple[np.ndarray, LowResCondition]:
    """Returns the pictures that a call enlarges, and their conditioning.

    Raises:
        TypeError, ValueError: there is none, or a noise level is out of range.
    """
    if call.image is None:
        raise ValueError("image=None should be the low-resolution picture that this upscaler makes larger")
    noise = given.extras.low_res_noise
    levels = per_row("noise_level", call.noise_level, given)
    for level in levels:
        check_int("noise_level", level, 0, noise.most)
    level_of_row = levels.astype(np.int32)
    signal, share = noise.scheduler.shares(level_of_row)
    picture = np.stack(spread_pictures(call.image, given)).astype(given.dtype)
    return call.image, LowResCondition(picture, level_of_row, signal, share, np.full(given.rows, call.noise_anew))
