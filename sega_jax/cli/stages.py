"""What `sega-jax edit` has for DeepFloyd-IF: the options of the cascade's stages, and how they are run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.method.schedules.spacing import NAMED
from sega_jax.pipelines import sources
from sega_jax.pipelines.batch import number, whole
from sega_jax.pipelines.cascade import STAGES, load_cascade
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.systems.registry import STAGE_1, Kind
from sega_jax.text import caption_cleaning

# The stages after the first, whose options begin with their name.
LATER = tuple(STAGES)[1:]


class _Steps(click.ParamType):
    """A number of steps, or the name of one of DeepFloyd-IF's lists."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return value if value in NAMED else int(value)
        except ValueError:
            self.fail(f"{value!r} should be a whole number, or one of {', '.join(NAMED)}", param, ctx)


STEPS = _Steps()


def _of(stage: str, before: str, steps: int, guidance_scale: int, noise_level: int) -> list[Callable]:
    """The options of a later stage, with their defaults."""
    return [
        click.option(f"--{stage}-revision", help="As --revision."),
        click.option(f"--{stage}-scheduler", help="As --scheduler."),
        click.option(f"--{stage}-steps", type=STEPS, help=f"[default: {steps}]"),
        click.option(f"--{stage}-guidance-scale", type=float, help=f"[default: {guidance_scale}]"),
        click.option(
            f"--{stage}-noise-level", type=int, help=f"Of the {before} stage's picture.  [default: {noise_level}]"
        ),
        click.option(f"--{stage}-noise-anew", is_flag=True, help="Another such noise at every call."),
    ]


_OPTIONS = [
    click.option("--stage2", metavar="MODEL", help="DeepFloyd-IF: its second stage, to make pictures of 256 pixels."),
    *_of("stage2", "first", 50, 4, 250),
    click.option("--upscaler", metavar="MODEL", help="DeepFloyd-IF: the x4 upscaler, to make 1024 of these."),
    *_of("upscaler", "second", 75, 9, 20),
    click.option(
        "--edited",
        multiple=True,
        type=click.Choice(list(STAGES)),
        help="DeepFloyd-IF: a stage that the edits guide; may be given several times.  [default: stage1]",
    ),
    click.option("--clean-captions", is_flag=True, help="DeepFloyd-IF: words as its training data were cleaned."),
    click.option("--low-memory", is_flag=True, help="DeepFloyd-IF: one network at a time in memory."),
]
_SHARED = ("momentum_scale", "momentum_beta", "semantics", "support")
_OWN = ("steps", "guidance_scale", "noise_level", "noise_anew")


def options(command: Callable) -> Callable:
    """Adds the options of the stages to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


NAMES = [parameter.name for parameter in reversed(options(lambda: None).__click_params__)]


def check(chosen: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Raises:
        TypeError, ValueError: a number out of range, an unknown scheduler, or an option of a stage that is not there.
        ImportError: captions are to be cleaned, and what cleans them is not installed.
    """
    given = remembered(chosen)
    for name, value in given.items():
        if name.endswith("noise_level"):
            whole(_option(name), value, 0)
        elif name.endswith("steps"):
            check_steps(_option(name), value)
        elif name.endswith("guidance_scale"):
            number(_option(name), value)
        elif name.endswith("scheduler"):
            checked_scheduler(value)
    for stage in LATER:
        options = [_option(name) for name in given if name.startswith(f"{stage}_")]
        options += [f"--edited {stage}"] * (stage in chosen["edited"])
        if options and stage not in given:
            raise ValueError(f"{options[0]} is given without --{stage}; name its checkpoint, or leave it out")
    if "upscaler" in given and "stage2" not in given:
        raise ValueError("--upscaler is given without --stage2, whose pictures it enlarges; give both")
    if chosen["clean_captions"]:
        caption_cleaning.check()


def check_steps(option: str, steps: int | str) -> None:
    """ValueError for a number of steps below 1."""
    if steps not in NAMED:
        whole(option, steps, 1)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_kind(kind: Kind, model: str, chosen: Mapping[str, Any]) -> None:
    """Whether a command can begin with this model, and has these options.

    Raises:
        ValueError: it cannot.
    """
    if kind.noising:
        option = next(name for name, known in STAGES.items() if known is kind)
        raise ValueError(
            f"{model} is {kind.name}, which makes a small picture larger: give it as --{option}, and DeepFloyd-IF's"
            " first stage as --model"
        )
    given = list(remembered(chosen))
    if given and kind is not STAGE_1:
        raise ValueError(
            f"{_option(given[0])} is of {STAGE_1.name[:-12]} cascade, but {model} is {kind.name}; leave it out"
        )


def located(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a command can repeat them anywhere: folders by their whole path, and of what is on the hub the
    commit.

    Raises:
        As `sega_jax.pipelines.sources.find`.
    """
    found = dict(chosen)
    for stage in LATER:
        if chosen[stage] is not None:
            source = sources.find(chosen[stage], chosen[f"{stage}_revision"])
            found[stage], found[f"{stage}_revision"] = place(source)
        found[f"{stage}_scheduler"] = whole_path(chosen[f"{stage}_scheduler"])
    return found


def place(source: sources.Source) -> tuple[str, str | None]:
    """A checkpoint's whole path and None, or its name on the hub and its commit."""
    here = source.file or (source.folder if source.commit is None else None)
    return (str(source.name), source.commit) if here is None else (str(here.resolve()), None)


def whole_path(scheduler: str | None) -> str | None:
    """A scheduler's folder by its whole path; names of classes and None as they are."""
    if scheduler is None or not Path(scheduler).expanduser().exists():
        return scheduler
    return str(Path(scheduler).expanduser().resolve())


def load(
    model: str, revision: str | None, chosen: Mapping[str, Any], *, scheduler: Any, **common: Any
) -> tuple[Pipeline, Callable[..., Output]]:
    """The first stage, and what makes pictures as its call would, but of all stages.

    Args:
        model, revision: the first stage.
        chosen: the options of the stages.
        scheduler: of the first stage.
        common: as of `load_cascade`.
    """
    later = [stage for stage in LATER if chosen[stage] is not None]
    cascade = load_cascade(
        model,
        chosen["stage2"],
        chosen["upscaler"],
        low_memory=chosen["low_memory"],
        revisions={"stage1": revision} | {stage: chosen[f"{stage}_revision"] for stage in later},
        schedulers={"stage1": scheduler} | {stage: chosen[f"{stage}_scheduler"] for stage in later},
        **common,
    )

    def make(prompt: list[str], edits: list, *, seed: list[int], negative_prompt: str | None, **call: Any) -> Output:
        stages = {"stage1": call}
        for stage in later:
            own = {name: chosen[f"{stage}_{name}"] for name in _OWN}
            stages[stage] = {name: call[name] for name in _SHARED} | {k: v for k, v in own.items() if v is not None}
        edited = chosen["edited"] or ("stage1",)
        clean = chosen["clean_captions"]
        return cascade(prompt, edits, seed=seed, negative_prompt=negative_prompt, edited=edited, clean=clean, **stages)

    return cascade.stages["stage1"].outline, make


def remembered(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, which are those that a picture keeps."""
    return {name: value for name, value in chosen.items() if value not in (None, ()) and value is not False}
