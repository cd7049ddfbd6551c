"""Prompts to pictures: the `Pipeline` that `sega_jax.load` makes.

The way of a call: `Pipeline.__call__` (arguments, a `Call`, a `Batch`) -> `run.run` (text, start, the schedule in
chunks, pictures) -> `programs.advance` (compiled) -> `method.sample.sample` (the loop).
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
    """A loaded checkpoint of any family. Call it with a prompt and edits; `load` makes it.

    A program is compiled once for a batch size, picture size, number of concepts and choice of semantics, support and
    recording, at the first call or by `compile`. Changing prompts, seeds or settings never recompiles. Rows are spread
    over the devices: fewer pictures than devices leave some of them idle, so ask for several seeds at once.

    `Pipeline(system, ...)` makes an instance of a subclass whose call has the family's arguments. `LoadedCheckpoint`
    documents the components.

    Raises:
        TypeError, ValueError: a component is of another family, or components do not fit each other.
    """

    _takes: ClassVar[System | None] = None

    def __new__(cls, system: System | None = None, *args: Any, **components: Any) -> "Pipeline":
        if cls._takes is None and isinstance(system, System):
            cls = pipeline_class(cls, system)
        elif isinstance(system, System) and system is not cls._takes:
            raise TypeError(f"{cls.__name__} takes no components of {system.title}; give them to sega_jax.Pipeline")
        return super().__new__(cls)

    def __call__(self, *args: Any, **arguments: Any) -> Output:
        """Makes pictures of the prompts and guides them by the edits; see the signature of `type(pipe).__call__`."""
        raise TypeError("Pipeline is made by sega_jax.load, or by Pipeline(**pipe.components) of another one")

    def _call(self, call: Call) -> Output:
        """Makes pictures of the prompts and guides them by the edits.

        Raises:
            TypeError, ValueError: an argument is of another type, number, shape or range; nothing ran.
        """
        with collected():
            return run(self, prepare(call, self))

    def _compile(self, call: Call) -> Compiled:
        """Compiles all that a call with these arguments needs, without a model call; a later one compiles nothing.

        Words and numbers may be any, but for Paella, where the longest text counts. Beside the program for all n
        concepts there is one for each fewer number that some model call of the schedule has to predict, where concepts
        are past their cool-down in all rows, or without momentum not yet at their warm-up. These take as long to
        compile as the first, so calls use them only where they are prepared, with equal results but for rounding.

        Returns:
            The programs, with the seconds that each took to compile and the bytes of temporary memory that it takes.

        Raises:
            TypeError, ValueError: as a call.
        """
        with collected():
            return compile_batch(self, prepare(call, self))

    def compile(self, *args: Any, **arguments: Any) -> Compiled:
        """Compiles all that a call with these arguments needs; see `type(pipe).compile`."""
        raise TypeError("Pipeline is made by sega_jax.load, or by Pipeline(**pipe.components) of another one")

    def prepare(self, *args: Any, **arguments: Any) -> Batch:
        """Checks the arguments of a call, and runs nothing.

        Raises:
            TypeError, ValueError: as a call.
        """
        unknown_arguments(self.system.call, list(arguments), f"a call of {self.system.title}", _elsewhere)
        with collected():
            return prepare(self.system.call(*args, **arguments), self)

    def as_function(self, *args: Any, **arguments: Any) -> PureCall:
        """Returns a call as one pure function of arrays and the function's arguments, for research and export.

            function, arguments = pipe.as_function("a cat", Edit("glasses"), steps=20)
            pictures = jax.jit(function)(**arguments)  # float32 [pictures, height, width, 3] in [0, 1]

        The function is `sega_jax.systems.programs.generate`, which jit and export take for every family. The pictures
        are those of the call, up to rounding. No safety checker sees them. A CPU predicts one row at a time, so to
        lower it there for an accelerator, give `rows_at_once`.

        The numbers of the edits are arrays in `arguments["settings"].edits`, such as `scale` [pictures, concepts], so
        the function can be differentiated by them. Paella chooses tokens, so its pictures have gradients of zero.

        Raises:
            TypeError, ValueError: as a call; or the call asks for something besides pictures.
        """
        batch = self.prepare(*args, **arguments)
        with collected():
            return pure_call(self, batch)

    def encode(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Returns the conditioning of texts, a `Text` of the family's own type with one row for each.

        Args:
            texts: words, or a list.
            options: how they are read: arguments of a call that say so, such as long_prompts, weighted and
                clip_skip for Stable Diffusion and SDXL; and for SDXL `second`, texts for its second text encoder
                where that reads others, one for all or one each.

        Raises:
            TypeError: it is not words or a non-empty list of them, or an option is unknown or of another type.
            ValueError: there is no text encoder, or an option has a wrong value.
        """
        words: list[Any] = [texts] if isinstance(texts, str) or not hasattr(texts, "__iter__") else list(texts)
        if not words or not all(isinstance(text, str) for text in words):
            raise TypeError(f"texts={words!r} should be a string or a non-empty list of strings")
        parameters = inspect.signature(self.system.text.read).parameters.values()
        known = [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                takes_them = f"takes {', '.join(known)}" if known else "takes none"
                raise TypeError(f"encode: {name} is no option of {self.system.title}, which {takes_them}")
        declared = arguments(self.system.call)
        reading = {name: declared[name].check(value) for name, value in options.items() if name in declared}
        networks = self.system.text.networks(self.models)
        if networks is not None:
            self.system.text.check_options(networks, reading)
        with collected():
            return join(self, read_words(self, words, {**options, **reading}), reading)

    def save(self, folder: str | Path, *, progress: bool | None = None) -> Path:
        """Writes a checkpoint in diffusers layout, from which `load` makes an equal pipeline; see
        `sega_jax.pipelines.saving.save`."""
        return save(self, folder, progress)

    def __getattr__(self, name: str) -> Any:
        hint = diffusers_names.attribute(name)
        why = "" if hint is None else f", which is diffusers' name; {hint}"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{why}", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in diffusers_names.ATTRIBUTES:
            raise AttributeError(f"{name} is diffusers' name; {diffusers_names.ATTRIBUTES[name]}")
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> "Pipeline":
        """Says what to write in place of diffusers' method."""
        raise TypeError(f"from_pretrained is diffusers' name; {diffusers_names.LOADERS['from_pretrained']}")

    @classmethod
    def from_single_file(cls, *args: Any, **options: Any) -> "Pipeline":
        """Says what to write in place of diffusers' method."""
        raise TypeError(f"from_single_file is diffusers' name; {diffusers_names.LOADERS['from_single_file']}")

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Returns (height, width, channels) of the state of a picture of this size in pixels.

        Raises:
            TypeError, ValueError: a size that is not a positive multiple of the checkpoint's factor, or none where
                a low-resolution picture decides it.
        """
        return state_shape(self.system.sampler.sizes(self.models), height, width)


def _elsewhere(argument: str) -> str | None:
    """Returns what takes an argument that the calls of a family do not have; None where nothing does."""
    if titles := families_with(argument):
        return f"leave it out, as it is for {in_words(titles)}"
    if argument in arguments(LoadOptions):
        return "give it to sega_jax.load"
    return diffusers_names.ARGUMENTS.get(argument)


_classes: dict[tuple[type, int], type[Pipeline]] = {}


def pipeline_class(base: type[Pipeline], system: System) -> type[Pipeline]:
    """Returns the subclass of a pipeline whose call and `compile` have a family's arguments."""
    if (base, id(system)) in _classes:
        return _classes[base, id(system)]
    what = f"a call of {system.title}"
    name = "".join(part.capitalize() for part in system.name.split("_"))
    methods = {}
    for public, method in (("__call__", base._call), ("compile", base._compile)):
        if getattr(base, public) is getattr(Pipeline, public):  # else a subclass has its own
            methods[public] = takes(system.call, what, _elsewhere)(method)
            methods[public].__name__ = public
            methods[public].__qualname__ = f"{base.__name__}.{public}"
    members = {
        **methods,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "_takes": system,
    }
    made = type(f"{name}{base.__name__}", (base,), members)
    _classes[base, id(system)] = made
    return made
