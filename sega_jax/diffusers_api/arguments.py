"""Defines the arguments shared by the pipelines, under their diffusers names, and translates them for native calls.

Each pipeline extends one of these dataclasses with its own arguments.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

from sega_jax.diffusers_api.kinds import (
    ConceptWords,
    Generators,
    LoraScale,
    ModelCalls,
    OrNone,
    OutputType,
    PerConcept,
    SeedsOrGenerators,
    StepCallback,
    Unsupported,
    Weight,
)
from sega_jax.diffusers_api.texts import split
from sega_jax.diffusers_api.torch_values import array, is_generator
from sega_jax.method.argument_kinds import Flag, Opaque, Real
from sega_jax.method.arguments import argument, arguments, changed, check_arguments
from sega_jax.method.guidance import Edit
from sega_jax.method.guidance.edits import THRESHOLD, WARMUP
from sega_jax.method.numerics import floating
from sega_jax.pipelines.messages import warn
from sega_jax.systems.call import Call
from sega_jax.systems.conditioning import Text
from sega_jax.systems.diffusion_call import DiffusionCall, StartingCall
from sega_jax.systems.images import Pictures

T = TypeVar("T")
# Maps `output_type` to the native argument `output`.
OUTPUTS = {"pil": "pil", "np": "float", "latent": "latent"}
# Maps argument names to the fields of `Edit`.
_EDIT_FIELDS = {
    "edit_guidance_scale": "scale",
    "edit_warmup_steps": "warmup",
    "edit_cooldown_steps": "cooldown",
    "edit_threshold": "threshold",
    "edit_weights": "weight",
}


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineArguments:
    """The arguments of all pipelines.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or two arguments cannot be combined.
    """

    outputs: ClassVar[Mapping[str, str]] = OUTPUTS
    # The arguments that have the same name in native calls.
    shared: ClassVar[tuple[str, ...]] = ("height", "width", "seed", "key", "callback", "callback_steps", "progress")

    prompt: str | list[str] | None = changed(
        Call, "prompt", None, help="the prompt, or a list of prompts", varies="call"
    )
    _: dataclasses.KW_ONLY
    height: int | None = changed(Call, "height", None)
    width: int | None = changed(Call, "width", None)
    num_inference_steps: int | None = changed(Call, "steps", None)
    guidance_scale: float | list[float] | None = changed(
        Call,
        "guidance_scale",
        None,
        kind=Real(),
        help="the strength of the prompt, s in u + s (p - u). At 1 and below only the conditional prediction is used,"
        " as in diffusers, but edits still act",
    )
    negative_prompt: str | list[str] | None = changed(Call, "negative_prompt", None)
    num_images_per_prompt: int | None = changed(
        Call, "images_per_prompt", 1, kind=OrNone(arguments(Call)["images_per_prompt"].kind)
    )
    seed: int | Sequence[int] | None = changed(
        Call,
        "seed",
        None,
        kind=SeedsOrGenerators(0, 2**32 - 1),
        help="the seed for the noise, instead of a generator. With a number s, the pictures get seeds s, s + 1, ...;"
        " a list gives one seed for each picture. Without a seed, generator or key, the seed is 0. JAX draws the noise,"
        " so diffusers generates the same picture only if it gets the same latents",
    )
    output_type: str = argument("pil", OutputType(*OUTPUTS), "the form of the pictures")
    return_dict: bool = argument(True, Flag(), "whether to return an output object instead of a tuple")
    callback: Callable[[int, float, np.ndarray], Any] | None = changed(Call, "callback", None)
    callback_steps: int = changed(Call, "callback_steps", 1)
    editing_prompt: str | Sequence[str] | None = argument(None, ConceptWords(), "the concepts, for all pictures")
    editing_prompt_embeddings: Any = argument(
        None,
        Opaque("an array [n, tokens, channels] for all prompts, or [prompts, n, tokens, channels]"),
        "n concepts as embeddings, or as the text conditioning returned by the native pipeline's `encode`; ignored if"
        " editing_prompt is given",
    )
    reverse_editing_direction: bool | Sequence[bool] | None = argument(
        False, PerConcept(Flag()), "whether to remove a concept instead of adding it"
    )
    edit_guidance_scale: float | Sequence[float] | None = argument(5, PerConcept(Real()), "the strength of a concept")
    edit_warmup_steps: int | Sequence[int] | None = argument(
        10, PerConcept(ModelCalls(0)), "the model call, counted from 0, at which a concept starts to act"
    )
    edit_cooldown_steps: int | Sequence[int | None] | None = argument(
        None,
        PerConcept(ModelCalls(0)),
        "the model call, counted from 0, at which a concept stops acting; None means never",
    )
    edit_threshold: float | Sequence[float] | None = argument(
        0.9, PerConcept(Real(0, 1)), "the fraction of each channel that a concept leaves unchanged"
    )
    edit_momentum_scale: float | None = argument(0.1, OrNone(Real(0, 1)), "the strength of the momentum, s_m")
    edit_mom_beta: float | None = argument(
        0.4, OrNone(Real(0, 1)), "the fraction of the momentum kept from one model call to the next, beta"
    )
    edit_weights: Sequence[float] | None = argument(None, PerConcept(Weight(0)), "the relative weights of the concepts")
    prompt_embeds: Any = argument(
        None,
        Opaque("an array [prompts, tokens, channels]"),
        "the prompts as embeddings, or as the text conditioning returned by the native pipeline's `encode`",
    )
    negative_prompt_embeds: Any = argument(
        None,
        Opaque("an array [prompts, tokens, channels], or [1, tokens, channels] for all prompts"),
        "the negative prompts as embeddings, or as the text conditioning returned by the native pipeline's `encode`",
    )
    key: jax.Array | None = changed(Call, "key", None)
    generator: Any = argument(
        None,
        Generators(),
        "seeded generators instead of seeds. JAX draws the noise, so the pictures differ from torch's. Each call"
        " advances the generators, so the next call generates different pictures",
    )
    return_guidance: bool = changed(
        Call, "record", False, help="whether to return the predictions and the guidance from every model call"
    )
    sem_guidance: Any = argument(
        None,
        Opaque("an array [calls, 1 or pictures, height / f, width / f, channels]"),
        "recorded guidance to add: `sem_guidance` from an earlier output",
    )
    progress: bool | None = changed(Call, "progress", None)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "embed" in field.name or field.name in ("latents", "image"):
                value = array(getattr(self, field.name), pictures="embed" not in field.name)
                object.__setattr__(self, field.name, value)
        check_arguments(self)
        sources = [name for name in ("seed", "generator", "key") if getattr(self, name) is not None]
        if len(sources) > 1:
            quantifier = "both" if len(sources) == 2 else "all"
            raise ValueError(f"{' and '.join(sources)} were {quantifier} given; give only one of them")

    @property
    def random(self) -> Any:
        """The generators or the key to use instead of `seed`, or None."""
        seeds = self.seed if isinstance(self.seed, list | tuple) else [self.seed]
        return self.seed if self.generator is None and any(map(is_generator, seeds)) else self.generator

    @property
    def step_end(self) -> Callable[..., Any] | None:
        """The function to call at the end of every step, or None."""
        return None

    @property
    def lora_scale(self) -> float:
        """The factor by which the weights of all LoRAs are multiplied."""
        return 1.0

    @property
    def steps(self) -> Any:
        """The native argument `steps`; None means the default."""
        return self.num_inference_steps

    @property
    def scale(self) -> float | list[float] | None:
        """The native argument `guidance_scale`, raised to at least 1; None means the default."""
        scale = self.guidance_scale
        if isinstance(scale, list | tuple):
            return [max(row_scale, 1.0) for row_scale in scale]
        return None if scale is None else max(scale, 1.0)

    def text(self, name: str, *, required: bool = False) -> Any:
        """Returns the prompts as strings, or the embeddings that were given instead. Returns None if neither was given.

        Args:
            name: "prompt" or "negative_prompt".
            required: whether strings or embeddings must be given.

        Raises:
            TypeError, ValueError: strings and embeddings are both given, or both missing although `required` is set, or
                the embeddings have the wrong type or shape.
        """
        words, embeddings = getattr(self, name), getattr(self, f"{name}_embeds")
        if words is not None and embeddings is not None:
            raise ValueError(f"{name} and {name}_embeds were both given; give only one of them")
        if embeddings is None:
            if words is None and required:
                raise TypeError(f"{name}=None should be a string or a list of strings; or give {name}_embeds instead")
            return words
        if isinstance(embeddings, Text):
            return embeddings
        axes = "(prompts, tokens, channels)"
        states = floating(f"{name}_embeds", embeddings, axes)
        if states.ndim != 3:
            raise ValueError(f"{name}_embeds has shape {states.shape}, expected {axes}")
        return states

    def concepts(self) -> list[Any]:
        """Returns the concepts as strings or embeddings: one list for all prompts, or one list per prompt.

        Raises:
            TypeError, ValueError: the embeddings have the wrong type or shape.
        """
        return list(self.editing_prompt) if self.editing_prompt else split(self.editing_prompt_embeddings)

    def edits(self, concepts: list[Any]) -> list[Any]:
        """Returns the native argument `edits` for `concepts`: one list for all prompts, or one list per prompt.

        Raises:
            ValueError: an argument has fewer entries than there are concepts.
        """
        if concepts and isinstance(concepts[0], list):
            return [self._edits(row) for row in concepts]
        return self._edits(concepts)

    def _edits(self, concepts: list[Any]) -> list[Edit]:
        reverse = self._entries("reverse_editing_direction", len(concepts), False)
        defaults = {field: one.default for field, one in arguments(Edit).items()}
        defaults |= {"threshold": THRESHOLD, "warmup": WARMUP}
        settings = {field: self._entries(name, len(concepts), defaults[field]) for name, field in _EDIT_FIELDS.items()}
        edits = [
            Edit(concept, **{field: entries[k] for field, entries in settings.items()})
            for k, concept in enumerate(concepts)
        ]
        return [
            dataclasses.replace(edit, scale=-edit.scale) if removes else edit
            for edit, removes in zip(edits, reverse, strict=True)
        ]

    def _entries(self, name: str, n: int, default: Any) -> list[Any]:
        """Returns a list with the values of an argument, one for each of the `n` concepts."""
        value = getattr(self, name)
        if name == "edit_weights" and value == []:  # as in diffusers, an empty list means the default
            value = None
        entries = value if isinstance(value, list) else [value] * n
        if len(entries) < n:
            raise ValueError(f"{name} has {len(entries)} entries for {n} concepts; give one per concept, or one value")
        if len(entries) > n > 0:
            warn(f"{name} has {len(entries)} entries for {n} concepts; the extra entries are ignored")
        return [default if entry is None else entry for entry in entries[:n]]

    def native(self, prompt: Any, negative_prompt: Any, concepts: list[Any]) -> dict[str, Any]:
        """Returns the arguments of the native call. Arguments that are None are omitted.

        Args:
            prompt, negative_prompt, concepts: the texts, as `text` and `concepts` return them.

        Raises:
            TypeError, ValueError: arguments contradict each other.
        """
        native = {
            **{name: getattr(self, name) for name in self.shared},
            "prompt": prompt,
            "edits": self.edits(concepts),
            "negative_prompt": negative_prompt,
            "images_per_prompt": self.num_images_per_prompt or 1,
            "steps": self.steps,
            "guidance_scale": self.scale,
            "momentum_scale": self.edit_momentum_scale,
            "momentum_beta": self.edit_mom_beta,
            "output": self.outputs[self.output_type],
            "record": self.return_guidance,
            "replay": self._replay(1 if isinstance(prompt, str) or not hasattr(prompt, "__len__") else len(prompt)),
            "strict": False,
        }
        return {name: value for name, value in native.items() if value is not None}

    def _replay(self, prompts: int) -> np.ndarray | None:
        if self.sem_guidance is None:
            return None
        rows, axes = prompts * (self.num_images_per_prompt or 1), "(calls, rows, height, width, channels)"
        guidance = floating("sem_guidance", self.sem_guidance, axes)
        if guidance.ndim != 5 or guidance.shape[1] not in (1, rows):
            raise ValueError(f"sem_guidance has shape {guidance.shape}, expected {axes} with {rows} rows, or 1 for all")
        return np.moveaxis(guidance, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionArguments(PipelineArguments):
    """The arguments of pipelines that denoise latents or pixels."""

    shared = (*PipelineArguments.shared, "eta")

    eta: float = changed(
        DiffusionCall,
        "eta",
        0.0,
        help="the fraction of fresh noise in DDIM and TCD; the default is 0, as in diffusers' pipelines. Other"
        " schedulers ignore it",
    )
    cross_attention_kwargs: Any = argument(None, LoraScale(), "the factor for the weights of loaded LoRAs in this call")

    @property
    def lora_scale(self) -> float:
        return 1.0 if self.cross_attention_kwargs is None else self.cross_attention_kwargs["scale"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentArguments(DiffusionArguments):
    """The arguments of pipelines that denoise the latents of an autoencoder."""

    shared = (*DiffusionArguments.shared, "latents", "image", "strength", "guidance_rescale")

    latents: Any = changed(DiffusionCall, "latents", None)
    image: Any = changed(StartingCall, "image", None, kind=Opaque(Pictures.noun))
    strength: float | None = changed(StartingCall, "strength", None)
    guidance_rescale: float = changed(DiffusionCall, "guidance_rescale", 0.0)
    callback_on_step_end: Any = argument(
        None,
        StepCallback(),
        "a function called after every step with (pipe, step, timestep, {'latents': array}); it cannot change the"
        " latents, but can end the call by setting pipe._interrupt = True",
    )
    callback_on_step_end_tensor_inputs: Any = argument(
        None, Unsupported("callbacks get only the latents; leave it out", (["latents"],)), "not supported"
    )
    sigmas: Any = argument(None, Unsupported("give timesteps, or choose a different scheduler"), "not supported")
    ip_adapter_image: Any = argument(None, Unsupported("sega_jax has no IP-Adapters; leave it out"), "not supported")
    ip_adapter_image_embeds: Any = argument(
        None, Unsupported("sega_jax has no IP-Adapters; leave it out"), "not supported"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.callback_on_step_end is not None and self.callback is not None:
            raise ValueError("callback and callback_on_step_end were both given; give only one of them")

    @property
    def step_end(self) -> Callable[..., Any] | None:
        return self.callback_on_step_end


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TimestepArguments(PipelineArguments):
    """The arguments of pipelines that accept timesteps."""

    timesteps: Sequence[int] | str | None = argument(
        None,
        Opaque("decreasing integers, or the name of one of DeepFloyd-IF's timestep lists"),
        "the timesteps, instead of a number of steps",
    )

    @property
    def steps(self) -> Any:
        return super().steps if self.timesteps is None else self.timesteps


def positional(*names: str) -> Callable[[type[T]], type[T]]:
    """Returns a class decorator that makes the named fields positional, in that order, and all others keyword-only.

    The decorator is needed because dataclasses put inherited fields first, but diffusers' pipelines order their
    arguments differently.
    """

    def decorate(cls: type[T]) -> type[T]:
        init, fields = cls.__init__, inspect.signature(cls).parameters

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if len(args) > len(names):
                raise TypeError(
                    f"{len(args)} positional arguments were given, expected at most {len(names)}; give the others by"
                    " name"
                )
            by_position = dict(zip(names, args, strict=False))
            if duplicates := [name for name in by_position if name in kwargs]:
                raise TypeError(f"{duplicates[0]} was given both by position and by name; give it only once")
            init(self, **by_position, **kwargs)

        parameters = [fields[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        parameters += [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in fields.items()
            if name not in names
        ]
        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return cls

    return decorate
