"""Paella, version 3: a network that predicts the logits of a grid of tokens, with ByT5 and CLIP as text encoders.

Source: Rampas et al. 2022, arXiv 2211.07292. Guidance is applied to the logits [rows, height, width, labels] before
they are divided by the temperature.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.guidance import Predictions
from sega_jax.method.naming import assignment
from sega_jax.method.numerics import at_least_float32
from sega_jax.method.schedules import Row
from sega_jax.method.schedules.tokens import renoising
from sega_jax.method.solvers import Chances, Solver, renoise
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.config import built
from sega_jax.nn.paella import Condition, Paella, PaellaConfig, Projected
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.systems import clip_text, paella_text
from sega_jax.systems.base import (
    Checkpoint,
    Given,
    Network,
    Sampler,
    Saved,
    Settings,
    Setup,
    Sizes,
    System,
    has_class,
)
from sega_jax.systems.paella_call import RENOISED, PaellaCall
from sega_jax.systems.programs import INITIAL
from sega_jax.systems.sizes import state_shape

_MAX_LOGITS = 2**32  # the maximum size of recorded or replayed logits per device, in bytes
_CHUNK = 64  # the number of calls recorded at once; replayed records are padded to a multiple of this number


class Models(NamedTuple):
    """The networks of a checkpoint.

    Without ByT5, strings cannot be encoded. Without CLIP, the denoiser gets no CLIP text embedding. Without the prior,
    the denoiser gets no picture embedding for the prompt.
    """

    byt5: T5EncoderModel | None
    clip: CLIPTextModelWithProjection | None
    prior: PriorModel | None
    denoiser: Paella
    vqgan: VQModel

    @classmethod
    def build(
        cls,
        byt5: Mapping[str, Any] | T5EncoderModel | None,
        clip: Mapping[str, Any] | CLIPTextModelWithProjection | None,
        prior: Mapping[str, Any] | PriorModel | None,
        denoiser: Mapping[str, Any] | Paella,
        vqgan: Mapping[str, Any] | VQModel,
        attention: str = "xla",
    ) -> "Models":
        """Builds networks from their configs, with shapes instead of parameters; existing networks are kept.

        Raises:
            ValueError: A config is not supported, or the networks do not fit together.
        """
        models = cls(
            built(byt5, T5EncoderModel, T5Config),
            built(clip, CLIPTextModelWithProjection, CLIPTextConfig),
            built(prior, PriorModel, PriorConfig),
            built(denoiser, Paella, PaellaConfig, attention),
            built(vqgan, VQModel, VQConfig),
        )
        net = models.denoiser.config
        pairs = [("num_labels", net.num_labels, "VQGAN's codebook_size", models.vqgan.config.codebook_size)]
        if models.byt5 is not None:
            pairs.append(("byt5_embd", net.byt5_embd, "ByT5's d_model", models.byt5.config.d_model))
        if models.clip is not None:
            pairs.append(("clip_embd", net.clip_embd, "CLIP's projection_dim", models.clip.config.projection_dim))
        if models.prior is not None:
            pairs.append(("clip_embd", net.clip_embd, "prior's clip_r", models.prior.config.clip_r))
        for name, size, other, expected in pairs:
            if size != expected:
                raise ValueError(f"Paella's {name} {size} is not the {other} {expected}; take both from one checkpoint")
        if models.prior is not None and models.clip is None:
            raise ValueError("the prior needs CLIP's text embeddings, but clip is missing; leave out the prior, too")
        return models


class Predictor(NamedTuple):
    """The parts of the models that sampling needs: the denoising network, and the solver's codebook."""

    net: Paella
    codebook: Any  # [labels, channels], for choice="nearest"


class PaellaStatic(NamedTuple):
    """The compile-time options that Paella keeps in `Static.own`."""

    choice: str = "sample"
    centred: bool = False


class PaellaSettings(NamedTuple):
    """The arrays that Paella keeps in `Settings.own`."""

    influence: Any  # [rows, 2], applied only to the prompt's branch


def table(call: PaellaCall, scheduler: None = None) -> Row:
    """Returns the schedule's table for a call."""
    del scheduler
    assert isinstance(call.temperature, tuple)  # `Call` has already converted a single number to a pair
    renoise_steps = int(call.steps * RENOISED) if call.renoise_steps is None else call.renoise_steps
    return renoising(call.steps, renoise_steps=renoise_steps, temperature=call.temperature)


def static(call: PaellaCall, scheduler: None = None) -> PaellaStatic:
    """Returns the compile-time options for a call."""
    del scheduler
    return PaellaStatic(call.choice, call.centred)


