"""The recommended settings for the demo model, chosen with `sega_jax.demo.evaluate`.

pipe = sega_jax.load()
pipe("a portrait of a woman", [add("glasses"), remove("smile")], **CALL)

With up to 256 pictures for each of 41 words (`python -m sega_jax.demo.evaluate.diffusion FOLDER`), adding succeeds in
98 % of the pictures and keeps 91 % of the other attributes; removing succeeds in 93 % and keeps 76 %. With larger
scales, edits succeed more often but keep fewer of the other attributes.
"""

from typing import Any

from sega_jax.method.guidance import Edit

STEPS = 20
CALL = {"steps": STEPS, "guidance_scale": 4.0, "momentum_scale": 0.4, "momentum_beta": 0.4}
_ADD = {"scale": 5.0, "threshold": 0.7, "warmup": 8}
_REMOVE = {"scale": -5.0, "threshold": 0.9, "warmup": 2}


def add(concept: str, *, steps: int = STEPS, **settings: Any) -> Edit:
    """Returns an edit that adds a concept.

    Args:
        concept: one of `sega_jax.demo.attributes.WORDS` or a synonym.
        steps: the number of steps of the call.
        settings: arguments of `Edit` that replace the recommended ones.
    """
    return Edit(concept, **_at(steps, _ADD) | settings)


def remove(concept: str, *, steps: int = STEPS, **settings: Any) -> Edit:
    """Returns an edit that removes a concept. To remove a concept that the prompt names, use a scale of -8 to -12.

    Args:
        concept: one of `sega_jax.demo.attributes.WORDS` or a synonym.
        steps: the number of steps of the call.
        settings: arguments of `Edit` that replace the recommended ones. A scale must be negative.
    """
    return Edit(concept, **_at(steps, _REMOVE) | settings)


def _at(steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Adapts the warm-up, which was chosen for 20 steps, to the given number of steps."""
    return settings | {"warmup": round(settings["warmup"] * steps / STEPS)}
