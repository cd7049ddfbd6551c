"""Paella with diffusers' interface.

diffusers has no pipeline for Paella version 3. The arguments come from diffusers'
`SemanticStableDiffusionPipeline` and from the published Paella sampler.
"""

import dataclasses
from typing import Any

from sega_jax.diffusers_api.arguments import OUTPUTS, PipelineArguments, positional
from sega_jax.diffusers_api.base import DiffusersPipeline
from sega_jax.diffusers_api.outputs import Estimates, Images, estimates
from sega_jax.method.argument_kinds import Choice
from sega_jax.method.arguments import argument, changed, takes
from sega_jax.pipelines.messages import collected
from sega_jax.systems.paella import SYSTEM
from sega_jax.systems.paella_call import TEMPERATURE, PaellaCall

# {name in the published sampler: value of the native argument `choice`}.
_MODES = {"multinomial": "sample", "argmax": "argmax", "quant": "nearest"}


@dataclasses.dataclass
class SemanticPaellaPipelineOutput(Estimates, Images):
    """The output of `SemanticPaellaPipeline`.

    Attributes:
        images: PIL images, a float array [rows, height, width, 3] in [0, 1], or int tokens
            [rows, height / f, width / f], where f is the checkpoint's downsampling factor.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays of logits, or None without
            `return_guidance`; see `Estimates`.

    Example:
        >>> import numpy as np
        >>> from sega_jax import SemanticPaellaPipelineOutput
        >>> out = SemanticPaellaPipelineOutput(images=np.zeros((2, 64, 64, 3), np.float32))
        >>> out.images.shape, out.sem_guidance
        ((2, 64, 64, 3), None)
    """


@positional(
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"),
    *("num_images_per_prompt", "seed", "latents", "output_type", "return_dict", "callback", "callback_steps"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PaellaArguments(PipelineArguments):
    """The arguments of `SemanticPaellaPipeline`."""

    outputs = OUTPUTS | {"latent": "tokens"}
    shared = (*PipelineArguments.shared, "renoise_steps", "temperature", "influence", "support", "centred")

    latents: Any = changed(PaellaCall, "tokens", None)
    renoise_steps: int | None = changed(PaellaCall, "renoise_steps", None)
    temperature: float | tuple[float, float] = changed(PaellaCall, "temperature", TEMPERATURE)
    mode: str = argument("multinomial", Choice(*_MODES), "how to choose a token; see `choice` in the native call")
    influence: tuple[float, float] = changed(PaellaCall, "influence", (1.0, 1.0))
    support: str = changed(PaellaCall, "support", "channel")
    centred: bool = changed(PaellaCall, "centred", False)

    def native(self, prompt: Any, negative_prompt: Any, concepts: list[Any]) -> dict[str, Any]:
        specific = {"tokens": self.latents, "choice": _MODES[self.mode]}
        return super().native(prompt, negative_prompt, concepts) | specific


class SemanticPaellaPipeline(DiffusersPipeline):
    """A Paella pipeline with diffusers' interface.

    It wraps a native pipeline, `pipeline`. Arrays have channels last. The noise comes from a seed, a generator or a JAX
    key.

    Example:
        >>> from sega_jax import SemanticPaellaPipeline
        >>> pipe = SemanticPaellaPipeline.from_pretrained("path/to/paella")  # doctest: +SKIP
        >>> out = pipe("a portrait", editing_prompt="glasses", edit_warmup_steps=2, seed=3)  # doctest: +SKIP
        >>> out.images[0].save("glasses.png")  # doctest: +SKIP
    """

    _systems = (SYSTEM,)

    @takes(PaellaArguments, "SemanticPaellaPipeline")
    def __call__(self, call: PaellaArguments) -> SemanticPaellaPipelineOutput | tuple:
        """Generates pictures. The arguments and results follow diffusers' `SemanticStableDiffusionPipeline`.

        Returns:
            A `SemanticPaellaPipelineOutput`, or a tuple (images,) if `return_dict` is False.

        Raises:
            TypeError, ValueError: as for `PaellaPipeline.__call__`; raised before any network runs.
        """
        with collected():
            texts = call.text("prompt", required=True), call.text("negative_prompt"), call.concepts()
            out = self._run(call, *texts)
        if not call.return_dict:
            return (out.images,)
        return SemanticPaellaPipelineOutput(out.images, **estimates(out.record))
