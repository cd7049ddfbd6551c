"""The options of `sega-jax edit` for cascades: further stages, and how all of them are run."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cli.options import command_words, option, parsed, shell_arguments
from sega_jax.method.arguments import arguments
from sega_jax.pipelines import sources
from sega_jax.pipelines.cascade import FIRST, SHARED, load_cascade
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.systems.base import System
from sega_jax.systems.registry import starting_systems
from sega_jax.text import caption_cleaning

# What the cascade gives each stage itself.
_OWN = (*SHARED, "negative_prompt", "images_per_prompt", "seed", "height", "width", "image")
# Pictures that a stage predicts at once with --low-memory: one seed's, without and with edits.
_LOW_MEMORY_ROWS = 2
_OTHERS = ("edited", "clean_captions", "low_memory")


def later_stages() -> dict[str, System]:
    """Returns the stages after the first of all cascades, by name."""
    found: dict[str, System] = {}
    for system in starting_systems():
        found |= system.stages
    return found


def stage_arguments(system: System) -> dict[str, Any]:
    """Returns the arguments of a later stage that have a shell option."""
    return {name: one for name, one in shell_arguments(system.call).items() if name not in _OWN}


def options() -> list[click.Option]:
    """Returns the options of cascades."""
    titles = ", ".join(system.title for system in starting_systems())
    found = []
    for stage, system in later_stages().items():
        found += [
            click.Option(
                [f"--{stage}"],
                metavar="MODEL",
                help=f"The checkpoint of {system.title}, which enlarges the pictures. Only for {titles}.",
            ),
            click.Option([f"--{stage}-revision"], help=f"As --revision, for {system.title}."),
            click.Option([f"--{stage}-scheduler"], help=f"As --scheduler, for {system.title}."),
        ]
        for one in stage_arguments(system).values():
            default = (
                "" if one.default is None or one.default is False else f"  [default: {one.kind.show(one.default)}]"
            )
            help = f"As {one.option}, for {system.title}.{default}"
            found.append(option(one, prefix=f"{stage}-", help=help))
    stages = click.Choice([FIRST, *later_stages()])
    found += [
        click.Option(
            ["--edited"],
            multiple=True,
            type=stages,
            help=f"A stage that the edits guide. May be given several times. Only for {titles}.  [default: {FIRST}]",
        ),
        click.Option(
            ["--clean-captions"],
            is_flag=True,
            default=None,
            help=f"Clean the texts as the captions of the training data were. Only for {titles}.",
        ),
        click.Option(
            ["--low-memory"],
            is_flag=True,
            default=None,
            help=f"Keep only one network in memory at a time. Only for {titles}.",
        ),
    ]
    return found


def names() -> list[str]:
    """Returns the parameters of these options."""
    return [one.name or "" for one in options()]


def check(given: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Args:
        given: the options that were given, by their parameters.

    Raises:
        TypeError, ValueError: a number out of range, an unknown scheduler, or an option of a stage that is not there.
        ImportError: captions are to be cleaned, and what cleans them is not installed.
    """
    for stage, system in later_stages().items():
        values = _of_stage(given, stage)
        parsed(system.call, {name: values[name] for name in values if name in stage_arguments(system)}, f"{stage}-")
        if "scheduler" in values:
            checked_scheduler(values["scheduler"])
        listed = [f"--{stage}-{name.replace('_', '-')}" for name in values]
        listed += [f"--edited {stage}"] * (stage in given.get("edited", ()))
        if listed and stage not in given:
            raise ValueError(f"{listed[0]} is given without --{stage}; name its checkpoint, or leave it out")
    cascades = [list(system.stages) for system in starting_systems()]
    for stage in later_stages():
        before = [names[names.index(stage) - 1] for names in cascades if stage in names[1:]]
        if stage in given and before and not any(name in given for name in before):
            raise ValueError(f"--{stage} is given without --{before[0]}, whose pictures it enlarges; give both")
    if given.get("clean_captions"):
        caption_cleaning.check()


