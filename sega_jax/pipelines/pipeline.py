"""The class `Pipeline`, which generates pictures from prompts.

A call passes through these functions: `Pipeline.__call__` turns the arguments into a `Call`, then into a `Batch`;
`run.run` encodes texts, runs the schedule in chunks and decodes pictures; `programs.advance` is the compiled program;
and `method.sample.sample` is the sampling loop.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sega_jax.method.arguments import arguments, takes, unknown_arguments
from sega_jax.pipelines import diffusers_names
from sega_jax.pipelines.batch import Batch, prepare
from sega_jax.pipelines.execution.compile_report import Compiled
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.loaded_checkpoint import LoadedCheckpoint
from sega_jax.pipelines.messages import collected
from sega_jax.pipelines.output import Output as Output
from sega_jax.pipelines.pure import PureCall, pure_call
from sega_jax.pipelines.run import compile_batch, run
from sega_jax.pipelines.saving import save
from sega_jax.pipelines.texts import join, read_words
from sega_jax.systems.base import System
from sega_jax.systems.call import Call
from sega_jax.systems.registry import families_with, in_words
from sega_jax.systems.sizes import state_shape


class Pipeline(LoadedCheckpoint):
    """A loaded checkpoint of any family, which generates pictures when called with a prompt and edits.

    Create one with `sega_jax.load`. `help(type(pipe).__call__)` lists the arguments of a call for the pipeline's
    family, and `sega_jax.Output` describes the result.

    The sampling program is compiled once for each combination of batch size, picture size, number of concepts,
    semantics, support and recording, either at the first such call or in advance by `compile`. Changing prompts, seeds
    or settings never triggers a recompilation. The pictures of a batch are distributed over the devices, so request at
    least as many pictures as there are devices.

    `Pipeline(system, ...)` creates a pipeline from components, for example from the `components` of another pipeline;
    see `LoadedCheckpoint`. The result is an instance of a subclass whose calls take the family's arguments.

    Raises:
        TypeError, ValueError: A component belongs to a different family, or the components do not fit together.

    Example:
        >>> import sega_jax
        >>> from sega_jax import Edit
        >>> pipe = sega_jax.load()
        >>> edits = [Edit("glasses", warmup=0), Edit("hat", scale=-4, warmup=1)]
        >>> out = pipe("a face with a hat", edits, seed=[3, 5], images_per_prompt=2, steps=2, progress=False)
        >>> [image.size for image in out.images]
        [(128, 128), (128, 128)]
        >>> other = sega_jax.Pipeline(**pipe.components)  # shares the weights and compiled programs
        >>> other.scheduler = "EulerDiscreteScheduler"
        >>> pipe.scheduler.name
        'DDIMScheduler'
    """

    _takes: ClassVar[System | None] = None

    def __new__(cls, system: System | None = None, *args: Any, **components: Any) -> "Pipeline":
        if cls._takes is None and isinstance(system, System):
            cls = pipeline_class(cls, system)
        elif isinstance(system, System) and system is not cls._takes:
            raise TypeError(f"{cls.__name__} does not support {system.title}; pass the components to sega_jax.Pipeline")
        return super().__new__(cls)

    def __call__(self, *args: Any, **arguments: Any) -> Output:
        """Generates pictures from the prompts, guided by the edits.

        The arguments depend on the family; `help(type(pipe).__call__)` lists them. The arguments that all families
        share (`sega_jax.Call`) include prompt, edits, negative_prompt, images_per_prompt, seed, steps, guidance_scale,
        height, width and output.

        Returns:
            The pictures and information about them.

        Raises:
            TypeError, ValueError: An argument is unknown or invalid. Raised before any model runs.
        """
        raise TypeError(
            "this Pipeline has no family; create a pipeline with sega_jax.load or Pipeline(**pipe.components)"
        )

    def _call(self, call: Call) -> Output:
        """Generates pictures from the prompts, guided by the edits.

        The settings that the checkpoint recommends (`pipe.recommended`) replace the defaults below.

        Returns:
            The pictures and information about them, one entry for each picture.

        Raises:
            TypeError, ValueError: An argument has the wrong type, number of entries or shape, or is out of range.
                Raised before any model runs.
        """
        with collected():
            return run(self, prepare(call, self))

    def _compile(self, call: Call) -> Compiled:
        """Compiles all programs for calls with these arguments, without generating pictures.

        Later calls with the same shapes need no compilation, even if their texts and numerical settings differ. For
        Paella, the length of the longest text must also be the same.

        A model call can skip a concept if no row needs it: after its cool-down or, without momentum, during its
        warm-up. Each smaller number of concepts needs a program of its own, which takes as long to compile as the
        program for all concepts. Therefore, pipelines skip concepts only if this method has compiled these programs.
        Skipping changes the results only by rounding. The settings that the checkpoint recommends
        (`pipe.recommended`) replace the defaults below.

        Returns:
            The programs, each with its compilation time in seconds and its temporary memory in bytes.

        Raises:
            TypeError, ValueError: As for a call.
        """
        with collected():
            return compile_batch(self, prepare(call, self))

    def compile(self, *args: Any, **arguments: Any) -> Compiled:
        """Compiles all programs for calls with these arguments; `help(type(pipe).compile)` lists the arguments."""
        raise TypeError(
            "this Pipeline has no family; create a pipeline with sega_jax.load or Pipeline(**pipe.components)"
        )

    def prepare(self, *args: Any, **arguments: Any) -> Batch:
        """Checks the arguments of a call without running it, and returns the call's batch.

        Raises:
            TypeError, ValueError: As for a call.
        """
        unknown_arguments(self.system.call, list(arguments), f"a call of {self.system.title}", _elsewhere)
        with collected():
            return prepare(self.system.call(*args, **{**self.recommended.call, **arguments}), self)

    def as_function(self, *args: Any, **arguments: Any) -> PureCall:
        """Returns a pure function of arrays that computes a call's pictures, and the function's arguments.

            function, arguments = pipe.as_function("a cat", Edit("glasses"), steps=20)
            pictures = jax.jit(function)(**arguments)  # float32 [pictures, height, width, 3] in [0, 1]

        The function calls `sega_jax.systems.programs.generate`. `jax.jit` and `jax.export` can be applied to it for
        every family. Up to rounding, it returns the same pictures as the call, but no safety checker checks them.
        On CPUs, the default is to predict one row at a time; set `rows_at_once` when you export from a CPU for an
        accelerator.

        The settings of the edits are arrays in `arguments["settings"].edits`, such as `scale` [pictures, concepts], so
        the function is differentiable with respect to them. For Paella, which chooses discrete tokens, the gradients
        are zero.

        Returns:
            A named tuple of the function and its arguments, {name: argument}.

        Raises:
            TypeError, ValueError: The call is invalid, or requests results other than pictures.
        """
        batch = self.prepare(*args, **arguments)
        with collected():
            return pure_call(self, batch)

    def encode(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Encodes texts as text conditioning, which calls accept in place of strings.

        Args:
            texts: A string, or a list of strings.
            options: The arguments of a call that affect the encoding, such as long_prompts, weighted and clip_skip for
                Stable Diffusion and SDXL. SDXL also accepts `second`, a different text for its second text encoder: one
                string for all texts, or a list with one string for each text.

        Returns:
            A `Text` of the family's type, with one row for each text.

        Raises:
            TypeError: `texts` is neither a string nor a non-empty list of strings, or an option is unknown or has the
                wrong type.
            ValueError: The pipeline has no text encoder or tokenizer, or an option has an invalid value.
        """
        words: list[Any] = [texts] if isinstance(texts, str) or not hasattr(texts, "__iter__") else list(texts)
        if not words or not all(isinstance(text, str) for text in words):
            raise TypeError(f"texts={words!r} should be a string or a non-empty list of strings")
        parameters = inspect.signature(self.system.text.read).parameters.values()
        known = [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                takes_them = f"takes {', '.join(known)}" if known else "takes none"
                raise TypeError(f"encode: {name} is not an option of {self.system.title}, which {takes_them}")
        declared = arguments(self.system.call)
        reading = {name: declared[name].check(value) for name, value in options.items() if name in declared}
        networks = self.system.text.networks(self.models)
        if networks is not None:
            self.system.text.check_options(networks, reading)
        with collected():
            return join(self, read_words(self, words, {**options, **reading}), reading)

    def save(self, folder: str | Path, *, progress: bool | None = None) -> Path:
        """Saves the pipeline as a checkpoint in diffusers layout, which `load` can read.

        See `sega_jax.pipelines.saving.save`.
        """
        return save(self, folder, progress)

    def __getattr__(self, name: str) -> Any:
        advice = diffusers_names.attribute(name)
        why = "" if advice is None else f", which is diffusers' name; {advice}"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{why}", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in diffusers_names.ATTRIBUTES:
            raise AttributeError(f"{name} is diffusers' name; {diffusers_names.ATTRIBUTES[name]}")
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> "Pipeline":
        """Raises a TypeError that names the replacement for diffusers' method."""
        raise TypeError(f"from_pretrained is diffusers' name; {diffusers_names.LOADERS['from_pretrained']}")

    @classmethod
    def from_single_file(cls, *args: Any, **options: Any) -> "Pipeline":
        """Raises a TypeError that names the replacement for diffusers' method."""
        raise TypeError(f"from_single_file is diffusers' name; {diffusers_names.LOADERS['from_single_file']}")

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Returns the shape of a picture's state during sampling, (height, width, channels).

        Args:
            height, width: The size of the picture in pixels; None means the checkpoint's default.

        Raises:
            TypeError, ValueError: A size is not a positive multiple of the checkpoint's factor, or is None for a family
                whose picture size depends on a low-resolution picture.
        """
        return state_shape(self.system.sampler.sizes(self.models), height, width)


def _elsewhere(argument: str) -> str | None:
    """Returns advice for an argument that a family's calls do not accept; None if there is no advice."""
    if titles := families_with(argument):
        return f"leave it out. It is supported by {in_words(titles)}"
    if argument in arguments(LoadOptions):
        return "pass it to sega_jax.load"
    return diffusers_names.ARGUMENTS.get(argument)


_classes: dict[tuple[type, int], type[Pipeline]] = {}


def pipeline_class(base: type[Pipeline], system: System) -> type[Pipeline]:
    """Returns a subclass of `base` whose `__call__` and `compile` take a family's arguments."""
    if (base, id(system)) in _classes:
        return _classes[base, id(system)]
    call_name = f"a call of {system.title}"
    name = "".join(part.capitalize() for part in system.name.split("_"))
    methods = {}
    for public, method in (("__call__", base._call), ("compile", base._compile)):
        if getattr(base, public) is getattr(Pipeline, public):  # a subclass may override these methods
            methods[public] = takes(system.call, call_name, _elsewhere, lambda pipe: pipe.recommended.call)(method)
            methods[public].__name__ = public
            methods[public].__qualname__ = f"{base.__name__}.{public}"
    members = {
        **methods,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "_takes": system,
    }
    subclass = type(f"{name}{base.__name__}", (base,), members)
    _classes[base, id(system)] = subclass
    return subclass
