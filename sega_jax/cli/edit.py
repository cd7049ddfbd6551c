"""`sega-jax edit`: makes pictures from a prompt, each with and without edits, and a sheet that shows all of them."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from sega_jax.cli import adapters, animation, animation_run, stages
from sega_jax.cli.concepts import check_known, describe, parse_edit
from sega_jax.cli.edit_options import EditCommand
from sega_jax.cli.edit_run import SEEDS, Job, most_seeds, run, seeds_of
from sega_jax.cli.options import (
    OF_THIS_MACHINE,
    check_early,
    check_family,
    load_arguments,
    parsed,
    plain,
    shell_arguments,
)
from sega_jax.cli.terminal import echo, json_on_stdout, json_option, remember_compilations, versions, writable
from sega_jax.method.arguments import arguments
from sega_jax.method.guidance import Edit
from sega_jax.method.naming import assignment
from sega_jax.pipelines import loading, sources
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import plainly
from sega_jax.systems.base import System
from sega_jax.systems.images import read as read_picture
from sega_jax.systems.images import to_image
from sega_jax.systems.sizes import shape_from


class Command(NamedTuple):
    """The options that were given to `edit`, as text, grouped by the part of the program that reads them."""

    call: dict[str, Any]
    stages: dict[str, Any]
    load: dict[str, Any]
    adapters: dict[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Command":
        given = {name: value for name, value in options.items() if value not in (None, ()) and value is not False}
        # For flags that are on by default, False is kept, because it means that the user turned them off.
        given |= {
            name: False for name, one in load_arguments().items() if one.default is True and options[name] is False
        }

        def chosen(names):
            return {name: value for name, value in given.items() if name in names}

        load, later, files = chosen(load_arguments()), chosen(stages.names()), chosen(adapters.names())
        call = {name: value for name, value in given.items() if name not in {**load, **later, **files}}
        return cls(call, later, load, files)


@click.command("edit", cls=EditCommand, options_metavar="--prompt TEXT [--edit CONCEPT]... [OPTIONS]")
@json_option(
    "pictures (file, seed, kind, flagged and finite of each picture), sheet (its file or null), settings (as stored),"
    " compile_seconds and run_seconds"
)
def edit(model: str | None, prompt: str, edits: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Makes pictures with and without edits.

    The pictures without edits and with edits are written to a folder, with a sheet that shows all of them. Every file
    stores its settings: `sega-jax info FILE` prints them, and the command that reproduces the file.

    \b
    Examples:
      sega-jax edit --prompt "a portrait of a sad woman" --edit smile --seed 5-8
      sega-jax edit --prompt "a portrait of a man" --edit "-beard:scale=6"
    """
    with plainly(), json_on_stdout(as_json) as write_json:
        of_animation = animation.pop_options(options)
        given = Command.of(options)
        if model is None and "revision" in given.load:
            raise ValueError(
                f"{assignment('--revision', given.load['revision'])} needs a repository on the hub; name it with"
                " --model, or leave --revision out"
            )
        seeds = _check_early(given)
        concepts = [parse_edit(text) for text in edits]
        moving = animation.read(of_animation, edits, concepts, image="image" in given.call)
        if model is None:
            for one in concepts:
                check_known(one)
        folder = writable(Path(out))
        config = given.load.get("config")
        source = sources.find(
            loading.DEMO if model is None else model, given.load.get("revision"), config, given=given.load
        )
        given = _located(given, source, model)
        name = "the demo model" if model is None else model
        _check_family(source.system, name, given)
        if moving is not None:
            moving.check_family(source.system, name)
        call = {name: value for name, value in given.call.items() if name not in SEEDS}
        call = parsed(source.system.call, call)
        remember_compilations()
        pipe, make = _load(source, model, given, name)
        job = _job(pipe, prompt, concepts, seeds, call, given, moving)
        job = job._replace(known={"model": None if model is None else sources.place(source)[0], **job.known})
        most = most_seeds(len(pipe.devices), bool(given.stages.get("low_memory")))
        if moving is None:
            result = run(make, call, job, folder, most)
        else:
            result = animation_run.run(make, pipe, call, job, moving, folder, most)
        write_json(result.as_dict())
        if result.missing:
            raise ValueError(
                f"pictures with NaN or infinity were not written: {', '.join(result.missing)}; lower the scales of"
                " the edits, or try --dtype float32"
            )


def _check_early(given: Command) -> list[int]:
    """Checks the options as far as possible without reading a checkpoint. Returns the pictures' seeds."""
    check_early(given.call)
    seeds = seeds_of(given.call)
    if "strength" in given.call and "image" not in given.call:
        raise ValueError("--strength is given without --image; name the picture to start from, or leave --strength out")
    load = {name: value for name, value in given.load.items() if name not in ("dtype", "tokenizer")}
    LoadOptions(**parsed(LoadOptions, load))
    stages.check(given.stages)
    adapters.check(given.load | given.adapters, given.stages)
    return seeds


