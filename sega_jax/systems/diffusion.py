"""Call setup and `Sampler` functions shared by all families with continuous states and a UNet.

The states are latents or pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.checks import check_int
from sega_jax.method.guidance import Predictions
from sega_jax.method.naming import assignment, name_of
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

_CALL_BLOCK = 64  # per-call noise from the user is padded to a multiple of this number of calls


class DiffusionSettings(NamedTuple):
    """The arrays that families with continuous states keep in `Settings.own`."""

    eta: Any  # [rows]
    low_res: LowResCondition | None = None  # the conditioning on low-resolution pictures, for upscalers
    guidance: Any = None  # [rows, channels], the embedded guidance scale for networks that take it as an input
    # [rows, 6], for SDXL: original height and width, top and left edges of the crop, target height and width
    size_conditioning: Any = None


class DiffusionStatic(NamedTuple):
    """The compile-time options that families with continuous states keep in `Static.own`."""

    solver: str = "ddim"
    rows_at_once: int | None = None  # the number of rows that each device predicts at once; None means all


def table(call: DiffusionCall, scheduler: Scheduler) -> Row:
    """Returns the schedule's table for a call."""
    return scheduler.table(call.steps)


def table_from_picture(call: StartingCall, scheduler: Scheduler) -> Row:
    """Returns the schedule's table for a call.

    If the call starts from a picture, the table begins later in the schedule.
    """
    if call.image is None:
        return scheduler.table(call.steps)
    return scheduler.table(call.steps, STRENGTH if call.strength is None else call.strength)


def static(call: DiffusionCall, scheduler: Scheduler) -> DiffusionStatic:
    """Returns the compile-time options for a call."""
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
    """Checks that a call's arguments fit the checkpoint, and sets up the call.

    Args:
        table: The schedule's table.
        image: Pictures to start from or to enlarge, [pictures, height, width, 3]: one for all rows, or one for each
            prompt or picture in the batch. They determine the result's size.
        low_res: The conditioning on pictures to enlarge; None if sampling starts from the pictures.
        image_noise: The call's argument `image_noise`.
        size_conditioning: A function from (height, width) in pixels to an array [rows, 6], for SDXL.
        vae: The autoencoder, for families whose pictures can be decoded in tiles.
        tiled: The call's argument `tiled`.

    Raises:
        TypeError, ValueError: An argument does not fit the checkpoint.
    """
    shape = shape_from(sizes, call.height, call.width, None if image is None else image.shape[1:3])
    _check_variance(given, shape)
    check(call, given.scheduler, given.warn)
    rows = given.rows
    guidance_rescale = per_row("guidance_rescale", call.guidance_rescale, given)
    if low_res is not None:
        low_res = low_res._replace(z=_low_res_noise(image_noise, low_res, (len(table.call), rows, *shape), given.dtype))
    eta = per_row("eta", defaults(given.scheduler)["eta"] if call.eta is None else call.eta, given)
    own = DiffusionSettings(
        eta,
        low_res,
        _guidance_input(call, given, guidance_rescale),
        None if size_conditioning is None else size_conditioning((sizes.factor * shape[0], sizes.factor * shape[1])),
    )
    picture = picture_noise = None
    if image is not None and low_res is None:
        picture = np.stack(spread_pictures(image, given)).astype(given.dtype)
        picture_noise = _noise("image_noise", image_noise, (rows, *shape), given.dtype)
    options = static(call, given.scheduler)
    if options.rows_at_once is None and given.platform == "cpu":
        # On CPUs, larger batches take more time per row.
        options = options._replace(rows_at_once=1)
    tile = tile_side(vae, tiled)
    return Setup(
        shape=shape,
        table=table,
        own=own,
        static=options,
        x=_noise("latents", call.latents, (rows, *shape), given.dtype),
        picture=picture,
        picture_noise=picture_noise,
        draws=draws_noise(eta, given.scheduler, table),
        guidance_scale=None if own.guidance is None else np.ones(rows),
        guidance_rescale=guidance_rescale if guidance_rescale.any() else None,
        decode={} if tile is None else {"tile": tile},
    )


