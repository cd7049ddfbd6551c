"""diffusers' callbacks at the end of a step, which see the latents and may end the sampling."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sega_jax.pipelines.run import Interruption


class StepEnd:
    """A native callback that calls one of diffusers' form: (pipe, step, timestep, {"latents": array}) -> that mapping.

    The latents are read-only, and channels last: what a compiled program computes next does not pass through Python.
    The callback may set `pipe._interrupt = True`, which decodes the latents so far.
    """

    def __init__(self, face: Any, function: Callable[..., Any]):
        self._face, self._function = face, function

    def __call__(self, call: int, timestep: float, state: Any) -> None:
        latents = np.asarray(state)
        latents.flags.writeable = False
        given = {"latents": latents}
        before = dict(vars(self._face))
        returned = self._function(self._face, call, int(timestep), given)
        for name, value in vars(self._face).items():
            if name != "_interrupt" and (name not in before or before[name] is not value):
                raise ValueError(
                    f"callback_on_step_end set pipe.{name}, which changes nothing during a call; set it before, or make"
                    " one call for each value"
                )
        if isinstance(returned, Mapping):
            for name, value in returned.items():
                if value is not given.get(name):
                    raise ValueError(
                        f"callback_on_step_end returned another {name}, which cannot be changed during a call; return"
                        " callback_kwargs as it is given"
                    )
        if self._face._interrupt:
            raise Interruption
