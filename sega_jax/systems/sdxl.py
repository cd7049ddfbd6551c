"""Stable Diffusion XL (Podell et al. 2023): latents, two CLIP texts, and a UNet that takes a pooled text and sizes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.method.argument_kinds import Integer, Pair
from sega_jax.method.arguments import argument, changed
from sega_jax.method.checks import brief
from sega_jax.method.numerics import floating
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.config import built
from sega_jax.nn.unet import Context, UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.systems import adapters, clip_text, diffusion, latent_space
from sega_jax.systems.adapters import AdapterNames
from sega_jax.systems.base import Checkpoint, Encode, Given, Network, Setup, System, TextReader, listed
from sega_jax.systems.call import MOST_PIXELS
from sega_jax.systems.clip_text import ClipCall, tokenizer_folder
from sega_jax.systems.conditioning import Text, conditioning
from sega_jax.systems.diffusion_call import DiffusionCall, StartingCall
from sega_jax.systems.original_files import SDXL_FILE
from sega_jax.systems.sizes import size_conditioning
from sega_jax.systems.stable_diffusion import SAMPLER as STABLE_DIFFUSION
from sega_jax.text.prompt_weights import Reading, pair_chunks, weighed
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights.textual_inversion import TextEncoders

_SIZE = Pair(Integer(1, MOST_PIXELS), "two whole numbers, or two for each picture")
_CORNER = Pair(Integer(0, MOST_PIXELS), "two whole numbers, or two for each picture")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLCall(ClipCall, StartingCall):
    """A call of Stable Diffusion XL, with diffusers' defaults. No negative prompt is not the same as "": it is zeros,
    where the checkpoint's index says so."""

    guidance_scale: Any = changed(DiffusionCall, "guidance_scale", 5.0)
    original_size: Any = argument(
        None,
        _SIZE,
        "size conditioning: height and width of the picture before resizing and cropping; by default the size of the"
        " result",
        unit="pixels",
        varies="row",
        sweep=True,
        shell=True,
    )
    crops_top_left: Any = argument(
        None,
        _CORNER,
        "size conditioning: top and left of the crop; by default 0,0",
        unit="pixels",
        varies="row",
        sweep=True,
        shell=True,
    )
    target_size: Any = argument(
        None,
        _SIZE,
        "size conditioning: height and width of the cropped picture; by default the size of the result",
        unit="pixels",
        varies="row",
        sweep=True,
        shell=True,
    )


class Models(NamedTuple):
    """The networks of a checkpoint, with or without values."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    @classmethod
    def build(
        cls,
        text_encoder: Mapping[str, Any] | CLIPTextModel,
        text_encoder_2: Mapping[str, Any] | CLIPTextModelWithProjection,
        unet: Mapping[str, Any] | UNet2DConditionModel,
        vae: Mapping[str, Any] | AutoencoderKL,
        attention: str = "xla",
    ) -> "Models":
        """Builds networks without values from the contents of their config.json; networks stay as they are.

        Raises:
            ValueError: a config that is not supported, or networks that do not fit each other.
        """
        text_encoder = built(text_encoder, CLIPTextModel, CLIPTextConfig)
        text_encoder_2 = built(text_encoder_2, CLIPTextModelWithProjection, CLIPTextConfig)
        unet = built(unet, UNet2DConditionModel, UNetConfig, attention)
        vae = built(vae, AutoencoderKL, AutoencoderConfig)
        one, two, net = text_encoder.config, text_encoder_2.config, unet.config
        if not net.has_size_conditioning or net.adds_keys or net.num_class_embeds:
            raise ValueError(
                f"a UNet of addition_embed_type {net.addition_embed_type or None} and num_class_embeds"
                f" {net.num_class_embeds or None} is not Stable Diffusion XL's, whose addition_embed_type is text_time"
            )
        channels = one.hidden_size + two.hidden_size
        diffusion.check_context(net, channels, f"what both text encoders have, {one.hidden_size} + {two.hidden_size}")
        if net.pooled_dim != two.projection_dim or net.pooled_dim > channels:
            raise ValueError(
                f"the UNet takes {net.pooled_dim} channels of a pooled text (projection_class_embeddings_input_dim less"
                f" six times addition_time_embed_dim), the second text encoder's projection_dim is"
                f" {two.projection_dim}: only Stable Diffusion XL's base layout is supported, not the refiner's"
            )
        if one.max_position_embeddings != two.max_position_embeddings:
            raise ValueError(
                f"the text encoders read {one.max_position_embeddings} and {two.max_position_embeddings} tokens; do"
                " they belong together?"
            )
        latent_space.check_channels(net, vae.config)
        return cls(text_encoder, text_encoder_2, unet, vae)


class Extras(NamedTuple):
    """What the index of a checkpoint says besides its networks."""

    zero_negative: bool = True  # whether no negative prompt is zeros, or the text of no words


@conditioning
class SDXLText(Text):
    """Texts as Stable Diffusion XL takes them."""

    states: Any  # [texts, tokens, channels], of both text encoders side by side and of one or more chunks of tokens
    pooled: Any  # [texts, channels], of the second text encoder and of the first chunk


def encode(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: jax.Array) -> SDXLText:
    """Encodes int32 ids [texts, 2, tokens], of each encoder's own tokenizer."""
    one, two = encoders
    states, pooled = two.states(ids[:, 1])
    return SDXLText(jnp.concatenate([one.penultimate(ids[:, 0]), states], -1), pooled)


