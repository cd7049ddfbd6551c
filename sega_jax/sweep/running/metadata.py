"""The metadata that a sweep stores in its pictures and records."""

import datetime
from typing import Any

import jax

import sega_jax
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.sweep.description.fields import adapter_kinds
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.stages import is_own
from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import records


def record(plan: Plan, i: int, pipe: Pipeline) -> dict[str, Any]:
    """Returns the record of point i, without the columns that depend on its batch or its picture."""
    columns: dict[str, Any] = {}
    for stage in plan.chain:
        point = stage.point(i)
        columns |= records.settings(point, stage.facts, solver(stage, point))
    return columns | _guided(plan, i) | common(plan, pipe)


def _guided(plan: Plan, i: int) -> dict[str, Any]:
    """Returns the column "edited", which lists the stages of a cascade that the edits guide."""
    if plan.earlier is None:
        return {}
    return {"edited": ", ".join(str(stage.facts.stage) for stage in plan.chain if stage.point(i).edits) or None}


def common(plan: Plan, pipe: Pipeline) -> dict[str, Any]:
    """Returns the columns that describe the time, the model, the device and the software versions."""
    model = plan.facts.first.model
    return {
        "made": datetime.datetime.now(datetime.UTC),
        "device": pipe.devices.devices[0].device_kind,
        "devices": len(pipe.devices),
        "model": model.get("source"),
        "revision": model.get("revision"),
        "dtype": pipe.dtype.name,
        "sega_jax": sega_jax.__version__,
        "jax": jax.__version__,
    }


def solver(plan: Plan, point: Point) -> str | None:
    """Returns the class name of a point's scheduler; None if the family has its own schedule."""
    scheduler = plan.facts.scheduler_of(point.scheduler)
    return None if scheduler is None else scheduler.name


def picture_metadata(plan: Plan, i: int, pipe: Pipeline) -> dict[str, Any]:
    """Returns the metadata that is stored in the picture of point i. `sega-jax info` reads it."""
    first, *later = ((stage.facts, stage.point(i)) for stage in plan.chain)
    facts, point = first
    edits = next((acting_edits(one) for _, one in (first, *later) if one.edits), [])
    entries: dict[str, Any] = {"picture": "edited" if edits else "original", "model": facts.model.get("source")}
    entries |= {"system": facts.system, "revision": facts.model.get("revision")}
    entries |= point.call | {"scheduler": point.scheduler, "edits": edits, "dtype": pipe.dtype.name}
    entries |= {"variant": facts.model.get("variant"), "solver": solver(plan.chain[0], point)}
    entries |= _adapters(point, "")
    for facts, point in later:
        stage = str(facts.stage)
        entries |= {stage: facts.model.get("source"), f"{stage}_revision": facts.model.get("revision")}
        entries |= {f"{stage}_{name}": value for name, value in point.call.items() if is_own(name)}
        entries |= {f"{stage}_scheduler": point.scheduler} | _adapters(point, f"{stage}_")
    if later and edits:
        entries |= {"edited": [facts.stage for facts, point in (first, *later) if point.edits]}
    entries |= {"safety_checker": plan.sweep.model.get("safety_checker", True)}
    return entries | {key: common(plan, pipe)[key] for key in ("device", "sega_jax", "jax")}


def acting_edits(point: Point) -> list[dict[str, Any]]:
    """Returns the settings of the active edits."""
    return [vars(edit) for edit in point.edits.values()]


def _adapters(point: Point, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": adapter_kinds()[name].words(pairs) for name, pairs in point.adapters}
