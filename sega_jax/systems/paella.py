"""Paella, version 3: a grid of tokens, ByT5's and CLIP's text, and a network that predicts logits (Rampas et al. 2022,
arXiv 2211.07292).

Guidance changes the logits [rows, height, width, labels], before the temperature divides them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.guidance import Predictions
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

_RECORD = 2**32  # bytes of recorded logits that a device is asked to hold
_CHUNK = 64  # calls that are recorded at once, and of which replayed records have a multiple


class Models(NamedTuple):
    """The networks of a checkpoint, with or without values.

    Without ByT5 words cannot be read. Without CLIP the network gets no embedding of the text, and without the prior no
    embedding of a picture for the prompt.
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
        """Builds networks without values from the contents of their config.json; networks stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        made = cls(
            built(byt5, T5EncoderModel, T5Config),
            built(clip, CLIPTextModelWithProjection, CLIPTextConfig),
            built(prior, PriorModel, PriorConfig),
            built(denoiser, Paella, PaellaConfig, attention),
            built(vqgan, VQModel, VQConfig),
        )
        net = made.denoiser.config
        pairs = [("num_labels", net.num_labels, "VQGAN's codebook_size", made.vqgan.config.codebook_size)]
        if made.byt5 is not None:
            pairs.append(("byt5_embd", net.byt5_embd, "ByT5's d_model", made.byt5.config.d_model))
        if made.clip is not None:
            pairs.append(("clip_embd", net.clip_embd, "CLIP's projection_dim", made.clip.config.projection_dim))
        if made.prior is not None:
            pairs.append(("clip_embd", net.clip_embd, "prior's clip_r", made.prior.config.clip_r))
        for name, ours, other, theirs in pairs:
            if ours != theirs:
                raise ValueError(f"Paella's {name} {ours} is not the {other} {theirs}; do the two belong together?")
        if made.prior is not None and made.clip is None:
            raise ValueError("a prior goes from CLIP's embeddings of texts, and there is no clip; leave it out, too")
        return made


class Predictor(NamedTuple):
    """What the denoiser and the solver take."""

    net: Paella
    codebook: Any  # [labels, channels], for the choice "nearest"


class PaellaStatic(NamedTuple):
    """What Paella compiles in."""

    choice: str = "sample"
    centred: bool = False


class PaellaSettings(NamedTuple):
    """Paella's arrays in `Settings.own`."""

    influence: Any  # [rows, 2], for the prompt


def table(call: PaellaCall, scheduler: None = None) -> Row:
    """Returns the table of a call's steps."""
    del scheduler
    assert isinstance(call.temperature, tuple)  # a pair once the call is checked
    renoised = int(call.steps * RENOISED) if call.renoise_steps is None else call.renoise_steps
    return renoising(call.steps, renoise_steps=renoised, temperature=call.temperature)


def static(call: PaellaCall, scheduler: None = None) -> PaellaStatic:
    """Returns what a call compiles in."""
    del scheduler
    return PaellaStatic(call.choice, call.centred)


def sizes(models: Models) -> Sizes:
    """Returns the sizes of a checkpoint's pictures. The state is a grid of tokens; its channels are the logits'."""
    net, factor = models.denoiser.config, models.vqgan.config.factor
    return Sizes(net.num_labels, factor, factor * net.factor, (factor * net.sample_size,) * 2)


