"""diffusers' `StableDiffusionXLPipeline` (0.42.1), with the arguments of semantic guidance of its
`SemanticStableDiffusionPipeline`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from sega_jax.diffusers_api.files import LatentPipeline
from sega_jax.diffusers_api.outputs import Estimates, Images, estimates
from sega_jax.diffusers_api.sdxl_arguments import SDXLArguments
from sega_jax.diffusers_api.switches import cast_to
from sega_jax.diffusers_api.texts import prompt_pairs, split
from sega_jax.method.arguments import takes
from sega_jax.method.checks import brief, check_float
from sega_jax.method.numerics import floating
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.messages import collected
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.systems.sdxl import SYSTEM, Extras, Models, SDXLText
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair


@dataclasses.dataclass
class SemanticStableDiffusionXLPipelineOutput(Estimates, Images):
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or latents.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays of the shape of latents; see `Estimates`.
    """


class SemanticStableDiffusionXLPipeline(LatentPipeline):
    """diffusers' pipeline of Stable Diffusion XL around a native one (`pipeline`), with semantic guidance.

    There is no watermark. Arrays are channels last; randomness is a seed or a key.
    """

    _systems = (SYSTEM,)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: Tokenizer,
        tokenizer_2: Tokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = True,
        *,
        devices: Sequence[jax.Device] | Devices | None = None,
    ):
        """Builds a pipeline from the components of another one, `SemanticStableDiffusionXLPipeline(**pipe.components)`,
        without loading or compiling anything again."""
        where = devices if isinstance(devices, Devices) else Devices(devices)
        models = where.place(Models.build(text_encoder, text_encoder_2, unet, vae))
        pair = TokenizerPair(tokenizer, tokenizer_2)
        extras = Extras(bool(force_zeros_for_empty_prompt))
        self.pipeline = Pipeline(SYSTEM, models, pair, scheduler, where, extras=extras)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: Any = None,
        tokenizer: Tokenizer | None = None,
        tokenizer_2: Tokenizer | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: the `source` of `sega_jax.load`.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            tokenizer, tokenizer_2: both tokenizers of another pipeline.
            force_zeros_for_empty_prompt: whether zeros stand in place of no negative prompt, instead of the embedding
                of ""; None is the checkpoint's choice.
            options: the other options of `sega_jax.load`.

        Raises:
            TypeError: an option is not supported, or only one tokenizer is given.
            CheckpointError: the checkpoint is of another family; nothing but its index was fetched.
            Others as `sega_jax.load`.
        """
        if tokenizer is not None and tokenizer_2 is not None:
            options["tokenizer"] = TokenizerPair(tokenizer, tokenizer_2)
        elif tokenizer is not tokenizer_2:
            raise TypeError("tokenizer and tokenizer_2 belong together; give both of another pipeline, or neither")
        self = cls._load(pretrained_model_name_or_path, torch_dtype, options)
        if force_zeros_for_empty_prompt is not None:
            self.pipeline.extras = Extras(bool(force_zeros_for_empty_prompt))
        return self

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of the constructor that build this pipeline."""
        return {
            **self.pipeline.models._asdict(),
            "tokenizer": self.tokenizer,
            "tokenizer_2": self.tokenizer_2,
            "scheduler": self.pipeline.scheduler,
            "force_zeros_for_empty_prompt": self.pipeline.extras.zero_negative,
            "devices": self.pipeline.devices,
        }

    def upcast_vae(self) -> None:
        """Casts the autoencoder to float32."""
        added = self._additions()
        vae = cast_to(added.models.vae, np.dtype("float32"))
        self._apply(dataclasses.replace(added, models=added.models._replace(vae=vae)))

    @property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        return self.pipeline.models.text_encoder_2

    @text_encoder_2.setter
    def text_encoder_2(self, value: CLIPTextModelWithProjection) -> None:
        self._replace_network("text_encoder_2", value)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pipeline.tokenizer.first

    @property
    def tokenizer_2(self) -> Tokenizer:
        return self.pipeline.tokenizer.second

    def encode_prompt(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        *,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
        """Returns the embeddings of the prompts and of their negative prompts [prompts * pictures, tokens, channels],
        and both pooled [prompts * pictures, channels]; those of negative prompts are None without
        `do_classifier_free_guidance`. No negative prompt is zeros, where the checkpoint says so.

        Args:
            prompt_2, negative_prompt_2: words of the second text encoder, where it reads others.
            device: ignored.
            lora_scale: multiplies the weights of loaded LoRAs.
            clip_skip: as of the call.

        Raises:
            TypeError, ValueError: a prompt is not words, or their numbers differ.
        """
        del device
        prompts, negatives = prompt_pairs(prompt, negative_prompt or "")
        second = None if prompt_2 is None else prompt_pairs(prompts, prompt_2)[1]
        away = None if negative_prompt_2 is None else prompt_pairs(prompts, negative_prompt_2)[1]
        with collected(), self._scaled_loras(1.0 if lora_scale is None else check_float("lora_scale", lora_scale)):
            text = self.pipeline.encode(prompts, second=second, clip_skip=clip_skip or 0)
            other = self.pipeline.encode(negatives, second=away) if do_classifier_free_guidance else None
        if other is not None and negative_prompt is None and self.pipeline.extras.zero_negative:
            other = SDXLText(np.zeros_like(text.states), np.zeros_like(text.pooled))
        text = _repeated(text, num_images_per_prompt)
        if other is None:
            return text.states, None, text.pooled, None
        other = _repeated(other, num_images_per_prompt)
        return text.states, other.states, text.pooled, other.pooled

    @takes(SDXLArguments, "SemanticStableDiffusionXLPipeline")
    def __call__(self, call: SDXLArguments) -> SemanticStableDiffusionXLPipelineOutput | tuple:
        """Makes pictures with diffusers' arguments, defaults and results.

        A picture to start from is an argument of `StableDiffusionXLImg2ImgPipeline` in diffusers, and long and weighted
        prompts are left to other libraries there. Arguments that are not supported accept the values that change
        nothing in diffusers.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; nothing ran except, with `prompt_2`, the text encoders.
        """
        if call.negative_prompt_2 and call.negative_prompt is call.negative_prompt_embeds is None:
            raise ValueError(
                f"negative_prompt_2={call.negative_prompt_2!r} without negative_prompt has no effect in diffusers; give"
                " both (negative_prompt may be '')"
            )
        with collected():
            texts = self._text(call, "prompt", required=True), self._text(call, "negative_prompt")
            out = self._run(call, *texts, self._concepts(call))
        if not call.return_dict:
            return (out.images,)
        return SemanticStableDiffusionXLPipelineOutput(out.images, **estimates(out.record))

    def _concepts(self, call: SDXLArguments) -> list[Any]:
        """Returns the concepts; see `PipelineArguments.concepts`."""
        names = "editing_prompt_embeddings", "editing_pooled_prompt_embeddings"
        states, pooled = (getattr(call, name) for name in names)
        if call.editing_prompt or (states is None and pooled is None):
            return call.concepts()
        return split(self._joined(names, states, pooled))

    def _text(self, call: SDXLArguments, name: str, *, required: bool = False) -> Any:
        """Returns a prompt's words, or embeddings: given ones, or of words that differ for the second text encoder.

        Args:
            name: "prompt" or "negative_prompt".
            required: whether words or embeddings have to be given.

        Raises:
            TypeError, ValueError: arguments contradict each other, or have another type or shape.
        """
        text = call.text(name, required=required)
        first, second = getattr(call, name), getattr(call, f"{name}_2")
        names = f"{name}_embeds", f"{name.replace('prompt', 'pooled_prompt')}_embeds"
        states, pooled = (getattr(call, one) for one in names)
        if states is None and pooled is None:
            if not second or second == first:
                return text
            firsts, seconds = (list(one) if isinstance(one, list | tuple) else [one] for one in (first, second))
            for argument, words in ((name, firsts), (f"{name}_2", seconds)):
                if not all(isinstance(one, str) for one in words):
                    raise TypeError(f"{argument}={brief(words)} should be words or a list of them")
            if len(seconds) not in (1, len(firsts)):
                raise ValueError(
                    f"{name}_2 has {len(seconds)} entries, expected {len(firsts)}, one each, or one for all"
                )
            reading: dict[str, Any] = {"long_prompts": call.long_prompts, "weighted": call.weighted}
            if name == "prompt":
                reading["clip_skip"] = call.clip_skip or 0
            return self.pipeline.encode(firsts, second=seconds, **reading)
        if first is not None or second:
            raise ValueError(f"{name} or {name}_2 and {' or '.join(names)} were both given; give words or embeddings")
        return self._joined(names, states, pooled)

    def _joined(self, names: tuple[str, str], states: Any, pooled: Any) -> SDXLText | list[SDXLText]:
        """Joins arrays of states and pooled embeddings to a text; with an axis for the prompts, to one for each.

        Raises:
            TypeError, ValueError: one of them is missing, or has another type or shape.
        """
        if isinstance(states, SDXLText) and pooled is None:
            return states
        if states is None or pooled is None:
            raise ValueError(f"{names[0]} and {names[1]} belong together; give both")
        axes = "(..., tokens, channels)", "(..., channels)"
        states, pooled = (floating(*one) for one in zip(names, (states, pooled), axes, strict=True))
        net = self.unet.config
        shape = self.pipeline.tokenizer.length, net.level("cross_attention_dim", 0)
        fits = states.ndim >= 2 and states.shape[-2] and states.shape[-1] == shape[1]
        if not fits or states.shape[-2] % shape[0]:
            raise ValueError(
                f"{names[0]} has shape {states.shape}, expected (..., {shape[0]}, {shape[1]}) {axes[0]}, or a multiple"
                f" of {shape[0]} tokens"
            )
        if states.ndim not in (3, 4):
            raise ValueError(f"{names[0]} has shape {states.shape}, expected three axes, or four for concepts")
        expected = (*states.shape[:-2], net.pooled_dim)
        if pooled.shape != expected:
            raise ValueError(f"{names[1]} has shape {pooled.shape}, expected {expected} {axes[1]}")
        if states.ndim == 4:
            return [SDXLText(*one) for one in zip(states, pooled, strict=True)]
        return SDXLText(states, pooled)


def _repeated(text: SDXLText, count: int) -> SDXLText:
    return SDXLText(text.states.repeat(count, 0), text.pooled.repeat(count, 0))
