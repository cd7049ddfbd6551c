"""Defines the `sega-jax edit` options that name a cascade's later stages and control how all its stages run."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cli.options import bracketed, command_words, default_of, option, parsed, shell_arguments
from sega_jax.method.arguments import arguments
from sega_jax.method.naming import of_stage
from sega_jax.pipelines import sources
from sega_jax.pipelines.cascade import FIRST, SHARED, load_cascade
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.systems.base import System
from sega_jax.systems.registry import starting_systems
from sega_jax.text import caption_cleaning

# Arguments of a later stage that the cascade sets.
_OWN = (*SHARED, "negative_prompt", "images_per_prompt", "seed", "height", "width", "image")
# The number of pictures that a stage processes at once with --low-memory: the pictures of one seed, with and without
# edits.
_LOW_MEMORY_ROWS = 2
# The options for whole cascades.
OTHERS = ("edited", "clean_captions", "low_memory")


def later_stages() -> dict[str, System]:
    """Returns {name: stage} for the later stages of all cascades."""
    stages: dict[str, System] = {}
    for system in starting_systems():
        stages |= system.stages
    return stages


def stage_arguments(system: System) -> dict[str, Any]:
    """Returns {name: argument} for the arguments of a later stage that have a shell option."""
    return {name: one for name, one in shell_arguments(system.call).items() if name not in _OWN}


def options() -> list[click.Option]:
    """Returns the options for cascades."""
    listed = []
    for stage, system in later_stages().items():
        listed += [
            click.Option(
                [f"--{stage}"],
                metavar="MODEL",
                help=f"The checkpoint of {system.title}, which enlarges the pictures.",
            ),
            click.Option([f"--{stage}-revision"], help="Like --revision, for this stage."),
            click.Option([f"--{stage}-scheduler"], help="Like --scheduler, for this stage."),
        ]
        for one in stage_arguments(system).values():
            help = f"Like {one.option}, for this stage.{bracketed([default_of(one)], one.kind.range)}"
            listed.append(option(one, prefix=f"{stage}-", help=help))
    stages = click.Choice([FIRST, *later_stages()])
    listed += [
        click.Option(
            ["--edited"],
            multiple=True,
            type=stages,
            help=f"A stage in which the edits act. May be given several times.  [default: {FIRST}]",
        ),
        click.Option(
            ["--clean-captions"],
            is_flag=True,
            default=None,
            help="Clean the prompt and the concepts in the same way as the captions that the model was trained with.",
        ),
        click.Option(
            ["--low-memory"],
            is_flag=True,
            default=None,
            help="Keep only one network in memory at a time, which takes longer.",
        ),
    ]
    return listed


def names() -> list[str]:
    """Returns the names of the parameters that this module's options provide."""
    return [one.name or "" for one in options()]


def check(given: Mapping[str, Any]) -> None:
    """Checks the options for cascades as far as possible without reading a checkpoint.

    Args:
        given: {parameter: value} for the options that were given.

    Raises:
        TypeError, ValueError: a number is out of range, a scheduler is unknown, or an option belongs to a stage that
            was not given.
        ImportError: --clean-captions needs libraries that are not installed.
    """
    for stage, system in later_stages().items():
        values = _of_stage(given, stage)
        parsed(system.call, {name: values[name] for name in values if name in stage_arguments(system)}, f"{stage}-")
        if "scheduler" in values:
            with of_stage(stage):
                checked_scheduler(values["scheduler"])
        listed = [f"--{stage}-{name.replace('_', '-')}" for name in values]
        listed += [f"--edited {stage}"] * (stage in given.get("edited", ()))
        if listed and stage not in given:
            raise ValueError(
                f"{listed[0]} is given without --{stage}; name that stage's checkpoint, or leave {listed[0]} out"
            )
    cascades = [list(system.stages) for system in starting_systems()]
    for stage in later_stages():
        before = [names[names.index(stage) - 1] for names in cascades if stage in names[1:]]
        if stage in given and before and not any(name in given for name in before):
            raise ValueError(f"--{stage} is given without --{before[0]}, whose pictures it enlarges; give both")
    if given.get("clean_captions"):
        caption_cleaning.check()


