"""What `sega-jax edit` has for DeepFloyd-IF: the options of the cascade's stages, and how they are run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cascade import STAGES, load_cascade
from sega_jax.kinds import STAGE_1, Kind
from sega_jax.pipeline import Output, Pipeline
from sega_jax.rows import number, whole

_OPTIONS = [
    click.option("--stage2", metavar="MODEL", help="DeepFloyd-IF: its second stage, to make pictures of 256 pixels."),
    click.option("--upscaler", metavar="MODEL", help="DeepFloyd-IF: the x4 upscaler, to make 1024 of these."),
    click.option(
        "--edited",
        multiple=True,
        type=click.Choice(list(STAGES)),
        help="DeepFloyd-IF: a stage that the edits guide; may be given several times.  [default: stage1]",
    ),
    click.option("--stage2-steps", type=int, help="[default: 50]"),
    click.option("--stage2-guidance-scale", type=float, help="[default: 4]"),
    click.option("--stage2-noise-level", type=int, help="Of the first stage's picture.  [default: 250]"),
    click.option("--upscaler-steps", type=int, help="[default: 75]"),
    click.option("--upscaler-guidance-scale", type=float, help="[default: 9]"),
    click.option("--upscaler-noise-level", type=int, help="Of the second stage's picture.  [default: 20]"),
    click.option("--clean-captions", is_flag=True, help="DeepFloyd-IF: words as its training data were cleaned."),
    click.option("--low-memory", is_flag=True, help="DeepFloyd-IF: one network at a time in memory."),
]
_SHARED = ("momentum_scale", "momentum_beta", "semantics", "support")


def options(command: Callable) -> Callable:
    """Adds the options of the stages to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


NAMES = [parameter.name for parameter in reversed(options(lambda: None).__click_params__)]


def check(chosen: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Raises:
        ValueError: a number out of range.
    """
    for name, value in chosen.items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and name.endswith(("steps", "noise_level")):
            whole(option, value, 1 if name.endswith("steps") else 0)
        elif value is not None and name.endswith("guidance_scale"):
            number(option, value)


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
    given = [name for name, value in chosen.items() if value not in (None, (), False)]
    if given and kind is not STAGE_1:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is of {STAGE_1.name[:-12]} cascade, but {model} is {kind.name}; leave it"
            " out"
        )


def load(
    folder: Path, chosen: Mapping[str, Any], *, scheduler: Any, **common: Any
) -> tuple[Pipeline, Callable[..., Output]]:
    """The first stage, and what makes pictures as its call would, but of all stages.

    Args:
        folder: of the first stage.
        chosen: the options of the stages.
        scheduler: of the first stage.
        common: as of `load_cascade`.
    """
    schedulers = {} if scheduler is None else {"stage1": scheduler}
    cascade = load_cascade(
        folder,
        chosen["stage2"],
        chosen["upscaler"],
        low_memory=chosen["low_memory"],
        schedulers=schedulers,
        **common,
    )

    def make(prompt: list[str], edits: list, *, seed: list[int], negative_prompt: str, **call: Any) -> Output:
        stages = {"stage1": call}
        for stage in list(cascade.stages)[1:]:
            own = {name: chosen[f"{stage}_{name}"] for name in ("steps", "guidance_scale", "noise_level")}
            stages[stage] = {name: call[name] for name in _SHARED} | {k: v for k, v in own.items() if v is not None}
        edited = chosen["edited"] or ("stage1",)
        clean = chosen["clean_captions"]
        return cascade(prompt, edits, seed=seed, negative_prompt=negative_prompt, edited=edited, clean=clean, **stages)

    return cascade.stages["stage1"].outline, make


def remembered(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a picture keeps them: folders by their whole path, without what goes without saying."""
    kept = {name: value for name, value in chosen.items() if value not in (None, (), False)}
    for name in ("stage2", "upscaler"):
        if name in kept and Path(kept[name]).expanduser().exists():
            kept[name] = str(Path(kept[name]).expanduser().resolve())
    return kept