def _guidance_input(call: DiffusionCall, given: Given, guidance_rescale: np.ndarray) -> np.ndarray | None:
    """Returns the embedded guidance scales [rows, channels], or None if the network is not guidance-distilled.

    Raises:
        ValueError: The scale is below 1, or the call has another argument for classifier-free guidance, which would
            have no effect. In the latter case, only a warning is emitted if `strict` is false.
    """
    channels = given.models.unet.config.time_cond_proj_dim
    if not channels:
        return None
    scale = per_row("guidance_scale", call.guidance_scale, given)
    distilled = f"this network was distilled from classifier-free guidance, so its input is {name_of('guidance_scale')}"
    if scale.min() < 1:
        raise ValueError(f"{assignment('guidance_scale', float(scale.min()))} is too low: {distilled}; give at least 1")
    negative = call.negative_prompt
    words = negative if isinstance(negative, list | tuple) else [negative]
    for name, is_given in (
        ("negative_prompt", not all(text is None or (isinstance(text, str) and not text) for text in words)),
        ("guidance_rescale", guidance_rescale.any()),
    ):
        if is_given and call.strict:
            raise ValueError(f"{name_of(name)} does not change the pictures: {distilled}; leave it out")
        if is_given:
            given.warn(f"{name_of(name)} does not change the pictures: {distilled}")
    return guidance_embedding(scale.astype(given.dtype), channels)


def per_row(name: str, value: Any, given: Given) -> np.ndarray:
    """Converts one number for all rows, or a list with one number per prompt or picture, to an array [rows]."""
    if isinstance(value, list):
        return np.asarray(given.spread(name, value))
    return np.full(given.rows, value)


def spread_pictures(image: np.ndarray, given: Given) -> list[np.ndarray]:
    """Returns one input picture per row; `image` has one for all rows, or one for each prompt or row."""
    return list(image) * given.rows if len(image) == 1 else given.spread("image", list(image))


def check(call: DiffusionCall, scheduler: Scheduler, warn: Callable[[str], None]) -> None:
    """Checks the arguments that depend on the scheduler.

    Raises:
        ValueError: The solver does not use `eta`. If `strict` is false, only a warning is emitted.
    """
    if np.any(call.eta) and scheduler.eta is None:
        message = f"{assignment('eta', call.eta)} applies to DDIM and TCD only, not to {scheduler.name}"
        if call.strict:
            raise ValueError(f"{message}; leave it out")
        warn(f"{message}; it is ignored")


def defaults(scheduler: Scheduler) -> dict[str, float]:
    """Returns the scheduler's defaults, {argument: default}, for arguments that are None in the call."""
    return {"eta": scheduler.eta or 0.0}


def _check_variance(given: Given, shape: tuple[int, int, int]) -> None:
    predicts_variance = given.models.unet.config.out_channels > shape[2]
    if given.scheduler.options.get("variance_type") == "learned_range" and not predicts_variance:
        raise ValueError(
            f"{given.scheduler.name}: variance_type='learned_range' needs a network that predicts the variance, but"
            " this network does not; give variance_type='fixed_small'"
        )


def draws_noise(eta: np.ndarray, scheduler: Scheduler, table: Row) -> bool:
    """Returns whether the solver adds noise at any model call, given `eta` [rows]."""
    if scheduler.eta is None:
        return bool(np.any(table.solver.noise))
    return bool(np.any(eta) and np.any(table.solver.sigma))


