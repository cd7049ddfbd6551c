"""Paella with diffusers' names.

diffusers has no pipeline of Paella's version 3. The arguments are those of its `SemanticStableDiffusionPipeline` and of
the published sampler.
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

# The values of the native argument `choice` by the published sampler's names.
_MODES = {"multinomial": "sample", "argmax": "argmax", "quant": "nearest"}


@dataclasses.dataclass
class SemanticPaellaPipelineOutput(Estimates, Images):
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or tokens [rows, height / f, width / f].
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: logits; see `Estimates`.
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
    mode: str = argument("multinomial", Choice(*_MODES), "how a token is taken; see `choice` of the native call")
    influence: tuple[float, float] = changed(PaellaCall, "influence", (1.0, 1.0))
    support: str = changed(PaellaCall, "support", "channel")
    centred: bool = changed(PaellaCall, "centred", False)

    def native(self, prompt: Any, negative_prompt: Any, concepts: list[Any]) -> dict[str, Any]:
        own = {"tokens": self.latents, "choice": _MODES[self.mode]}
        return super().native(prompt, negative_prompt, concepts) | own


class SemanticPaellaPipeline(DiffusersPipeline):
    """Paella with diffusers' names around `sega_jax.PaellaPipeline` (`pipeline`).

    Arrays are channels last; randomness is a seed or a key.
    """

    _systems = (SYSTEM,)

    @takes(PaellaArguments, "SemanticPaellaPipeline")
    def __call__(self, call: PaellaArguments) -> SemanticPaellaPipelineOutput | tuple:
        """Makes pictures with the arguments and results of diffusers' `SemanticStableDiffusionPipeline`.

        Raises:
            TypeError, ValueError: as `PaellaPipeline.__call__`; nothing ran.
        """
        with collected():
            texts = call.text("prompt", required=True), call.text("negative_prompt"), call.concepts()
            out = self._run(call, *texts)
        if not call.return_dict:
            return (out.images,)
        return SemanticPaellaPipelineOutput(out.images, **estimates(out.record))
