"""Stable Diffusion 1.x and 2.x: latents, CLIP text, and a UNet that predicts the noise or v.

Five pure functions of one device's share of the rows, each compiled once: `encode` takes tokens to
text, `start` keys to noise, `advance` a carry through a chunk of the schedule, `decode` latents to
pictures, `check` pictures to flags. `generate` is the composition of the first four, for research and
export.

Latents and pictures are channels last. Axes: rows of the batch, branches (2 + n: unconditional, prompt,
concepts), tokens, channels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sega_jax.arrays import at_least_float32
from sega_jax.guidance import Edits, Predictions, cfg, replay, sega
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.sample import Carry, nothing, sample
from sega_jax.schedules import Row
from sega_jax.solvers import SOLVERS, Solver

# Where the initial noise is drawn from a key; the noise of call i is drawn at i.
_INITIAL = 2**32 - 1


class Models(NamedTuple):
    """The networks of a checkpoint, without values or filled."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    @classmethod
    def build(
        cls,
        text_encoder: Mapping[str, Any] | CLIPTextModel,
        unet: Mapping[str, Any] | UNet2DConditionModel,
        vae: Mapping[str, Any] | AutoencoderKL,
        attention: str = "xla",
    ) -> "Models":
        """Networks without values from the three config.json; networks that are built stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        if isinstance(text_encoder, Mapping):
            text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(text_encoder))
        if isinstance(unet, Mapping):
            unet = UNet2DConditionModel(UNetConfig.from_dict(unet), attention)
        if isinstance(vae, Mapping):
            vae = AutoencoderKL(AutoencoderConfig.from_dict(vae))
        text, net, auto = text_encoder.config, unet.config, vae.config
        for level in range(len(net.block_out_channels)):
            if (context := net.level("cross_attention_dim", level)) != text.hidden_size:
                raise ValueError(
                    f"the UNet's cross_attention_dim {context} is not the text encoder's hidden_size"
                    f" {text.hidden_size}; do the two belong together?"
                )
        if not net.in_channels == net.out_channels == auto.latent_channels:
            raise ValueError(
                f"the UNet takes {net.in_channels} channels to {net.out_channels}, the VAE has"
                f" {auto.latent_channels}: only text-to-image checkpoints are supported, where all are equal"
            )
        if net.adds_keys or net.num_class_embeds:
            raise ValueError(
                f"a UNet of mid_block_type {net.mid_block_type} and num_class_embeds {net.num_class_embeds or None} is"
                " DeepFloyd-IF's or an upscaler's: only text-to-image checkpoints of Stable Diffusion are supported"
            )
        return cls(text_encoder, unet, vae)


class Method(NamedTuple):
    """What is compiled in; everything else is a number that a program takes."""

    solver: str = "ddim"
    semantics: str = "diffusers"
    support: str = "channel"
    record: bool = False


class Settings(NamedTuple):
    """The numbers of every row."""

    key: jax.Array  # typed keys [rows]
    guidance_scale: Any  # [rows]
    eta: Any  # [rows]
    edits: Edits | None  # [rows, n] each; None for no concepts at all
    replay: Any = None  # [rows, calls, height, width, channels] to be added, or None


class Record(NamedTuple):
    """What every model call predicted, and what semantic guidance added; [rows, calls, ...] in float32."""

    sem_guidance: jax.Array  # [rows, calls, height, width, channels], without cfg and without replay
    uncond: jax.Array  # likewise
    cond: jax.Array  # likewise
    edits: jax.Array | None  # [rows, calls, n, height, width, channels]; None without concepts


def encode(text_encoder: CLIPTextModel, ids: jax.Array) -> jax.Array:
    """int32 ids [texts, tokens] -> hidden states [texts, tokens, channels]."""
    return text_encoder(ids)


def start(settings: Settings, latents: Any, scale: Any, *, shape: tuple[int, ...], method: Method, dtype: Any) -> Carry:
    """The carry before the first call, from standard normal latents, given [rows, *shape] or of each row's key,
    times the table's `initial_scale`."""
    if latents is None:
        latents = _noise(settings.key, _INITIAL, shape, dtype)
    x = jnp.asarray(latents, dtype) * jnp.asarray(scale).astype(dtype)
    n = 0 if settings.edits is None else settings.edits.scale.shape[1]
    branch = jax.ShapeDtypeStruct(x.shape, x.dtype)
    preds = Predictions(branch, branch, jax.ShapeDtypeStruct((len(x), n, *shape), x.dtype))
    guidance, solver = _method(settings, method)
    return Carry(x, guidance.init(preds), solver.init(x))