def _of_stage(given: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns the options of a stage by their names without the stage's."""
    return {name.removeprefix(f"{stage}_"): value for name, value in given.items() if name.startswith(f"{stage}_")}


def check_family(system: System, model: str, given: Mapping[str, Any], *, image: bool = False) -> None:
    """Checks that a command can begin with this model, and has these options.

    Args:
        image: whether the command names a picture, which a later stage can enlarge alone.

    Raises:
        ValueError: it cannot.
    """
    for stage, later in later_stages().items():
        if later is system and not image:
            first = " or ".join(one.title for one in starting_systems())
            raise ValueError(
                f"{model} is {system.title}, which makes a small picture larger: give it as --{stage}, and {first} as"
                " --model; or name a small picture with --image"
            )
    if given and not system.stages:
        name = next(iter(given)).replace("_", "-")
        first = " and ".join(one.title.removesuffix(" first stage") for one in starting_systems())
        raise ValueError(f"--{name} is of {first} cascade, but {model} is {system.title}; leave it out")


def check_load(system: System, model: str, given: Mapping[str, Any]) -> None:
    """Checks that a cascade, if the model begins one, takes these options of `load`.

    Raises:
        ValueError: it does not.
    """
    # It takes the others by stage.
    known = {*inspect.signature(load_cascade).parameters, "revision", "scheduler"}
    for name in given:
        if system.stages and name not in known:
            raise ValueError(
                f"--{name.replace('_', '-')} is not of cascades, but {model} is {system.title}; leave it out"
            )


def located(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options as a command can repeat them anywhere: folders by their whole path, and of what is on the hub
    the commit.

    Raises:
        FileNotFoundError, CheckpointError: a stage is no checkpoint.
    """
    found = dict(given)
    for stage in later_stages():
        if stage in given:
            source = sources.find(given[stage], given.get(f"{stage}_revision"))
            place, revision = sources.place(source)
            found |= {stage: place} | ({} if revision is None else {f"{stage}_revision": revision})
        if f"{stage}_scheduler" in given:
            found[f"{stage}_scheduler"] = whole_path(given[f"{stage}_scheduler"])
    return found


def whole_path(scheduler: str | None) -> str | None:
    """Returns a scheduler's folder by its whole path; names of classes and None as they are."""
    if scheduler is None or not Path(scheduler).expanduser().exists():
        return scheduler
    return str(Path(scheduler).expanduser().resolve())


def load(
    model: str, revision: str | None, given: Mapping[str, Any], *, scheduler: Any, **common: Any
) -> tuple[Pipeline, Callable[..., Output]]:
    """Returns the first stage, and a function that makes pictures as its call would, but with all stages.

    Args:
        model, revision: the first stage.
        given: the options of the stages.
        scheduler: of the first stage.
        common: as of `load_cascade`, also LoRAs and words by stage.
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
        # Groups of seeds are larger with --low-memory; CPUs predict one picture at a time anyway.
        fewer["rows_at_once"] = _LOW_MEMORY_ROWS

    def make(prompt: list[str], edits: list, *, seed: list[int], negative_prompt: Any = None, **call: Any) -> Output:
        stages: dict[str, Any] = {FIRST: _taken(first.system, fewer) | call}
        for stage, system in later.items():
            own, declared = _of_stage(given, stage), stage_arguments(system)
            values = parsed(system.call, {name: own[name] for name in own if name in declared}, f"{stage}-")
            shared = {name: call[name] for name in SHARED if name in call}
            stages[stage] = _taken(system, fewer) | shared | values
        edited = given.get("edited") or (FIRST,)
        clean = bool(given.get("clean_captions"))
        return cascade(prompt, edits, seed=seed, negative_prompt=negative_prompt, edited=edited, clean=clean, **stages)

    return first, make


def _taken(system: System, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a family's calls have."""
    return {name: value for name, value in options.items() if name in arguments(system.call)}


def words(known: Mapping[str, Any]) -> list[str]:
    """Returns the words of a command that give these options."""
    found: list[str] = []
    for stage, system in later_stages().items():
        for name in (stage, f"{stage}_revision", f"{stage}_scheduler"):
            if known.get(name) is not None:
                found += [f"--{name.replace('_', '-')}", known[name]]
        found += command_words(system.call, known, {}, f"{stage}-")
    for stage in known.get("edited") or ():
        found += ["--edited", stage]
    return found + [f"--{name.replace('_', '-')}" for name in _OTHERS[1:] if known.get(name)]