def _noise(name: str, noise: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """Checks noise from the user and returns it in the loop's dtype. Without noise, returns None.

    Raises:
        ValueError: The noise has the wrong shape, or an entry is out of range.
    """
    if noise is None:
        return None
    if noise.shape != shape:
        calls, verb = "calls, " if len(shape) == 5 else "", "have" if name.endswith("s") else "has"
        channels_first = (*shape[:-3], shape[-1], *shape[-3:-1])
        hint = f"; move the channels of {name} to the last axis" if noise.shape == channels_first else ""
        raise ValueError(
            f"{name} {verb} shape {noise.shape}, expected {shape} ({calls}pictures, height, width, channels){hint}"
        )
    return cast(name, noise, dtype)


def _low_res_noise(
    noise: np.ndarray | None, low_res: LowResCondition, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray | None:
    """Returns the user's noise for low-resolution pictures, as an array [rows, 1 or calls, height, width, 3].

    Args:
        shape: (calls, rows, height, width, channels) of the state.
    """
    fresh, shape = low_res.fresh.all(), (*shape[:-1], low_res.picture.shape[-1])
    noise = _noise("image_noise", noise, shape if fresh else shape[1:], dtype)
    if noise is None:
        return None
    if not fresh:
        return noise[:, None]
    # The array is padded with zeros that no call reads, so that different numbers of calls share a compiled program.
    return np.pad(np.swapaxes(noise, 0, 1), ((0, 0), (0, -len(noise) % _CALL_BLOCK), *[(0, 0)] * 3))


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Converts an array to the loop's dtype. Calls whose arrays have different dtypes can then share a program.

    Raises:
        ValueError: An entry is outside the dtype's range.
    """
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not is_finite(array):
        raise ValueError(f"{name} has entries outside the range of {dtype}")
    return array


def initial(
    settings: Settings, x: Any, scale: Any, clean: Any, signal: Any, *, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Returns the initial state: x * scale + clean * signal, where `clean` may be None.

    If x is None, it is drawn from the standard normal distribution.
    """
    if x is None:
        x = normal(settings.key, INITIAL, shape, dtype)
    x = jnp.asarray(x, dtype) * jnp.asarray(scale).astype(dtype)
    if clean is not None:
        x += jnp.asarray(clean, dtype) * jnp.asarray(signal).astype(dtype)
    return x


def solver(networks: Any, settings: Settings, own: DiffusionStatic) -> Solver:
    """Returns the solver."""
    del networks
    return SOLVERS[own.solver](settings.own.eta)


def draw(networks: Any, settings: Settings, x: jax.Array) -> Callable:
    """Returns a function (call, shape) -> the standard normal noise for a call."""
    del networks

    def noise(call, shape):
        return normal(settings.key, call.call, shape[1:], x.dtype)

    return noise


def denoiser(
    unet: UNet2DConditionModel, context: Any, settings: Settings, own: DiffusionStatic, x: jax.Array
) -> Callable[[jax.Array, Any], Predictions]:
    """Returns a function (x, call) -> the predictions of all branches.

    The UNet projects the context once for all calls.

    Args:
        context: The UNet's text conditioning: arrays [rows, branches, ...].
    """
    texts = unet.project(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), context))
    low_res = settings.own.low_res
    if low_res is not None:
        picture = resized(jnp.asarray(low_res.picture, x.dtype), x.shape[1:3])
        low_res = low_res._replace(picture=picture)

    def predictions(x, call):
        condition = None if low_res is None else (noised(settings.key, low_res, call), low_res.level)

        def predict_chunk(x, texts, condition, guidance):
            return predict(unet, texts, x, call, condition, guidance)

        return in_chunks(predict_chunk, own.rows_at_once, x, texts, condition, settings.own.guidance)

    return predictions