def advance(
    unet: UNet2DConditionModel, text: jax.Array, carry: Carry, table: Row, settings: Settings, *, method: Method
) -> tuple[Carry, Record | None]:
    """Takes the rows through a chunk of the schedule.

    Args:
        text: hidden states [rows, 2 + n, tokens, channels].
        carry: of `start`, or of the chunk before.
        table: rows of the schedule, some of which may be filling.

    Returns:
        The carry, and with `method.record` the record of the chunk's calls.
    """
    guidance, solver = _method(settings, method)

    def denoise(x, row):
        return predict(unet, text, x, row)

    def draw(row, shape):
        return _noise(settings.key, row.call, shape[1:], carry.x.dtype)

    def keep(x, preds, guided, state):
        uncond, cond, edits = (p.astype(x.dtype) for p in preds[:3])
        added = jnp.zeros_like(x)
        if settings.edits is None:
            return Record(added, uncond, cond, None)
        # Guidance once more, from zero: the compiler sees that it is the same sum and takes it once.
        added, _ = _sega(settings, method).update(added, state[1], preds)
        return Record(added, uncond, cond, edits)

    carry, kept = sample(denoise, guidance, solver, carry, table, draw, keep if method.record else nothing)
    return carry, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept)


def decode(vae: AutoencoderKL, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents [rows, ...] -> float32 pictures [rows, height, width, 3] in [0, 1], and whether each row
    of latents and picture is finite, bool [rows]."""
    # One picture after another: a decoder's activations are far larger than its picture.
    image = jax.lax.map(lambda one: vae.decode(one[None])[0], latents / vae.config.scaling_factor)
    image = image.astype(at_least_float32(image.dtype))
    finite = jnp.isfinite(image).all((1, 2, 3)) & jnp.isfinite(latents).all((1, 2, 3))
    return jnp.clip(image / 2 + 0.5, 0, 1), finite


def check(safety_checker: StableDiffusionSafetyChecker, pixels: jax.Array) -> jax.Array:
    """Pictures that the host resized and normalised, [rows, side, side, 3] -> whether each is flagged, bool [rows]."""
    return safety_checker(pixels)


def generate(
    models: Models,
    ids: jax.Array,
    table: Row,
    settings: Settings,
    latents: jax.Array | None = None,
    *,
    shape: tuple[int, ...],
    method: Method,
) -> jax.Array:
    """The whole way from tokens to pictures as one pure function.

    Args:
        ids: int32 [rows, 2 + n, tokens]: the negative prompt, the prompt, the concepts.
        table: of a `Scheduler` for a number of steps.
        latents: to start from, [rows, *shape] (then `settings.key` serves a solver's fresh noise only).
        shape: (height, width, channels) of the latents.

    Returns:
        Float32 pictures [rows, height, width, 3] in [0, 1], which no safety checker has seen.
    """
    text = encode(models.text_encoder, ids.reshape(-1, ids.shape[-1]))
    text = text.reshape(*ids.shape, text.shape[-1])
    carry = start(
        settings, latents, table.initial_scale[0], shape=shape, method=method, dtype=at_least_float32(text.dtype)
    )
    carry, _ = advance(models.unet, text, carry, table, settings, method=method)
    return decode(models.vae, carry.x)[0]


def predict(unet: UNet2DConditionModel, text: jax.Array, x: jax.Array, row: Row) -> Predictions:
    """All 2 + n branches of every row in one call of the network."""
    rows, branches = text.shape[:2]
    tiled = jnp.repeat(x * row.input_scale.astype(x.dtype), branches, 0)
    timestep = jnp.broadcast_to(row.timestep.astype(x.dtype), (rows * branches,))
    out = unet(tiled, timestep, text.reshape(rows * branches, *text.shape[2:]))
    out = out.reshape(rows, branches, *x.shape[1:])
    return Predictions(out[:, 0], out[:, 1], out[:, 2:])


def _sega(settings: Settings, method: Method) -> optax.GradientTransformation:
    return sega(settings.edits, semantics=method.semantics, support=method.support)


def _method(settings: Settings, method: Method) -> tuple[optax.GradientTransformation, Solver]:
    links = [cfg(settings.guidance_scale)]
    if settings.edits is not None:
        links.append(_sega(settings, method))
    if settings.replay is not None:
        links.append(replay(settings.replay))
    return optax.chain(*links), SOLVERS[method.solver](settings.eta)


def _noise(key: jax.Array, tag: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, tag), shape, dtype))(key)