def _located(given: Command, source: sources.Source, model: str | None) -> Command:
    """Returns the options in a form that works in any folder, with absolute paths and with commits for hub names."""
    load = given.load | adapters.located(given.load | given.adapters)
    if "scheduler" in load:
        load["scheduler"] = stages.absolute_path(load["scheduler"])
    if model is not None and (commit := sources.place(source)[1]) is not None:
        load["revision"] = commit
    call = dict(given.call)
    if "image" in call:
        call["image"] = str(Path(call["image"]).expanduser().resolve())
    kept = {name: load.pop(name) for name in list(load) if name not in load_arguments()}
    return Command(call, stages.located(given.stages), load, kept)


def _check_family(system: System, name: str, given: Command) -> None:
    stages.check_family(system, name, given.stages, image="image" in given.call)
    stages.check_load(system, name, given.load)
    adapters.check_family(system, given.adapters)
    check_family(system, name, given.call)


def _load(
    source: sources.Source, model: str | None, given: Command, name: str
) -> tuple[Pipeline, Callable[..., Output]]:
    """Returns a pipeline (for a cascade, the first stage's pipeline) and a function that makes pictures."""
    began = time.perf_counter()
    options = parsed(LoadOptions, given.load)
    place, revision = sources.place(source)
    options["revision"] = revision
    low_memory = bool(given.stages.get("low_memory"))
    if source.system.stages:
        scheduler = options.pop("scheduler", None)
        options.pop("revision")
        files = adapters.by_stage(given.adapters, [FIRST, *stages.later_stages()])
        pipe, make = stages.load(place, revision, given.stages, scheduler=scheduler, **files, **options)
    else:
        options |= adapters.read(given.adapters)
        pipe = make = loading.load(loading.DEMO if model is None else place, **options)
    device = pipe.devices.devices[0].device_kind
    what = f"{name}: {_solver(pipe)}, {pipe.dtype.name} on {len(pipe.devices)} x {device}"
    took = f"in {time.perf_counter() - began:.1f} s"
    echo(f"{what}; each network is loaded when it is needed" if low_memory else f"Loaded {what}, {took}")
    return pipe, make


def _solver(pipe: Pipeline) -> str:
    return f"{pipe.system.title}'s sampler" if pipe.scheduler is None else pipe.scheduler.name


def _job(
    pipe: Pipeline,
    prompt: str,
    concepts: list[Edit],
    seeds: list[int],
    call: Mapping[str, Any],
    given: Command,
    moving: animation.Animation | None,
) -> Job:
    """Prints the prompt, seeds and edits, and returns the job, including the settings to be stored in the pictures."""
    declared = shell_arguments(pipe.system.call)
    recommended = pipe.recommended.call
    complete = {**recommended, **call}
    values = {name: complete.get(name, one.default) for name, one in declared.items() if name not in SEEDS}
    calls = len(pipe.system.sampler.table(pipe.system.call(prompt, **complete), pipe.scheduler).call)
    edits = [pipe.recommended.edit(one, calls) for one in concepts]
    shown = arguments(pipe.system.call)["seed"].kind.show(seeds)
    echo(f"{prompt!r}, {'seed' if len(seeds) == 1 else 'seeds'} {shown}, {values['steps']} steps")
    for one in edits:
        echo(f"  {describe(one)}")
    used = [name for name in recommended if name not in call and (moving is None or moving.name != name)]
    if used:
        shown_settings = (f"{name} {plain(declared[name].kind.show(recommended[name]))}" for name in used)
        echo(f"  as the checkpoint recommends: {', '.join(shown_settings)}")
    if moving is not None or any(stage in given.stages for stage in stages.later_stages()):
        # Each frame or stage has its own threshold and warm-up, unless they are given.
        edits = concepts
    sizes = pipe.system.sampler.sizes(pipe.models)
    source = to_image(read_picture(call["image"])[0]) if "image" in call else None
    picture = None if source is None else (source.height, source.width)
    height, width, _ = shape_from(sizes, call.get("height"), call.get("width"), picture)
    values |= {"height": height * sizes.factor, "width": width * sizes.factor}
    known = {
        "revision": given.load.get("revision"),
        "system": pipe.system.name,
        "prompt": prompt,
        "edits": [dataclasses.asdict(one) for one in edits],
        "seed": None,
        **{name: value for name, value in values.items() if value is not None},
        **given.stages,
        **{name: value for name, value in given.load.items() if name not in ("revision", *OF_THIS_MACHINE)},
        **given.adapters,
        "dtype": pipe.dtype.name,
        "solver": _solver(pipe),
        **versions(pipe.devices.devices[0].device_kind),
    }
    return Job(prompt, concepts, seeds, known, "loaded and ran" if given.stages.get("low_memory") else "ran", source)