def setup(call: PaellaCall, given: Given) -> Setup:
    """Checks the arguments against the checkpoint, and sets the call up.

    Raises:
        ValueError: a size, grid of tokens or influence that does not fit, or a record that no memory holds.
    """
    shape = state_shape(sizes(given.models), call.height, call.width)
    if call.record:
        _check_memory("record=True", _CHUNK * (3 + given.n + call.record_noise), shape, given)
    if call.replay is not None and call.replay.ndim == 5:  # other shapes are refused with the number of pictures
        _check_memory("replay", -(-call.replay.shape[1] // _CHUNK) * _CHUNK, shape, given)
    words = all(isinstance(text, str) for text in given.texts)
    if call.influence != (1, 1) and (given.models.prior is None or not words):
        raise ValueError(
            f"influence={call.influence} is of the tokens of a picture, which a prior makes of words; it should be (1,"
            " 1) without a prior, or where a prompt is given as states"
        )
    return Setup(
        shape=shape,
        table=table(call),
        own=PaellaSettings(np.tile(call.influence, (given.rows, 1)).astype(np.float32)),
        static=static(call),
        x=None if call.tokens is None else _grid(call.tokens, given.rows, shape),
    )


def _check_memory(what: str, grids: int, shape: tuple[int, int, int], given: Given) -> None:
    """Refuses a call that would hold more logits of so many grids a row than devices are asked to."""
    size = grids * given.rows * int(np.prod(shape)) * given.dtype.itemsize
    if size > _RECORD * given.devices:
        raise ValueError(
            f"{what} would hold {size / 2**30:,.0f} GiB of logits; take smaller pictures or a smaller network,"
            f" of {_RECORD / 2**30:.0f} GiB at most a device"
        )


def _grid(grid: np.ndarray, rows: int, shape: tuple[int, int, int]) -> np.ndarray:
    labels = shape[2]
    if grid.dtype.kind not in "iu" or grid.shape != (rows, *shape[:2]):
        raise ValueError(
            f"tokens are of {grid.dtype} {grid.shape}, expected integers {(rows, *shape[:2])} (pictures, height, width)"
        )
    if grid.min() < 0 or grid.max() >= labels:
        raise ValueError(f"tokens are from {grid.min()} to {grid.max()}, expected from 0 to {labels - 1}")
    return grid.astype(np.int32)


def initial(
    settings: Settings, x: Any, scale: Any, clean: Any, signal: Any, *, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Returns the first grid of tokens, given or drawn."""
    del scale, clean, signal, dtype
    if x is not None:
        return x
    return jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, INITIAL), shape[:2], 0, shape[2], jnp.int32))(
        settings.key
    )


def denoiser(
    predictor: Predictor, text: paella_text.PaellaText, settings: Settings, own: PaellaStatic, x: jax.Array
) -> Callable[[jax.Array, Row], Predictions]:
    """Returns (x, call) -> logits of all branches. The network projects the text once, for all calls."""
    net, branches = predictor.net, text.mask.shape[1]
    texts = net.project(condition(net, text, settings.own.influence))

    def predictions(x, call):
        return predict(net, texts, x, call, branches=branches, centred=own.centred)

    return predictions


def solver(predictor: Predictor | None, settings: Settings, own: PaellaStatic) -> Solver:
    """Returns the solver of these choices; without networks, one whose `init` alone is used."""
    del settings
    if predictor is None:
        return lasting(renoise(choice="argmax"))
    return lasting(renoise(choice=own.choice, codebook=predictor.codebook[...]))


def draw(predictor: Predictor, settings: Settings, x: jax.Array) -> Callable:
    """Returns the function that draws the chances of a call."""
    dtype = at_least_float32(predictor.net.byt5_mapper.kernel[...].dtype)

    def noise(call, shape):
        return chances(settings.key, call.call, shape[1:], dtype)

    return noise


def chances(key: jax.Array, call: jax.Array, shape: tuple[int, ...], dtype: Any) -> Chances:
    """Draws the chances of a call with typed keys [rows], for logits of this shape in every row."""
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, call)))(key)
    gumbel = jax.vmap(lambda k: jax.random.gumbel(k, shape, dtype))(keys[:, 0])
    return Chances(gumbel, jax.vmap(lambda k: jax.random.uniform(k, shape[:-1], dtype))(keys[:, 1]))


def condition(net: Paella, text: paella_text.PaellaText, influence: Any) -> Condition:
    """Returns the condition of all branches, those of a row side by side; the prompt alone has a picture and an
    influence of its own."""
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
    """Predicts the logits of all 2 + n branches of every row in one call of the network.

    `centred` subtracts the mean over the labels at each position. The tokens that are drawn do not depend on it, but
    the magnitudes that semantic guidance compares do.
    """
    level = jnp.broadcast_to(call.timestep.astype(jnp.float32), (len(x) * branches,))
    logits = net(jnp.repeat(x, branches, 0), level, texts)
    if centred:
        # In half precision the difference would be rounded, and other tokens drawn.
        logits = logits.astype(at_least_float32(logits.dtype))
        logits = logits - logits.mean(-1, keepdims=True)
    logits = logits.reshape(len(x), branches, *logits.shape[1:])
    return Predictions(logits[:, 0], logits[:, 1], logits[:, 2:])


def decode(vqgan: VQModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decodes tokens [rows, height, width] to float32 pictures [rows, height, width, 3] in [0, 1], and tells whether
    each row is finite, bool [rows]."""
    image = jax.lax.map(lambda one: vqgan.decode_indices(one[None])[0], tokens)
    image = image.astype(at_least_float32(image.dtype))
    return jnp.clip(image, 0, 1), jnp.isfinite(image).all((1, 2, 3)) & (tokens >= 0).all((1, 2))


def lasting(solver: Solver) -> Solver:
    """Marks rows whose logits are not finite by tokens -1 from then on, since tokens would not show it."""

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