def _of_stage(given: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns {name without the stage's prefix: value} for the options of a stage."""
    return {name.removeprefix(f"{stage}_"): value for name, value in given.items() if name.startswith(f"{stage}_")}


def check_family(system: System, model: str, given: Mapping[str, Any], *, image: bool = False) -> None:
    """Checks that a command can start with this model, and that the model supports the given options for cascades.

    Args:
        model: the checkpoint's name, for error messages.
        image: whether the command names a picture. If so, the model can be a later stage, which enlarges this picture.

    Raises:
        ValueError: the model is a later stage but no picture is given, or an option applies only to cascades but the
            model is not the first stage of a cascade.
    """
    for stage, later in later_stages().items():
        if later is system and not image:
            first = " or ".join(one.title for one in starting_systems())
            raise ValueError(
                f"{model} is {system.title}, which enlarges pictures: give it as --{stage}, with {first} as --model; or"
                " name a small picture with --image"
            )
    if given and not system.stages:
        name = next(iter(given)).replace("_", "-")
        first = " and ".join(one.title.removesuffix(" first stage") for one in starting_systems())
        raise ValueError(f"--{name} applies only to {first} cascade, but {model} is {system.title}; leave it out")


def check_load(system: System, model: str, given: Mapping[str, Any]) -> None:
    """If the model is the first stage of a cascade, checks that cascades support the given options of `load`.

    Raises:
        ValueError: cascades do not support an option.
    """
    # `load_cascade` accepts a revision and a scheduler for each stage.
    known = {*inspect.signature(load_cascade).parameters, "revision", "scheduler"}
    for name in given:
        if system.stages and name not in known:
            raise ValueError(
                f"--{name.replace('_', '-')} is not supported for cascades, but {model} is {system.title}; leave it out"
            )


def located(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options in a form that works in any folder, with absolute paths and with commits for hub names.

    Raises:
        FileNotFoundError, CheckpointError: the path given for a stage does not exist or is not a checkpoint.
    """
    located = dict(given)
    for stage in later_stages():
        if stage in given:
            with of_stage(stage):
                source = sources.find(given[stage], given.get(f"{stage}_revision"))
            place, revision = sources.place(source)
            located |= {stage: place} | ({} if revision is None else {f"{stage}_revision": revision})
        if f"{stage}_scheduler" in given:
            located[f"{stage}_scheduler"] = absolute_path(given[f"{stage}_scheduler"])
    return located


def absolute_path(scheduler: str | None) -> str | None:
    """Returns the absolute path of a scheduler's folder. Class names and None are returned unchanged."""
    if scheduler is None or not Path(scheduler).expanduser().exists():
        return scheduler
    return str(Path(scheduler).expanduser().resolve())


def load(
    model: str, revision: str | None, given: Mapping[str, Any], *, scheduler: Any, **common: Any
) -> tuple[Pipeline, Callable[..., Output]]:
    """Returns the first stage's pipeline, and a function that takes the arguments of a call and runs all stages.

    Args:
        model, revision: the first stage's checkpoint.
        given: the options of the later stages.
        scheduler: the first stage's scheduler; if None, the checkpoint's scheduler is kept.
        common: other arguments for `load_cascade`.
    """
    later = {stage: system for stage, system in later_stages().items() if stage in given}
    cascade = load_cascade(
        model,
        further={stage: given[stage] for stage in later},
        low_memory=bool(given.get("low_memory")),
        revisions={FIRST: revision} | {stage: given.get(f"{stage}_revision") for stage in later},
        schedulers={FIRST: scheduler} | {stage: given.get(f"{stage}_scheduler") for stage in later},
        **common,
    )

    first = cascade.stages[FIRST].outline
    fewer: dict[str, Any] = {}
    if given.get("low_memory") and first.devices.devices[0].platform != "cpu":
        # With --low-memory, groups of seeds are larger, so stages split them. CPUs process one picture at a time
        # anyway.
        fewer["rows_at_once"] = _LOW_MEMORY_ROWS

    def make(prompt: list[str], edits: list, *, seed: list[int], negative_prompt: Any = None, **call: Any) -> Output:
        stages: dict[str, Any] = {FIRST: _taken(first.system, fewer) | call}
        for stage, system in later.items():
            chosen, declared = _of_stage(given, stage), stage_arguments(system)
            values = parsed(system.call, {name: chosen[name] for name in chosen if name in declared}, f"{stage}-")
            shared = {name: call[name] for name in SHARED if name in call}
            stages[stage] = _taken(system, fewer) | shared | values
        edited = given.get("edited") or (FIRST,)
        clean = bool(given.get("clean_captions"))
        return cascade(prompt, edits, seed=seed, negative_prompt=negative_prompt, edited=edited, clean=clean, **stages)

    return first, make


def _taken(system: System, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a family's calls accept."""
    return {name: value for name, value in options.items() if name in arguments(system.call)}


def words(known: Mapping[str, Any]) -> list[str]:
    """Returns the command-line arguments that set the given options."""
    words: list[str] = []
    for stage, system in later_stages().items():
        for name in (stage, f"{stage}_revision", f"{stage}_scheduler"):
            if known.get(name) is not None:
                words += [f"--{name.replace('_', '-')}", known[name]]
        words += command_words(system.call, known, {}, f"{stage}-")
    for stage in known.get("edited") or ():
        words += ["--edited", stage]
    return words + [f"--{name.replace('_', '-')}" for name in OTHERS[1:] if known.get(name)]
