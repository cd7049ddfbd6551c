"""`sega-jax edit`: a picture of a prompt, with and without edits; and `sega-jax info`, which repeats it."""

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from sega_jax.cli import adapters, stages
from sega_jax.cli.concepts import LIBRARY, demo, describe, format_edit, parse_edit
from sega_jax.cli.options import (
    OF_THIS_MACHINE,
    call_options,
    check_early,
    check_family,
    command_words,
    load_arguments,
    option,
    parsed,
    shell_arguments,
)
from sega_jax.cli.terminal import compilations, remember_compilations, versions, writable
from sega_jax.demo import settings
from sega_jax.method.guidance import Edit
from sega_jax.pipelines import loading, png, sources
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import plainly
from sega_jax.systems.base import System
from sega_jax.systems.images import read as read_picture
from sega_jax.systems.registry import named
from sega_jax.systems.sizes import shape_from

_MODEL = click.Option(
    ["--model"],
    help="A checkpoint: a folder in diffusers layout, owner/name on the hub, or a single file; of a cascade the first"
    " stage.  [default: the demo model that comes along, of cartoon portraits]",
)
_PROMPT = click.Option(["--prompt"], required=True, help="What the picture shows.")
_EDITS = click.Option(
    ["--edit", "edits"],
    multiple=True,
    metavar="CONCEPT",
    help='A concept to add, or with a leading minus to remove; settings follow a colon: "glasses",'
    ' "-beard:scale=6,threshold=0.95,warmup=8". Settings are scale, threshold, warmup, cooldown, weight,'
    " momentum_scale and momentum_beta. May be given several times.",
)
_OUT = click.Option(["--out"], default="sega-jax-out", metavar="FOLDER", help="Where the pictures go.")