def sizes(models: Models) -> Sizes:
    """Returns the picture sizes that a checkpoint supports.

    The state is a grid of tokens; `channels` is the number of labels.
    """
    net, factor = models.denoiser.config, models.vqgan.config.factor
    return Sizes(net.num_labels, factor, factor * net.factor, (factor * net.sample_size,) * 2)


def setup(call: PaellaCall, given: Given) -> Setup:
    """Checks that a call's arguments fit the checkpoint, and sets up the call.

    Raises:
        ValueError: A size, token grid or influence does not fit the checkpoint, or a record is too large.
    """
    shape = state_shape(sizes(given.models), call.height, call.width)
    if call.record:
        _check_memory("record=True", _CHUNK * (3 + given.n + call.record_noise), shape, given)
    if call.replay is not None and call.replay.ndim == 5:  # other shapes are rejected when the batch is built
        _check_memory("replay", -(-call.replay.shape[1] // _CHUNK) * _CHUNK, shape, given)
    words = all(isinstance(text, str) for text in given.texts)
    if call.influence != (1, 1) and (given.models.prior is None or not words):
        raise ValueError(
            f"{assignment('influence', call.influence)} needs the picture embedding that a prior draws for a prompt in"
            " words; give (1, 1) if the checkpoint has no prior or a prompt is text conditioning"
        )
    return Setup(
        shape=shape,
        table=table(call),
        own=PaellaSettings(np.tile(call.influence, (given.rows, 1)).astype(np.float32)),
        static=static(call),
        x=None if call.tokens is None else _grid(call.tokens, given.rows, shape),
    )


def _check_memory(what: str, grids: int, shape: tuple[int, int, int], given: Given) -> None:
    """Raises a ValueError if the given number of logit grids per row needs more memory than is allowed per device.

    Args:
        what: The argument that needs the logits, named in the error message.
    """
    size = grids * given.rows * int(np.prod(shape)) * given.dtype.itemsize
    if size > _MAX_LOGITS * given.devices:
        raise ValueError(
            f"{what} would hold {size / 2**30:,.0f} GiB of logits, but the limit is"
            f" {_MAX_LOGITS / 2**30:.0f} GiB per device; generate fewer or smaller pictures at once"
        )


def _grid(grid: np.ndarray, rows: int, shape: tuple[int, int, int]) -> np.ndarray:
    labels = shape[2]
    if grid.dtype.kind not in "iu" or grid.shape != (rows, *shape[:2]):
        raise ValueError(
            f"tokens have dtype {grid.dtype} and shape {grid.shape}, expected integers of shape {(rows, *shape[:2])}"
            " (pictures, height, width)"
        )
    if grid.min() < 0 or grid.max() >= labels:
        raise ValueError(f"tokens range from {grid.min()} to {grid.max()}, expected 0 to {labels - 1}")
    return grid.astype(np.int32)


def initial(
    settings: Settings, x: Any, scale: Any, clean: Any, signal: Any, *, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Returns the initial grid of tokens: x, or uniformly drawn tokens if x is None."""
    del scale, clean, signal, dtype
    if x is not None:
        return x
    return jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, INITIAL), shape[:2], 0, shape[2], jnp.int32))(
        settings.key
    )


def denoiser(
    predictor: Predictor, text: paella_text.PaellaText, settings: Settings, own: PaellaStatic, x: jax.Array
) -> Callable[[jax.Array, Row], Predictions]:
    """Returns a function (x, call) -> the logits of all branches. The network projects the text once for all calls."""
    net, branches = predictor.net, text.mask.shape[1]
    texts = net.project(condition(net, text, settings.own.influence))

    def predictions(x, call):
        return predict(net, texts, x, call, branches=branches, centred=own.centred)

    return predictions


def solver(predictor: Predictor | None, settings: Settings, own: PaellaStatic) -> Solver:
    """Returns the solver. Without a predictor, only the solver's `init` may be used."""
    del settings
    if predictor is None:
        return mark_broken_rows(renoise(choice="argmax"))
    return mark_broken_rows(renoise(choice=own.choice, codebook=predictor.codebook[...]))


def draw(predictor: Predictor, settings: Settings, x: jax.Array) -> Callable:
    """Returns a function (call, shape) -> the random numbers for a call."""
    dtype = at_least_float32(predictor.net.byt5_mapper.kernel[...].dtype)

    def noise(call, shape):
        return chances(settings.key, call.call, shape[1:], dtype)

    return noise


def chances(key: jax.Array, call: jax.Array, shape: tuple[int, ...], dtype: Any) -> Chances:
    """Draws the random numbers for a call from typed keys [rows]; `shape` is the shape of each row's logits."""
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, call)))(key)
    gumbel = jax.vmap(lambda k: jax.random.gumbel(k, shape, dtype))(keys[:, 0])
    return Chances(gumbel, jax.vmap(lambda k: jax.random.uniform(k, shape[:-1], dtype))(keys[:, 1]))


