"""Checks a plan's calls against the checkpoint without reading the weights, before anything is loaded or run."""

from typing import Any

import jax
import numpy as np

from sega_jax.method.argument_kinds import Real
from sega_jax.pipelines.batch import Batch
from sega_jax.pipelines.device_defaults import pick_attention, pick_dtype
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.messages import muted
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import counted
from sega_jax.sweep.description.facts import Facts, described, pictures_of
from sega_jax.sweep.description.fields import call_settings
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.stages import earlier
from sega_jax.sweep.planning.plan import Plan
from sega_jax.weights.lora_files import digest


def outline(facts: Facts) -> tuple[Pipeline, int]:
    """Returns a pipeline whose weights are only shapes (`jax.ShapeDtypeStruct`), and the weights' size on a device in
    bytes.

    Raises:
        FileNotFoundError, CheckpointError: as for `sega_jax.load`.
    """
    devices = Devices()
    dtype = pick_dtype(facts.model.get("dtype"), devices)
    model = described(facts, pick_attention(facts.model.get("attention"), dtype, devices))
    models = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.models)
    weights = sum(leaf.size * dtype.itemsize for leaf in jax.tree.leaves(model.networks))
    return Pipeline(**model._asdict() | {"models": models, "devices": devices, "safety": None}), weights


def prepared(pipe: Pipeline, facts: Facts, point: Point) -> Batch:
    """Prepares the call of one point.

    Raises:
        TypeError, ValueError: as for `Pipeline.prepare`.
    """
    scheduler = facts.scheduler_of(point.scheduler)
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {name: value for name, value in point.call.items() if value is not None}
    # The previous stage's pictures do not exist yet, so blank pictures of the same size are used.
    for name in pictures_of(facts.declaration):
        if (picture := earlier(call.get(name))) is not None:
            call[name] = np.zeros((*picture.size, 3), np.uint8)
    with muted():
        return pipe.prepare(**call, edits=list(point.edits.values()), output="uint8")


def check_files(plan: Plan) -> None:
    """Checks that the files that settings name have not changed since the sweep was planned.

    Raises:
        FileNotFoundError, ValueError: a file is missing or has changed.
    """
    for path, known in plan.sweep.files.items():
        if digest(path) != known["digest"]:
            raise ValueError(
                f"{path} has changed since the sweep was planned; restore the file, or start the sweep in a new folder"
            )


def check(plan: Plan) -> None:
    """Checks the calls of a plan, or of all stages of a cascade, against the checkpoint without loading weights.

    It checks one call for each combination of the settings that only the checkpoint can validate. It does not check
    prompts, seeds or pictures. Numbers with a fixed range were already checked when the sweep was created.

    Args:
        plan: the plan.

    Raises:
        FileNotFoundError, CheckpointError, TypeError, ValueError: a call is not valid for the checkpoint.

    Example:
        >>> from sega_jax import sweep
        >>> large = sweep.Sweep(call={"prompt": "a portrait", "height": 130})
        >>> sweep.check(sweep.plan(large, sweep.Facts.of(large)))
        Traceback (most recent call last):
        ValueError: ...height=130 ...
    """
    if plan.earlier is not None:
        check(plan.earlier)
    pipe, _ = outline(plan.facts)
    arguments = call_settings(plan.facts.declaration)
    free = {name for name, one in arguments.items() if one.varies == "row" and isinstance(one.kind, Real)}
    free |= {"prompt", "negative_prompt", "seed"}
    seen: set[Any] = set()
    for point, _ in counted(plan.pictures(), "checking", plan.counts.pictures):
        outlined = dict(point.outline)
        key = (
            point.scheduler,
            len(point.edits),
            *((name, outlined.get(name, value)) for name, value in point.settings if name not in free),
        )
        if key not in seen:
            seen.add(key)
            try:
                prepared(pipe, plan.facts, point)
            except (TypeError, ValueError) as error:
                raise type(error)(f"the checkpoint refuses a point of the sweep: {error}") from None