class EditCommand(click.Command):
    """A command whose options are those of all families, also of families that were registered later."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        loads = [option(one) for one in load_arguments().values()]
        own = [_MODEL, _PROMPT, _EDITS, *call_options(), *stages.options(), *loads, *adapters.options(), _OUT]
        return [*own, *super().get_params(ctx)]


class Command(NamedTuple):
    """The options that were given to `edit`, by where they go; values are text."""

    call: dict[str, Any]
    stages: dict[str, Any]
    load: dict[str, Any]
    adapters: dict[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Command":
        given = {name: value for name, value in options.items() if value not in (None, ()) and value is not False}
        # A flag that is on by default may be turned off.
        given |= {
            name: False for name, one in load_arguments().items() if one.default is True and options[name] is False
        }
        loads, files, of_stages = load_arguments(), adapters.names(), stages.names()

        def some(names):
            return {name: value for name, value in given.items() if name in names}

        load, later, adapted = some(loads), some(of_stages), some(files)
        rest = {name: value for name, value in given.items() if name not in {**load, **later, **adapted}}
        return cls(rest, later, load, adapted)


@click.command("edit", cls=EditCommand)
def edit(model: str | None, prompt: str, edits: tuple[str, ...], out: str, **options: Any) -> None:
    """Makes a picture of a prompt, with and without edits, and a sheet of both."""
    with plainly():
        given = Command.of(options)
        if model is None and "revision" in given.load:
            raise ValueError(f"--revision {given.load['revision']} is of a repository on the hub; name it with --model")
        _check_early(given, model)
        defaults = LIBRARY if model is not None else demo(_steps(given))
        concepts = [parse_edit(text, defaults) for text in edits]
        folder = writable(Path(out))
        config = given.load.get("config")
        found = sources.find(model or loading.DEMO, given.load.get("revision"), config, given=given.load)
        given = _located(given, found, model)
        name = model or "the demo model"
        _check_family(found.system, name, given)
        call = ({} if model is not None else settings.CALL) | parsed(found.system.call, given.call)
        remember_compilations()
        pipe, make = _load(found, model, given, name)
        made, known = _make(pipe, make, prompt, concepts, call, given)
        known = {"model": None if model is None else sources.place(found)[0], **known}
        _write(folder, made, known, prompt, concepts)


def _steps(given: Command) -> int | str:
    text = given.call.get("steps")
    return settings.STEPS if text is None else parsed(named("stable_diffusion").call, {"steps": text})["steps"]


def _check_early(given: Command, model: str | None) -> None:
    """Finds mistakes that need no checkpoint to be seen, before one is read."""
    check_early(given.call)
    if "strength" in given.call and "image" not in given.call:
        raise ValueError("--strength is given without --image; name the picture to start from, or leave it out")
    load = {name: value for name, value in given.load.items() if name not in ("dtype", "tokenizer")}
    LoadOptions(**parsed(LoadOptions, load))
    stages.check(given.stages)
    adapters.check(given.load | given.adapters, given.stages)


def _located(given: Command, found: sources.Source, model: str | None) -> Command:
    """Returns the options as a command can repeat them anywhere."""
    load = given.load | adapters.remembered(given.load | given.adapters)
    if "scheduler" in load:
        load["scheduler"] = stages.whole_path(load["scheduler"])
    if model is not None and (commit := sources.place(found)[1]) is not None:
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
    found: sources.Source, model: str | None, given: Command, name: str
) -> tuple[Pipeline, Callable[..., Output]]:
    began = time.perf_counter()
    options = parsed(LoadOptions, given.load)
    place, revision = sources.place(found)
    options["revision"] = revision
    low_memory = bool(given.stages.get("low_memory"))
    if found.system.stages:
        scheduler = options.pop("scheduler", None)
        options.pop("revision")
        files = adapters.by_stage(given.adapters, [FIRST, *stages.later_stages()])
        pipe, make = stages.load(place, revision, given.stages, scheduler=scheduler, **files, **options)
    else:
        options |= adapters.read(given.adapters)
        pipe = make = loading.load(loading.DEMO if model is None else place, **options)
    device = pipe.devices.devices[0].device_kind
    what = f"{name}: {_solver(pipe)}, {pipe.dtype.name} on {len(pipe.devices)} x {device}"
    seconds = time.perf_counter() - began
    click.echo(f"Loading {what}, when it is needed" if low_memory else f"Loaded {what}, in {seconds:.1f} s")
    return pipe, make


def _solver(pipe: Pipeline) -> str:
    return f"{pipe.system.title}'s sampler" if pipe.scheduler is None else pipe.scheduler.name


def _make(
    pipe: Pipeline,
    make: Callable[..., Output],
    prompt: str,
    concepts: list[Edit],
    call: dict[str, Any],
    given: Command,
) -> tuple[Output, dict[str, Any]]:
    """Returns the pictures without and, where there are any, with the edits, and the settings that they were made
    with."""
    declared = shell_arguments(pipe.system.call)
    values = {name: call.get(name, one.default) for name, one in declared.items()} | {"seed": call.get("seed", 0)}
    click.echo(f"{prompt!r}, seed {values['seed']}, {values['steps']} steps")
    for one in concepts:
        click.echo(f"  {describe(one)}")
    began = time.perf_counter()
    with compilations() as compiling:
        rows = [[], concepts] if concepts else [[]]
        result = make([prompt] * len(rows), rows, **call | {"seed": [values["seed"]] * len(rows)})
    seconds = time.perf_counter() - began
    ran = "loaded and ran" if given.stages.get("low_memory") else "ran"
    click.echo(f"Compiled in {compiling():.1f} s, {ran} in {seconds - compiling():.1f} s")
    sizes = pipe.system.sampler.sizes(pipe.models)
    picture = read_picture(call["image"]).shape[1:3] if "image" in call else None
    height, width, _ = shape_from(sizes, call.get("height"), call.get("width"), picture)
    values |= {"height": height * sizes.factor, "width": width * sizes.factor}
    known = {
        "revision": given.load.get("revision"),
        "system": pipe.system.name,
        "prompt": prompt,
        "edits": [dataclasses.asdict(one) for one in concepts],
        **{name: value for name, value in values.items() if value is not None},
        **given.stages,
        **{name: value for name, value in given.load.items() if name not in ("revision", *OF_THIS_MACHINE)},
        **given.adapters,
        "dtype": pipe.dtype.name,
        "solver": _solver(pipe),
        **versions(pipe.devices.devices[0].device_kind),
    }
    return result, known


def _write(folder: Path, result: Output, known: dict[str, Any], prompt: str, concepts: list[Edit]) -> None:
    """Writes the pictures and a sheet of both."""
    names = ("original", "edited")[: 2 if concepts else 1]
    if result.flagged is not None and result.flagged.any():
        click.echo(f"Flagged by the safety checker: {', '.join(np.array(names)[result.flagged])}")
    made = {name: image for name, image in zip(names, result.images, strict=True) if image}
    if len(made) == 2:
        captions = [prompt, "  ".join(f"{'-' if one.scale < 0 else '+'} {one.concept}" for one in concepts)]
        made["sheet"] = png.sheet(list(made.values()), captions)
    for path in _save(folder, made, known):
        click.echo(f"Wrote {path}")
    if len(made) < (3 if concepts else 1):
        raise ValueError("not every picture is finite; lower the scales, or try --dtype float32")


def _save(folder: Path, made: Mapping[str, Any], known: Mapping[str, Any]) -> list[Path]:
    """Writes pictures under the first number that is free; an earlier run's are never touched."""
    number = 1
    while True:
        paths = {name: folder / f"{number:04}-{name}.png" for name in made}
        try:
            for name, path in paths.items():
                png.save(made[name], path, {"picture": name, **known})
            return list(paths.values())
        except FileExistsError:
            number += 1


@click.command("info")
@click.argument("file", type=click.Path(path_type=Path))
def info(file: Path) -> None:
    """Prints the settings of a picture that `edit` wrote, and the command that repeats it."""
    with plainly():
        known = png.settings(file)
        try:
            defaults = demo(known["steps"]) if known["model"] is None else LIBRARY
            known["edits"] = [format_edit(Edit(**one), defaults) for one in known["edits"]]
            words = _words(known)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file} has settings that cannot be read") from None
        for name, value in known.items():
            click.echo(f"{name:15} {'; '.join(map(str, value)) if isinstance(value, list) else value}")
        click.echo(f"\n{shlex.join(words)}")


def _words(known: Mapping[str, Any]) -> list[str]:
    """Returns the shell command that makes the pictures with these settings."""
    words = ["sega-jax", "edit"]
    for name in ("model", "revision"):
        words += [] if known.get(name) is None else [f"--{name}", known[name]]
    words += ["--prompt", known["prompt"]]
    for one in known["edits"]:
        words += ["--edit", one]
    defaults = {"seed": 0} | (settings.CALL if known["model"] is None else {})
    call = named(known.get("system", "stable_diffusion")).call
    words += command_words(call, {name: _tuples(value) for name, value in known.items()}, defaults)
    words += stages.words(known)
    load = {name: value for name, value in known.items() if name != "revision"}
    words += command_words(LoadOptions, {name: value for name, value in load.items() if name in load_arguments()}, {})
    return words + adapters.command_words(known)


def _tuples(value: Any) -> Any:
    # JSON has tuples as lists.
    return tuple(value) if isinstance(value, list) else value