def condition(net: Paella, text: paella_text.PaellaText, influence: Any) -> Condition:
    """Returns the network's conditioning for all branches, [rows * branches, ...]; the branches of a row are adjacent.

    The picture embedding and the call's influence apply only to the prompt's branch.
    """
    rows, branches = text.mask.shape[:2]
    prompt = (jnp.arange(branches) == 1)[None]

    def flat(array):
        return None if array is None else array.reshape(rows * branches, *array.shape[2:])

    spread = jnp.broadcast_to(jnp.asarray(influence)[:, None], (rows, branches, 2))
    factors = flat(jnp.where(prompt[..., None], spread, 1))
    return net.condition(
        flat(text.byt5),
        flat(text.clip),
        flat(text.image),
        mask=flat(text.mask),
        has_clip=flat(text.has_clip),
        has_image=flat(text.has_clip & prompt),
        influence=(factors[:, :1], factors[:, 1:]),
    )


def predict(
    net: Paella, texts: Sequence[Projected], x: jax.Array, call: Row, *, branches: int, centred: bool
) -> Predictions:
    """Predicts the logits of all 2 + n branches of every row in one evaluation of the network.

    Args:
        centred: Whether to subtract the mean over the labels at each position. This does not change the tokens that are
            drawn, but it changes the magnitudes that semantic guidance compares with its threshold.
    """
    level = jnp.broadcast_to(call.timestep.astype(jnp.float32), (len(x) * branches,))
    logits = net(jnp.repeat(x, branches, 0), level, texts)
    if centred:
        # In half precision, rounding the difference would change the drawn tokens.
        logits = logits.astype(at_least_float32(logits.dtype))
        logits = logits - logits.mean(-1, keepdims=True)
    logits = logits.reshape(len(x), branches, *logits.shape[1:])
    return Predictions(logits[:, 0], logits[:, 1], logits[:, 2:])


def decode(vqgan: VQModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decodes tokens [rows, height, width] to pictures with values in [0, 1].

    Returns:
        Pictures [rows, height, width, 3] in float32 or wider, and bool [rows]: whether each row is finite.
    """
    image = jax.lax.map(lambda one: vqgan.decode_indices(one[None])[0], tokens)
    image = image.astype(at_least_float32(image.dtype))
    return jnp.clip(image, 0, 1), jnp.isfinite(image).all((1, 2, 3)) & (tokens >= 0).all((1, 2))


def mark_broken_rows(solver: Solver) -> Solver:
    """Returns a solver that sets a row's tokens to -1 once its logits are not finite, since integers cannot be NaN."""

    def update(x, state, estimate, aux, call, draw):
        after, state = solver.update(x, state, estimate, aux, call, draw)
        broken = ~jnp.isfinite(estimate).all((1, 2, 3)) | (x < 0).any((1, 2))
        return jnp.where(broken[:, None, None], -1, after), state

    return Solver(solver.init, update)


SYSTEM = System(
    name="paella",
    title="Paella",
    checkpoint=Checkpoint(
        recognise=lambda index: has_class(index, "PaellaPipeline"),
        models=Models,
        networks={
            "byt5": Network(T5EncoderModel, T5Config, "model", optional=True, options=T5Config.fixed),
            "clip": Network(
                CLIPTextModelWithProjection, CLIPTextConfig, "model", optional=True, options=clip_text.options
            ),
            "prior": Network(PriorModel, PriorConfig, optional=True, library="sega_jax"),
            "denoiser": Network(Paella, PaellaConfig, library="sega_jax"),
            "vqgan": Network(VQModel, VQConfig, library="sega_jax"),
        },
        build=Models.build,
        tokenizer=paella_text.tokenizer,
        scheduler=None,
        schedulers=(),
        saved=Saved("PaellaPipeline", tokenizers=lambda tokenizers: {"tokenizer": (tokenizers or (None, None))[1]}),
    ),
    text=paella_text.READER,
    sampler=Sampler(
        sizes=sizes,
        networks=lambda models: Predictor(models.denoiser, models.vqgan.vquantizer.codebook.embedding),
        table=table,
        static=static,
        setup=setup,
        initial=initial,
        denoiser=denoiser,
        solver=solver,
        draw=draw,
        decoder=lambda models: models.vqgan,
        decode=decode,
    ),
    call=PaellaCall,
)