def read(
    words: Sequence[str],
    tokenizer: TokenizerPair,
    encode: Encode,
    warn: Callable[[str], None],
    *,
    second: Sequence[str] | str | None = None,
    long_prompts: bool = False,
    weighted: bool = False,
) -> list[SDXLText]:
    """Reads words; `second` are words for the second text encoder where it reads others, one for all or one each.

    Raises:
        TypeError, ValueError: `second` is no words, or not as many as there are texts; or a weight is no number.
    """
    others = None if second is None else _words_of_second(second, len(words))
    if not (long_prompts or weighted):
        return encode(tokenizer(words, others, warn=warn))
    reading = Reading(long_prompts, weighted)
    parts = [
        pair_chunks(tokenizer, text, others[i] if others else None, reading, warn=warn) for i, text in enumerate(words)
    ]
    rows = iter(encode(np.concatenate([part.ids for part in parts])))
    width = encode.networks[0].config.hidden_size
    return [joined_chunks([next(rows) for _ in part.ids], part.weights, width) for part in parts]


def _words_of_second(second: Any, texts: int) -> list[str]:
    words = [second] if isinstance(second, str) else list(second) if hasattr(second, "__iter__") else []
    if not words or not all(isinstance(one, str) for one in words):
        raise TypeError(f"second={brief(second)} should be words or a non-empty list of them")
    if len(words) not in (1, texts):
        raise ValueError(f"second has {len(words)} entries, expected {texts}, one a text, or one for all")
    return words * (texts // len(words))


def joined_chunks(rows: Sequence[SDXLText], weights: np.ndarray, width: int) -> SDXLText:
    """Joins the chunks of one text, and weighs the states of each text encoder by themselves (`weighed`).

    The pooled text is the first chunk's, without weights, as in the widely used web UI (AUTOMATIC1111's
    stable-diffusion-webui). diffusers' community pipeline lpw_stable_diffusion_xl takes the last chunk's, also without
    weights. The first chunk's does not depend on how much follows it or on the padding of shorter texts, and it is the
    pooled text of the truncated prompt, so `long_prompts` only adds to what the UNet is told.

    Args:
        rows: what `encode` makes of each chunk.
        weights: float32 [chunks, 2, length], of the tokens of each text encoder.
        width: the number of channels of the first text encoder.
    """
    sides = np.split(np.concatenate([np.asarray(row.states) for row in rows]), [width], -1)
    states = np.concatenate([weighed(side, weights[:, i]) for i, side in enumerate(sides)], -1)
    return SDXLText(states.reshape(1, -1, states.shape[-1]), rows[0].pooled)


def length(
    tokenizer: TokenizerPair, words: Sequence[str], *, long_prompts: bool = False, weighted: bool = False
) -> int:
    """Returns the number of chunks that the longest of some words takes.

    Raises:
        ValueError: a weight that is no number.
    """
    reading = Reading(long_prompts, weighted)
    return max(len(pair_chunks(tokenizer, text, None, reading, warn=lambda message: None).ids) for text in words)


def join(texts: Sequence[SDXLText], blank: Callable[[], SDXLText]) -> SDXLText:
    """Joins texts; shorter ones are padded by chunks of no words, which leave the pooled text as it is.

    Zeros are padded by zeros, because they mean the absence of a text. The UNet's keys and values of them are zero, so
    their number changes nothing, while a chunk of no words would be a text.
    """
    longest = max(text.states.shape[1] for text in texts)
    return clip_text.join([text if text.states.any() else _zeros(text, longest) for text in texts], blank)


def _zeros(text: SDXLText, tokens: int) -> SDXLText:
    rows, _, channels = text.states.shape
    return dataclasses.replace(text, states=np.zeros((rows, tokens, channels), text.states.dtype))


def check(models: Models, tokenizer: TokenizerPair | None, value: Any) -> SDXLText:
    """Returns a user's conditioning as a text of one row.

    Raises:
        TypeError, ValueError: it is of another family or shape.
    """
    if not isinstance(value, SDXLText):
        raise TypeError(
            f"an embedding of Stable Diffusion XL is an SDXLText of states and pooled text, as encode returns it, not"
            f" {type(value).__name__}"
        )
    tokens, channels, pooled_channels = _text_shape(models, tokenizer)
    states = floating("an embedding's states", value.states, f"(1, {tokens}, {channels})")
    fits = states.ndim == 3 and states.shape[1] and states.shape[2] == channels
    if not fits or states.shape[1] % tokens:
        raise ValueError(
            f"an embedding's states has shape {states.shape[1:]}, expected {(tokens, channels)} (tokens, channels), or"
            f" a multiple of {tokens} tokens"
        )
    pooled = floating("an embedding's pooled", value.pooled, f"(1, {pooled_channels})")
    if pooled.shape != (1, pooled_channels):
        raise ValueError(f"an embedding's pooled has shape {pooled.shape[1:]}, expected {(pooled_channels,)}")
    return value


def _text_shape(models: Models, tokenizer: TokenizerPair | None) -> tuple[int, int, int]:
    """Returns the tokens of a chunk, and the channels of states and pooled text."""
    tokens = models.text_encoder.config.max_position_embeddings if tokenizer is None else tokenizer.length
    net = models.unet.config
    return tokens, net.level("cross_attention_dim", 0), net.pooled_dim


def negative(models: Models, tokenizer: TokenizerPair | None, extras: Extras) -> SDXLText | str:
    """Returns what stands in place of no negative prompt."""
    if not extras.zero_negative:
        return ""
    tokens, channels, pooled_channels = _text_shape(models, tokenizer)
    return SDXLText(np.zeros((1, tokens, channels), np.float32), np.zeros((1, pooled_channels), np.float32))


def setup(call: SDXLCall, given: Given) -> Setup:
    """Sets a call up; see `sega_jax.systems.diffusion.setup`."""

    def conditioning(size):
        sizes = ("original_size", "crops_top_left", "target_size")
        spread = (_spread(name, getattr(call, name), given) for name in sizes)
        return size_conditioning(size, given.rows, *spread).astype(given.dtype)

    return diffusion.setup(
        call,
        given,
        latent_space.latent_sizes(given.models.unet.config, given.models.vae.config),
        diffusion.table_from_picture(call, given.scheduler),
        image=call.image,
        image_noise=call.image_noise,
        size_conditioning=conditioning,
        vae=given.models.vae,
        tiled=call.tiled,
    )


def _spread(name: str, value: Any, given: Given) -> Any:
    return given.spread(name, value) if isinstance(value, list) else value


def denoiser(unet: UNet2DConditionModel, text: SDXLText, settings: Any, own: Any, x: Any) -> Any:
    """Returns the function that predicts all branches, which are all told the row's sizes."""
    sizes = jnp.asarray(settings.own.size_conditioning)[:, None]
    sizes = jnp.broadcast_to(sizes, (*text.pooled.shape[:2], 6))
    return diffusion.denoiser(unet, Context(text.states, text.pooled, sizes), settings, own, x)


def decode(vae: AutoencoderKL, latents: jax.Array, *, tile: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Decodes as `sega_jax.systems.latent_space.decode_latents`, but in float32 where the weights are float16 and the
    config says that this does not hold the activations, as in diffusers."""
    return latent_space.decode_latents(_upcast(vae), latents, tile=tile)


def encode_image(vae: AutoencoderKL, key: jax.Array, pictures: jax.Array, noise: Any = None) -> jax.Array:
    """Encodes as `sega_jax.systems.latent_space.encode_image`, in the dtype of `decode`."""
    return latent_space.encode_image(_upcast(vae), key, pictures, noise)


def _upcast(vae: AutoencoderKL) -> AutoencoderKL:
    if vae.config.force_upcast and vae.decoder.conv_in.kernel[...].dtype == jnp.float16:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), vae)
    return vae


def tokenizer(folder: Path, models: Models, given: Any) -> TokenizerPair:
    """Reads both tokenizers, which have one vocabulary and pad with different tokens; a given one stands for both.

    Raises:
        TypeError, CheckpointError: it is of another kind, or cannot be read.
    """

    def one(where, network):
        return Tokenizer(where, network.config.max_position_embeddings, network.config.vocab_size)

    if isinstance(given, TokenizerPair):
        return given
    if given is not None:
        if not isinstance(given, Tokenizer):
            where = tokenizer_folder(folder, given, "CLIP's, or another pipeline's of Stable Diffusion XL")
            given = one(where, models.text_encoder)
        return given.pair()
    return TokenizerPair(
        one(folder / "tokenizer", models.text_encoder), one(folder / "tokenizer_2", models.text_encoder_2)
    )


def extras(folder: Path, index: Mapping[str, Any], models: Models) -> Extras:
    """Reads whether no negative prompt is zeros."""
    return Extras(index.get("force_zeros_for_empty_prompt", True) is not False)


def refuse(index: Mapping[str, Any]) -> str | None:
    """Refuses the refiner, which has the second text encoder alone."""
    if listed(index, "text_encoder_2") and not listed(index, "text_encoder"):
        return (
            "is Stable Diffusion XL's refiner, which goes on with pictures of the base model: only the base is"
            " supported"
        )
    return None


SYSTEM = System(
    name="sdxl",
    title="Stable Diffusion XL",
    checkpoint=Checkpoint(
        recognise=lambda index: "text_encoder_2" in index,
        models=Models,
        networks={
            "text_encoder": Network(CLIPTextModel, CLIPTextConfig, "model"),
            "text_encoder_2": Network(CLIPTextModelWithProjection, CLIPTextConfig, "model"),
            "unet": Network(UNet2DConditionModel, UNetConfig),
            "vae": Network(AutoencoderKL, AutoencoderConfig),
        },
        build=Models.build,
        tokenizer=tokenizer,
        tokenizers=("tokenizer", "tokenizer_2"),
        extras=extras,
        extras_type=Extras,
        refuse=refuse,
        single_file=SDXL_FILE,
        adapters=AdapterNames(
            {"text_encoder": adapters.TEXT, "text_encoder_2": adapters.TEXT_2, "unet": adapters.UNET},
            TextEncoders("Stable Diffusion XL", {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}, "768 and 1280"),
        ),
    ),
    text=TextReader(
        type=SDXLText,
        parts=("text_encoder", "text_encoder_2"),
        networks=lambda models: (models.text_encoder, models.text_encoder_2),
        encode=encode,
        read=read,
        check=check,
        join=join,
        length=length,
        negative=negative,
    ),
    sampler=STABLE_DIFFUSION._replace(setup=setup, denoiser=denoiser, decode=decode, encode_image=encode_image),
    call=SDXLCall,
)
