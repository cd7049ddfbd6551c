"""Supports diffusers' `callback_on_step_end`, a callback that can read the latents and end the sampling."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sega_jax.pipelines.run import Interruption


class StepEnd:
    """A native callback that calls a diffusers callback.

    The diffusers callback is called with (pipe, step, timestep, {"latents": array}) and must return the mapping
    unchanged. The latents have channels last. The array is read-only, because changing it would not affect the
    sampling. If the callback sets `pipe._interrupt = True`, the sampling ends and the current latents are decoded.

    Args:
        pipe: the pipeline to pass to the callback.
        function: the diffusers callback.
    """

    def __init__(self, pipe: Any, function: Callable[..., Any]):
        self._pipe, self._function = pipe, function

    def __call__(self, call: int, timestep: float, state: Any) -> None:
        """Calls the diffusers callback.

        Raises:
            ValueError: the callback set an attribute on the pipeline or returned a changed mapping.
            Interruption: the callback set `pipe._interrupt = True`.
        """
        latents = np.asarray(state)
        latents.flags.writeable = False
        callback_kwargs = {"latents": latents}
        before = dict(vars(self._pipe))
        returned = self._function(self._pipe, call, int(timestep), callback_kwargs)
        for name, value in vars(self._pipe).items():
            if name != "_interrupt" and (name not in before or before[name] is not value):
                raise ValueError(
                    f"callback_on_step_end set pipe.{name}, which has no effect during a call; set it before the call,"
                    " or make one call for each value"
                )
        if isinstance(returned, Mapping):
            for name, value in returned.items():
                if value is not callback_kwargs.get(name):
                    raise ValueError(
                        f"callback_on_step_end returned a changed {name!r}, but callbacks cannot change a running call;"
                        " return callback_kwargs unchanged"
                    )
        if self._pipe._interrupt:
            raise Interruption
