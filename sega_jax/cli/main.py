"""`sega-jax edit` and `sega-jax info`; `sega-jax sweep` is in `sega_jax.cli.sweep`."""

import dataclasses
import inspect
import re
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from sega_jax.cli import diffusion as diffusion_options
from sega_jax.cli import files as file_options
from sega_jax.cli import paella as paella_options
from sega_jax.cli import stages as stage_options
from sega_jax.cli import sweep as sweep_commands
from sega_jax.cli.terminal import compilations, remember_compilations, versions, writable
from sega_jax.demo import settings
from sega_jax.method.guidance import SEMANTICS, SUPPORTS, Edit
from sega_jax.method.schedules.spacing import NAMED
from sega_jax.pipelines import loading, png, sources
from sega_jax.pipelines.batch import number, whole
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import plainly
from sega_jax.systems import stable_diffusion
from sega_jax.systems.registry import PAELLA, STAGE_1

_WHOLE = ("warmup", "cooldown")
_NUMBERS = ("scale", "threshold", "weight", "momentum_scale", "momentum_beta")


class Defaults(NamedTuple):
    """What goes without saying: in a call, and in edits that add or remove."""

    call: dict[str, Any]
    add: Edit
    remove: Edit


LIBRARY = Defaults(
    {name: parameter.default for name, parameter in inspect.signature(Pipeline.__call__).parameters.items()}
    | stable_diffusion.USUAL._asdict(),
    Edit(""),
    Edit("", scale=-Edit("").scale),
)


def demo(steps: int | str = settings.STEPS) -> Defaults:
    """Those of the demo model."""
    steps = sum(NAMED[steps]) if isinstance(steps, str) else steps
    return Defaults(settings.CALL, settings.add("", steps=steps), settings.remove("", steps=steps))


def parse_edit(text: str, defaults: Defaults = LIBRARY) -> Edit:
    """An edit from `[-]WORDS[:NAME=VALUE,...]`; a leading minus removes the concept.

    Raises:
        ValueError: no words, an unknown name, or a value that is no number or out of range.
    """
    words, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        words, rest = text, ""
    removes = words.startswith("-")
    words = words.removeprefix("-").strip()
    if not words:
        raise ValueError(f"--edit {text!r} names no concept")
    if astray := re.search(rf"[:,]\s*({'|'.join(_NUMBERS + _WHOLE)})\s*[:=]", words.replace("-", "_")):
        raise ValueError(
            f"--edit {text!r}: {astray[1]!r} looks like a setting; settings follow one colon, as in"
            f' "{words[: astray.start()]}:{astray[1]}=5"'
        )
    values: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in rest.split(","))):
        name, _, value = (part.strip() for part in entry.partition("="))
        name = name.replace("-", "_")
        if name not in _WHOLE + _NUMBERS or name in values:
            raise ValueError(
                f"--edit {text!r}: {name!r} is {'given twice' if name in values else 'unknown'}; the settings are"
                f" {', '.join(_NUMBERS + _WHOLE)}"
            )
        try:
            values[name] = int(value) if name in _WHOLE else float(value)
        except ValueError:
            kind = "a whole number" if name in _WHOLE else "a number"
            raise ValueError(f"--edit {text!r}: {name}={value!r} should be {kind}") from None
    if removes and "scale" in values:
        if values["scale"] < 0:
            raise ValueError(f"--edit {text!r}: the leading minus already removes the concept; give a positive scale")
        values["scale"] = -values["scale"]
    return dataclasses.replace(defaults.remove if removes else defaults.add, concept=words, **values)


def format_edit(edit: Edit, defaults: Defaults = LIBRARY) -> str:
    """The text that `parse_edit` reads as this edit, with every setting that is not the default."""
    minus = "-" if edit.scale < 0 else ""
    usual = defaults.remove if minus else defaults.add
    values = {name: getattr(edit, name) for name in _NUMBERS + _WHOLE}
    values = {name: value for name, value in values.items() if value not in (None, getattr(usual, name))}
    if minus and "scale" in values:
        values["scale"] *= -1
    listed = ",".join(f"{name}={_plain(value)}" for name, value in values.items())
    # A concept that itself ends like a list of settings needs one of its own behind it.
    if not listed and ":" in edit.concept and "=" in edit.concept.rpartition(":")[2]:
        listed = f"weight={_plain(edit.weight)}"
    return f"{minus}{edit.concept}" + (f":{listed}" if listed else "")


def _plain(value: float) -> str:
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)


def _defaults(name: str) -> str:
    return f"[default: {LIBRARY.call[name]:g}, of the demo model {settings.CALL[name]:g}]"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sega_jax")
def main() -> None:
    """Semantic guidance for text-to-image diffusion in JAX."""


main.add_command(sweep_commands.sweep)


