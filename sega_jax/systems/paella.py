"""Paella, version 3: a grid of tokens, ByT5's and CLIP's text, and a network that predicts logits (Rampas et al.
2022, arXiv 2211.07292).

Pure functions of one device's share of the rows, each compiled once: `encode` and `embed` take tokens of words to
text, `imagine` adds the prior's picture to it, `start` keys to a grid, `advance` a carry through a chunk of the
schedule, `decode` a grid to pictures.

Axes: rows of the batch, branches (2 + n: unconditional, prompt, concepts), tokens, channels; of logits rows, height,
width, labels. What guidance guides are the logits, before the temperature.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.method.guidance import Edits, Predictions
from sega_jax.method.numerics import at_least_float32
from sega_jax.method.sample import Carry, sample
from sega_jax.method.schedules import Row
from sega_jax.method.solvers import Chances, Solver, renoise
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.config import built
from sega_jax.nn.paella import Condition, Paella, PaellaConfig, Projected
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.systems import paella_prior as priors
from sega_jax.systems.base import INITIAL, Record, Sizes, Usual, complete, guiding, recorder
from sega_jax.systems.deepfloyd import encode as encode

# Of the published inference scripts: after how many of 32 steps no token is noised any more, and the temperatures.
RENOISED, TEMPERATURE = 26 / 32, (1.2, 0.2)
_PICTURE = INITIAL - 2


class Models(NamedTuple):
    """The networks of a checkpoint, without values or filled.

    Without ByT5 words cannot be read; without CLIP no branch is told its embedding of the text, and without the prior
    the prompt's is not told one of a picture.
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
        """Networks without values from the config.json; networks that are built stay as they are.

        `attention` is the implementation in the denoiser, "xla", "cudnn" (for GPUs in half precision) or "pallas" (for
        TPUs).

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        kinds = {
            "byt5": (T5EncoderModel, T5Config),
            "clip": (CLIPTextModelWithProjection, CLIPTextConfig),
            "prior": (PriorModel, PriorConfig),
            "denoiser": (partial(Paella, attention=attention), PaellaConfig),
            "vqgan": (VQModel, VQConfig),
        }
        given = dict(zip(cls._fields, (byt5, clip, prior, denoiser, vqgan), strict=True))
        made = cls(**{part: built(value, *kinds[part]) for part, value in given.items()})
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

    @property
    def predictor(self) -> "Predictor":
        """What `advance` takes."""
        return Predictor(self.denoiser, self.vqgan.vquantizer.codebook.embedding)

    @property
    def decoder(self) -> VQModel:
        """What `decode` takes."""
        return self.vqgan

    @property
    def sizes(self) -> Sizes:
        """The state is a grid of tokens; its channels are those of the logits."""
        net, factor = self.denoiser.config, self.vqgan.config.factor
        return Sizes(net.num_labels, factor, factor * net.factor, (factor * net.sample_size,) * 2)

    @property
    def usual(self) -> Usual:
        """Those of the published inference scripts."""
        return Usual(32, 8.0)


class Predictor(NamedTuple):
    net: Paella
    codebook: Any  # [labels, channels], for the choice "nearest"


class Method(NamedTuple):
    """What is compiled in; everything else is a number that a program takes."""

    choice: str = "sample"
    semantics: str = "diffusers"
    support: str = "channel"
    centred: bool = False
    record: bool = False


class Settings(NamedTuple):
    """The numbers of every row."""

    key: jax.Array  # typed keys [rows]
    guidance_scale: Any  # [rows]
    influence: Any  # [rows, 2], of `sega_jax.nn.paella.Paella.condition`, for the prompt
    edits: Edits | None  # [rows, n] each; None for no concepts at all


class Text(NamedTuple):
    """What the branches of every row are told. Lengths are padded: what is masked is as if it were not there."""

    byt5: Any  # [rows, branches, bytes, channels]
    mask: Any  # bool [rows, branches, bytes], False for padding
    clip: Any  # [rows, branches, channels]; None where no branch has any
    has_clip: Any  # bool [rows, branches]
    image: Any = None  # [rows, channels], of the prompt's branch where that has CLIP's embedding; or None


def embed(clip: CLIPTextModelWithProjection, ids: jax.Array) -> jax.Array:
    """int32 ids [texts, tokens] -> embeddings [texts, channels]."""
    return clip(ids)


def imagine(prior: PriorModel, text: Text, key: jax.Array) -> Text:
    """The text with an embedding of a picture that fits the prompt, drawn from the key of each row."""
    keys = jax.vmap(lambda k: jax.random.fold_in(k, _PICTURE))(key)
    noise = priors.noise(keys, text.clip.shape[-1])
    return text._replace(image=priors.imagine(prior, text.clip[:, 1], noise))


def start(settings: Settings, tokens: Any, scale: Any, *, shape: tuple[int, ...], method: Method, dtype: Any) -> Carry:
    """The carry before the first call, from tokens, given int32 [rows, height, width], or of each row's key.

    Args:
        scale: of noise, which tokens have none of.
        shape: (height, width, labels) of the logits.
    """
    del scale
    if tokens is None:
        tokens = jax.vmap(
            lambda k: jax.random.randint(jax.random.fold_in(k, INITIAL), shape[:2], 0, shape[2], jnp.int32)
        )(settings.key)
    n = 0 if settings.edits is None else settings.edits.scale.shape[1]
    logits = jax.ShapeDtypeStruct((len(tokens), *shape), dtype)
    preds = Predictions(logits, logits, jax.ShapeDtypeStruct((len(tokens), n, *shape), dtype))
    return Carry(tokens, guiding(settings, method).init(preds), renoise(choice="argmax").init(tokens))


def advance(
    predictor: Predictor,
    text: Text,
    carry: Carry,
    table: Row,
    settings: Settings,
    *,
    method: Method,
    concepts: int | None = None,
) -> tuple[Carry, Record | None]:
    """Takes the rows through a chunk of the schedule; the text's keys and values are computed once for all its calls.

    Args:
        carry: of `start`, or of the chunk before.
        table: rows of `sega_jax.method.schedules.tokens.renoising`, some of which may be filling.
        concepts: how many are predicted, as of `sega_jax.systems.base.advance`.

    Returns:
        The carry, and with `method.record` the record of the chunk's calls.
    """
    net = predictor.net
    branches = text.mask.shape[1] if concepts is None else 2 + concepts
    few = jax.tree.map(lambda array: array[:, :branches], text._replace(image=None))._replace(image=text.image)
    texts = net.project(condition(net, few, settings.influence))

    def denoise(x, row):
        return complete(predict(net, texts, x, row, branches=branches, centred=method.centred), settings)

    solver = _lasting(renoise(choice=method.choice, codebook=predictor.codebook[...]))

    def draw(row, shape):
        return chances(settings.key, row.call, shape[1:], at_least_float32(net.byt5_mapper.kernel[...].dtype))

    guidance, keep = guiding(settings, method), recorder(settings, method)
    carry, kept = sample(denoise, guidance, solver, carry, table, draw, keep)
    return carry, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept)


def chances(key: jax.Array, call: jax.Array, shape: tuple[int, ...], dtype: Any) -> Chances:
    """What is drawn at a call, of typed keys [rows], for logits of this shape in every row."""
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, call)))(key)
    gumbel = jax.vmap(lambda k: jax.random.gumbel(k, shape, dtype))(keys[:, 0])
    return Chances(gumbel, jax.vmap(lambda k: jax.random.uniform(k, shape[:-1], dtype))(keys[:, 1]))


def condition(net: Paella, text: Text, influence: Any) -> Condition:
    """Of all branches, those of a row side by side; the prompt alone has a picture and an influence of its own."""
    rows, branches = text.mask.shape[:2]
    prompt = (jnp.arange(branches) == 1)[None]

    def flat(array):
        return None if array is None else array.reshape(rows * branches, *array.shape[2:])

    def spread(array):
        return jnp.broadcast_to(array[:, None], (rows, branches, *array.shape[1:]))

    factors = flat(jnp.where(prompt[..., None], spread(jnp.asarray(influence)), 1))
    return net.condition(
        flat(text.byt5),
        flat(text.clip),
        None if text.image is None else flat(spread(text.image)),
        mask=flat(text.mask),
        has_clip=flat(text.has_clip),
        has_image=flat(text.has_clip & prompt),
        influence=(factors[:, :1], factors[:, 1:]),
    )


def predict(
    net: Paella, texts: Sequence[Projected], x: jax.Array, row: Row, *, branches: int, centred: bool
) -> Predictions:
    """The logits of all 2 + n branches of every row in one call of the network.

    `centred` takes the mean over the labels off each position's. What is drawn is the same, but to magnitudes, which
    semantic guidance compares, that mean is otherwise a number that nothing decides.
    """
    level = jnp.broadcast_to(row.timestep.astype(jnp.float32), (len(x) * branches,))
    logits = net(jnp.repeat(x, branches, 0), level, texts)
    if centred:
        # In half precision the difference would be rounded, and other tokens drawn.
        logits = logits.astype(at_least_float32(logits.dtype))
        logits = logits - logits.mean(-1, keepdims=True)
    logits = logits.reshape(len(x), branches, *logits.shape[1:])
    return Predictions(logits[:, 0], logits[:, 1], logits[:, 2:])


def decode(vqgan: VQModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [rows, height, width] -> float32 pictures [rows, height, width, 3] in [0, 1], and whether each row is
    finite, bool [rows]."""
    image = jax.lax.map(lambda one: vqgan.decode_indices(one[None])[0], tokens)
    image = image.astype(at_least_float32(image.dtype))
    return jnp.clip(image, 0, 1), jnp.isfinite(image).all((1, 2, 3)) & (tokens >= 0).all((1, 2))


def _lasting(solver: Solver) -> Solver:
    """A row whose logits are not finite is of tokens -1 from then on: tokens would not tell."""

    def update(x, state, estimate, aux, row, draw):
        after, state = solver.update(x, state, estimate, aux, row, draw)
        broken = ~jnp.isfinite(estimate).all((1, 2, 3)) | (x < 0).any((1, 2))
        return jnp.where(broken[:, None, None], -1, after), state

    return Solver(solver.init, update)
