"""diffusers' `StableDiffusionXLPipeline` (0.42.1), with semantic guidance.

The arguments for semantic guidance are the same as in diffusers' `SemanticStableDiffusionPipeline`.
"""

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
    """The output of `SemanticStableDiffusionXLPipeline`.

    Attributes:
        images: PIL images, or a float array [rows, height, width, 3] in [0, 1], or latents
            [rows, height / f, width / f, channels], where f is the checkpoint's downsampling factor.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays of latents, or None without
            `return_guidance`; see `Estimates`.

    Example:
        >>> import numpy as np
        >>> from sega_jax import SemanticStableDiffusionXLPipelineOutput
        >>> out = SemanticStableDiffusionXLPipelineOutput(images=np.zeros((1, 1024, 1024, 3), np.float32))
        >>> out.images.shape, out.sem_guidance
        ((1, 1024, 1024, 3), None)
    """


class SemanticStableDiffusionXLPipeline(LatentPipeline):
    """diffusers' pipeline for Stable Diffusion XL, with semantic guidance.

    It wraps a native pipeline, `pipeline`. Pictures are not watermarked. Arrays have channels last. The noise comes
    from a seed, a generator or a JAX key.

    Example:
        >>> from sega_jax import SemanticStableDiffusionXLPipeline
        >>> name = "stabilityai/stable-diffusion-xl-base-1.0"
        >>> pipe = SemanticStableDiffusionXLPipeline.from_pretrained(name, variant="fp16")  # doctest: +SKIP
        >>> out = pipe("a photo of a cat", editing_prompt="sunglasses", seed=3)  # doctest: +SKIP
        >>> out.images[0].save("sunglasses.png")  # doctest: +SKIP
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
        """Builds a pipeline from another pipeline's components, usually passed as `**pipe.components`.

        The pipelines share weights and compiled programs.
        """
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
            pretrained_model_name_or_path: a folder, hub repository or single file, like `source` in `sega_jax.load`.
            torch_dtype: the dtype of the networks, like `dtype` in `sega_jax.load`. torch dtypes are also accepted.
            tokenizer, tokenizer_2: the two tokenizers of another pipeline, to use instead of the checkpoint's
                tokenizers.
            force_zeros_for_empty_prompt: whether a missing negative prompt is embedded as zeros instead of as "". None
                means the checkpoint's setting.
            options: the other options of `sega_jax.load`.

        Raises:
            TypeError: an option is not supported, or only one tokenizer is given.
            CheckpointError: the checkpoint belongs to a different family. Raised before any weights are downloaded.
            Others: as for `sega_jax.load`.
        """
        if tokenizer is not None and tokenizer_2 is not None:
            options["tokenizer"] = TokenizerPair(tokenizer, tokenizer_2)
        elif tokenizer is not tokenizer_2:
            raise TypeError(
                "only one of tokenizer and tokenizer_2 was given; give both tokenizers of another pipeline, or neither"
            )
        self = cls._load(pretrained_model_name_or_path, torch_dtype, options)
        if force_zeros_for_empty_prompt is not None:
            self.pipeline.extras = Extras(bool(force_zeros_for_empty_prompt))
        return self

    @property
    def components(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this pipeline."""
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
        additions = self._additions()
        vae = cast_to(additions.models.vae, np.dtype("float32"))
        self._apply(dataclasses.replace(additions, models=additions.models._replace(vae=vae)))

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
        """Returns the embeddings and pooled embeddings of the prompts and of the negative prompts.

        Args:
            prompt: a prompt or a list of prompts.
            prompt_2: the prompts for the second text encoder. None means `prompt`.
            device: ignored.
            num_images_per_prompt: how many copies of each embedding to return, at least 1.
            do_classifier_free_guidance: whether to encode the negative prompts.
            negative_prompt: one negative prompt for all prompts, or one for each. None means zeros if the pipeline's
                `force_zeros_for_empty_prompt` is true, and the embedding of "" otherwise.
            negative_prompt_2: the negative prompts for the second text encoder. None means `negative_prompt`.
            lora_scale: multiplies the weights of loaded LoRAs.
            clip_skip: as for a call.

        Returns:
            Four arrays: the embeddings of the prompts and of the negative prompts, [prompts * num_images_per_prompt,
            tokens, channels], then their pooled embeddings, [prompts * num_images_per_prompt, channels]. Without
            `do_classifier_free_guidance`, the arrays for the negative prompts are None.

        Raises:
            TypeError, ValueError: a prompt is not a string, or the numbers of prompts differ.
        """
        del device
        prompts, negatives = prompt_pairs(prompt, negative_prompt or "")
        second = None if prompt_2 is None else prompt_pairs(prompts, prompt_2)[1]
        negative_second = None if negative_prompt_2 is None else prompt_pairs(prompts, negative_prompt_2)[1]
        with collected(), self._scaled_loras(1.0 if lora_scale is None else check_float("lora_scale", lora_scale)):
            text = self.pipeline.encode(prompts, second=second, clip_skip=clip_skip or 0)
            negative = self.pipeline.encode(negatives, second=negative_second) if do_classifier_free_guidance else None
        if negative is not None and negative_prompt is None and self.pipeline.extras.zero_negative:
            negative = SDXLText(np.zeros_like(text.states), np.zeros_like(text.pooled))
        text = _repeated(text, num_images_per_prompt)
        if negative is None:
            return text.states, None, text.pooled, None
        negative = _repeated(negative, num_images_per_prompt)
        return text.states, negative.states, text.pooled, negative.pooled

    @takes(SDXLArguments, "SemanticStableDiffusionXLPipeline")
    def __call__(self, call: SDXLArguments) -> SemanticStableDiffusionXLPipelineOutput | tuple:
        """Generates pictures. The arguments, defaults and results follow diffusers.

        In addition to diffusers' arguments, this pipeline accepts `long_prompts`, `weighted`, `image` and `strength`.
        Unsupported arguments accept only values that have no effect in diffusers.

        Returns:
            A `SemanticStableDiffusionXLPipelineOutput`, or a tuple (images,) if `return_dict` is False.

        Raises:
            TypeError, ValueError: as for `Pipeline.__call__`; raised before any network runs. With `prompt_2` or
                `negative_prompt_2`, however, the text encoders may already have run.
        """
        if call.negative_prompt_2 and call.negative_prompt is call.negative_prompt_embeds is None:
            raise ValueError(
                f"negative_prompt_2={call.negative_prompt_2!r} has no effect in diffusers without negative_prompt; give"
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
        """Returns the prompts as strings, or their embeddings.

        If the caller gave embeddings, they are returned. If the prompts for the two text encoders differ, their
        embeddings are computed here.

        Args:
            name: "prompt" or "negative_prompt".
            required: whether strings or embeddings must be given.

        Raises:
            TypeError, ValueError: arguments contradict each other, or have the wrong type or shape.
        """
        text = call.text(name, required=required)
        first, second = getattr(call, name), getattr(call, f"{name}_2")
        names = f"{name}_embeds", f"{name.replace('prompt', 'pooled_prompt')}_embeds"
        states, pooled = (getattr(call, array_name) for array_name in names)
        if states is None and pooled is None:
            if not second or second == first:
                return text
            firsts, seconds = (list(words) if isinstance(words, list | tuple) else [words] for words in (first, second))
            for argument, words in ((name, firsts), (f"{name}_2", seconds)):
                if not all(isinstance(word, str) for word in words):
                    raise TypeError(f"{argument}={brief(words)} should be a string or a list of strings")
            if len(seconds) not in (1, len(firsts)):
                raise ValueError(
                    f"{name}_2 has {len(seconds)} entries, expected {len(firsts)}, one for each prompt, or 1 for all"
                )
            options: dict[str, Any] = {"long_prompts": call.long_prompts, "weighted": call.weighted}
            if name == "prompt":
                options["clip_skip"] = call.clip_skip or 0
            return self.pipeline.encode(firsts, second=seconds, **options)
        if first is not None or second:
            raise ValueError(
                f"{name} or {name}_2 was given with {' or '.join(names)}; give either prompts or embeddings"
            )
        return self._joined(names, states, pooled)

    def _joined(self, names: tuple[str, str], states: Any, pooled: Any) -> SDXLText | list[SDXLText]:
        """Combines embeddings and pooled embeddings into one or more `SDXLText` objects.

        Args:
            names: the names of the two arguments, for error messages.
            states: embeddings [rows, tokens, channels] or [prompts, n, tokens, channels], or an `SDXLText`.
            pooled: pooled embeddings [rows, channels] or [prompts, n, channels], or None if `states` is an `SDXLText`.

        Returns:
            One `SDXLText`, or a list with one for each prompt if the arrays have an axis for the prompts.

        Raises:
            TypeError, ValueError: one of the arrays is missing, or has the wrong type or shape.
        """
        if isinstance(states, SDXLText) and pooled is None:
            return states
        if states is None or pooled is None:
            raise ValueError(f"{names[0]} and {names[1]} belong together; give both")
        axes = "(..., tokens, channels)", "(..., channels)"
        states, pooled = (floating(*checked) for checked in zip(names, (states, pooled), axes, strict=True))
        unet = self.unet.config
        shape = self.pipeline.tokenizer.length, unet.level("cross_attention_dim", 0)
        fits = states.ndim >= 2 and states.shape[-2] and states.shape[-1] == shape[1]
        if not fits or states.shape[-2] % shape[0]:
            raise ValueError(
                f"{names[0]} has shape {states.shape}, expected (..., {shape[0]}, {shape[1]}) {axes[0]}, or a multiple"
                f" of {shape[0]} tokens"
            )
        if states.ndim not in (3, 4):
            raise ValueError(
                f"{names[0]} has shape {states.shape}, expected 3 axes, or 4 if each prompt has its own concepts"
            )
        expected = (*states.shape[:-2], unet.pooled_dim)
        if pooled.shape != expected:
            raise ValueError(f"{names[1]} has shape {pooled.shape}, expected {expected} {axes[1]}")
        if states.ndim == 4:
            return [SDXLText(*row) for row in zip(states, pooled, strict=True)]
        return SDXLText(states, pooled)


def _repeated(text: SDXLText, count: int) -> SDXLText:
    return SDXLText(text.states.repeat(count, 0), text.pooled.repeat(count, 0))