@main.command(context_settings={"show_default": True})
@click.option(
    "--model",
    help="A checkpoint: a folder in diffusers layout, or owner/name on the hub; of Stable Diffusion also a single file;"
    " of DeepFloyd-IF the first stage; of Paella a folder that sega-jax-convert wrote.  [default: the demo model that"
    " comes along, of cartoon portraits]",
)
@click.option("--revision", help="A branch, tag or commit on the hub.")
@click.option("--prompt", required=True, help="What the picture shows.")
@click.option(
    "--edit",
    "edits",
    multiple=True,
    required=True,
    metavar="CONCEPT",
    help='A concept to add, or with a leading minus to remove; settings follow a colon: "glasses",'
    ' "-beard:scale=6,threshold=0.95,warmup=8". Settings are scale, threshold, warmup, cooldown, weight,'
    " momentum_scale and momentum_beta. May be given several times.",
)
@click.option("--negative-prompt", help="What the picture stays away from.")
@click.option("--seed", default=0)
@click.option(
    "--steps",
    type=stage_options.STEPS,
    help=f"Of the solver; or the name of a list of DeepFloyd-IF's, such as smart50.  {_defaults('steps')}",
)
@click.option("--guidance-scale", type=float, help=f"Strength of the prompt.  {_defaults('guidance_scale')}")
@click.option("--eta", default=0.0, help="DDIM's share of fresh noise, 0 to 1.")
@click.option("--height", type=int, help="In pixels.  [default: the checkpoint's]")
@click.option("--width", type=int, help="In pixels.  [default: the checkpoint's]")
@click.option("--momentum-scale", type=float, help=f"Of edits that name none.  {_defaults('momentum_scale')}")
@click.option("--momentum-beta", type=float, help=f"Of edits that name none.  {_defaults('momentum_beta')}")
@click.option("--semantics", type=click.Choice(SEMANTICS), default=SEMANTICS[0])
@click.option("--support", type=click.Choice(SUPPORTS), default=SUPPORTS[0], help="What shares a threshold.")
@diffusion_options.options
@file_options.options
@stage_options.options
@paella_options.options
@click.option("--dtype", help="Of the networks.  [default: float32 on a CPU, else bfloat16]")
@click.option("--variant", help='Of the weight files, such as "fp16".')
@click.option("--scheduler", help='A class of diffusers\', such as "DPMSolverMultistepScheduler", or a folder.')
@click.option(
    "--safety-checker/--no-safety-checker", default=True, help="Whether to check the pictures, if the checkpoint can."
)
@click.option("--out", default="sega-jax-out", metavar="FOLDER", help="Where the pictures go.")
def edit(
    model: str | None,
    prompt: str,
    edits: tuple[str, ...],
    out: str,
    revision: str | None,
    dtype: str | None,
    variant: str | None,
    scheduler: str | None,
    safety_checker: bool,
    **call: Any,
) -> None:
    """Makes a picture of a prompt, with and without edits, and a sheet of both."""
    with plainly():
        if model is None and revision is not None:
            raise ValueError(f"--revision {revision} is of a repository on the hub; name it with --model")
        usual = settings.CALL if model is None else LIBRARY.call
        chosen = {name: call.pop(name) for name in stage_options.NAMES}
        tokens = {name: call.pop(name) for name in paella_options.NAMES}
        diffusion = {name: call.pop(name) for name in diffusion_options.NAMES}
        files = {name: call.pop(name) for name in file_options.NAMES}
        unsaid = [name for name in settings.CALL if call[name] is None]
        call |= {name: usual[name] for name in unsaid}
        _check(call)
        stage_options.check(chosen)
        checked_scheduler(scheduler)
        paella_options.check(tokens)
        diffusion_options.check(diffusion)
        file_options.check(files)
        defaults = demo(call["steps"]) if model is None else LIBRARY
        parsed = [parse_edit(text, defaults) for text in edits]
        folder = writable(Path(out))
        found = sources.find(loading.DEMO if model is None else model, revision, files["config"])
        # As the command in the picture repeats it
        if model is not None:
            model, revision = stage_options.place(found)
        name = model or "the demo model"
        stage_options.check_kind(found.kind, name, chosen)
        paella_options.check_kind(found.kind, name, tokens, call["eta"])
        diffusion_options.check_kind(found.kind, name, diffusion | files)
        diffusion = diffusion_options.read(diffusion)
        chosen, scheduler = stage_options.located(chosen), stage_options.whole_path(scheduler)
        remember_compilations()
        began = time.perf_counter()
        common = {"dtype": dtype, "variant": variant, "safety_checker": safety_checker, "scheduler": scheduler}
        if found.kind is STAGE_1:
            pipe, make = stage_options.load(model, revision, chosen, **common)
        else:
            common |= file_options.read(files)
            pipe = make = load(loading.DEMO if model is None else model, revision=revision, **common)
        if model is not None:
            call |= {name: value for name, value in pipe.models.usual._asdict().items() if name in unsaid}
        if found.kind is PAELLA:
            del call["eta"]
        solver = "Paella's sampler" if found.kind is PAELLA else pipe.scheduler.name
        low_memory, device = chosen["low_memory"], pipe.devices.devices[0].device_kind
        what = f"{name}: {solver}, {pipe.dtype.name} on {len(pipe.devices)} x {device}"
        seconds = time.perf_counter() - began
        click.echo(f"Loading {what}, when it is needed" if low_memory else f"Loaded {what}, in {seconds:.1f} s")
        click.echo(f"{prompt!r}, seed {call['seed']}, {call['steps']} steps")
        for one in parsed:
            click.echo(f"  {'-' if one.scale < 0 else '+'} {_describe(one)}")
        began = time.perf_counter()
        with compilations() as compiling:
            own = paella_options.read(tokens) | diffusion
            result = make([prompt] * 2, [[], parsed], **call | own | {"seed": [call["seed"]] * 2})
        seconds = time.perf_counter() - began
        ran = "loaded and ran" if low_memory else "ran"
        click.echo(f"Compiled in {compiling():.1f} s, {ran} in {seconds - compiling():.1f} s")

        known = {
            "model": model,
            "revision": revision,
            "prompt": prompt,
            "edits": [dataclasses.asdict(one) for one in parsed],
        }
        sides = pipe.latent_shape(call["height"], call["width"])[:2]
        height, width = (side * pipe.models.sizes.factor for side in sides)
        known |= call | {"height": height, "width": width}
        known |= {"dtype": pipe.dtype.name, "variant": variant}
        known |= stage_options.remembered(chosen) | {name: value for name, value in tokens.items() if value is not None}
        known |= (
            diffusion
            | file_options.remembered(files)
            | {"scheduler": scheduler, "solver": solver, "safety_checker": safety_checker}
        )
        names = "original", "edited"
        if result.flagged is not None and result.flagged.any():
            click.echo(f"Flagged by the safety checker: {', '.join(np.array(names)[result.flagged])}")
        made = {name: image for name, image in zip(names, result.images, strict=True) if image}
        if len(made) == 2:
            captions = [prompt, "  ".join(f"{'-' if one.scale < 0 else '+'} {one.concept}" for one in parsed)]
            made["sheet"] = png.sheet(list(made.values()), captions)
        for path in _save(folder, made, known | versions(device)):
            click.echo(f"Wrote {path}")
        if len(made) < 3:
            raise ValueError("not every picture is finite; lower the scales, or try --dtype float32")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
