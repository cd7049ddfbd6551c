"""The settings that suit the demo model, as `sega_jax.demo.evaluate` found.

pipe = sega_jax.load()
pipe("a portrait of a woman", [add("glasses"), remove("smile")], **CALL)
"""

from typing import Any

from sega_jax.guidance import Edit

STEPS = 20
CALL = {"steps": STEPS, "guidance_scale": 4.0, "momentum_scale": 0.4, "momentum_beta": 0.4}
_ADD = {"scale": 4.0, "threshold": 0.7, "warmup": 8}
_REMOVE = {"scale": -2.5, "threshold": 0.8, "warmup": 4}


def add(concept: str, *, steps: int = STEPS, **settings: Any) -> Edit:
    """An edit that adds a concept, in a call of so many steps; settings are those of `Edit` that shall be others."""
    return _edit(concept, steps, _ADD | settings)


def remove(concept: str, *, steps: int = STEPS, **settings: Any) -> Edit:
    """An edit that removes a concept; its scale is negative."""
    return _edit(concept, steps, _REMOVE | settings)


def _edit(concept: str, steps: int, settings: dict[str, Any]) -> Edit:
    """Warm-up and cool-down are given for 20 steps, and take the same share of others."""
    for name in ("warmup", "cooldown"):
        if settings.get(name) is not None:
            settings[name] = round(settings[name] * steps / STEPS)
    return Edit(concept, **settings)