def predict(
    unet: UNet2DConditionModel,
    texts: Projected,
    x: jax.Array,
    call: Row,
    low_res: tuple[jax.Array, Any] | None = None,
    guidance: jax.Array | None = None,
) -> Predictions:
    """Predicts all 2 + n branches of every row in one evaluation of the network.

    If the network also predicts variances, the solver uses the variance of the prompt branch, as in diffusers. Guidance
    does not change the variance.

    Args:
        low_res: For upscalers, a pair: the noisy low-resolution pictures [rows, height, width, 3], with the same height
            and width as x, and their noise levels [rows]. Only x is multiplied by the solver's `input_scale`. diffusers
            also multiplies DeepFloyd-IF's pictures by this factor, but DeepFloyd-IF's scheduler always sets it to 1.
        guidance: The embedded guidance scales [rows, channels], for networks that take them as an input. The
            unconditional branch then uses the empty text at the same scale, and edit directions are relative to its
            prediction.
    """
    inputs = x * call.input_scale.astype(x.dtype)
    level: tuple[Any, ...] = ()
    if low_res is not None:
        inputs, level = jnp.concatenate([inputs, low_res[0].astype(x.dtype)], -1), (low_res[1],)
    timestep = jnp.broadcast_to(call.timestep.astype(x.dtype), x.shape[:1])
    scale_input = {} if guidance is None else {"guidance": guidance.reshape(len(x), -1)}
    out = unet(inputs, timestep, texts, *level, **scale_input)
    out = out.reshape(len(x), -1, *out.shape[1:])
    estimate, variance = out[..., : x.shape[-1]], out[:, 1, ..., x.shape[-1] :]
    return Predictions(estimate[:, 0], estimate[:, 1], estimate[:, 2:], variance if variance.size else None)


def in_chunks(function: Callable[..., Any], limit: int | None, x: jax.Array, *trees: Any) -> Any:
    """Applies `function` to equal chunks of at most `limit` rows. A limit of None means all rows at once.

    Args:
        function: A function of x [rows, ...] and pytrees of arrays. The first axis of these arrays runs over the
            rows, or over the branches of all rows.
    """
    rows = len(x)
    if limit is None or limit >= rows:
        return function(x, *trees)
    parts = -(-rows // limit)
    size = -(-rows // parts)
    # The last chunk is padded with copies of the last row.
    index = np.minimum(np.arange(parts * size), rows - 1)

    def cut(leaf):
        leaf = leaf.reshape(rows, -1, *leaf.shape[1:])
        leaf = leaf if len(index) == rows else leaf[index]
        return leaf.reshape(parts, size * leaf.shape[1], *leaf.shape[2:])

    results = jax.lax.map(lambda part: function(*part), jax.tree.map(cut, (x, *trees)))
    return jax.tree.map(lambda leaf: leaf.reshape(parts * size, *leaf.shape[2:])[:rows], results)


def check_context(net: UNetConfig, channels: int, source: str) -> None:
    """Checks that every level of a UNet attends to text with the given number of channels.

    Args:
        source: The source of the number of channels, named in the error message.

    Raises:
        ValueError: A level has a different `cross_attention_dim`.
    """
    for level in range(len(net.block_out_channels)):
        if (context := net.level("cross_attention_dim", level)) != channels:
            raise ValueError(f"the UNet's cross_attention_dim {context} is not {source}; take both from one checkpoint")


def low_res_of(call: ConditionedCall, given: Given) -> tuple[np.ndarray, LowResCondition]:
    """Returns the pictures that a call enlarges, and the conditioning made from them.

    Raises:
        TypeError, ValueError: No picture is given, or a noise level is out of range.
    """
    if call.image is None:
        raise ValueError(f"this checkpoint enlarges a picture; give the low-resolution picture as {name_of('image')}")
    noise = given.extras.low_res_noise
    levels = per_row("noise_level", call.noise_level, given)
    for level in levels:
        check_int("noise_level", level, 0, noise.max_level)
    level_of_row = levels.astype(np.int32)
    signal, share = noise.scheduler.shares(level_of_row)
    picture = np.stack(spread_pictures(call.image, given)).astype(given.dtype)
    return call.image, LowResCondition(picture, level_of_row, signal, share, np.full(given.rows, call.noise_anew))