def info(file: Path) -> None:
    """Prints the settings of a picture that `edit` wrote, and the command that repeats it."""
    with plainly():
        known = png.settings(file)
        try:
            defaults = demo(known["steps"]) if known["model"] is None else LIBRARY
            known["edits"] = [format_edit(Edit(**one), defaults) for one in known["edits"]]
            command = _command(known)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file} has settings that cannot be read") from None
        for name, value in known.items():
            click.echo(f"{name:15} {'; '.join(value) if isinstance(value, list) else value}")
        click.echo(f"\n{command}")


def _command(known: dict[str, Any]) -> str:
    """The shell command that makes the pictures with these settings."""
    words = ["sega-jax", "edit"]
    for option in edit.params:
        if option.multiple:
            for one in known.get(option.name, ()):
                words += [option.opts[0], one]
        elif option.is_flag and not option.secondary_opts:
            words += option.opts if known.get(option.name) else []
        elif known.get(option.name) is False:
            words += option.secondary_opts
        elif known.get(option.name) not in (None, option.default) and option.name != "out":
            words += [option.opts[0], str(known[option.name])]
    return shlex.join(words)


def _check(call: dict[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen, before one is read."""
    stage_options.check_steps("--steps", call["steps"])
    whole("--seed", call["seed"], 0, 2**32 - 1)
    number("--guidance-scale", call["guidance_scale"])
    for name in ("eta", "momentum_scale", "momentum_beta"):
        number(f"--{name.replace('_', '-')}", call[name], 0, 1)


def _describe(one: Edit) -> str:
    begins = f"from call {one.warmup}" + ("" if one.cooldown is None else f" to {one.cooldown}")
    return f"{one.concept}: scale {abs(one.scale):g}, threshold {one.threshold:g}, {begins}"


def _save(folder: Path, made: dict[str, Any], known: dict[str, Any]) -> list[Path]:
    """Writes pictures under the first number that is free; an earlier run's are never touched."""
    number = 1
    while True:
        paths = {name: folder / f"{number:04}-{name}.png" for name in made}
        try:
            for name, path in paths.items():
                png.save(made[name], path, {"picture": name} | known)
            return list(paths.values())
        except FileExistsError:
            number += 1
