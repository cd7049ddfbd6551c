"""The schedule of Paella's sampler, which draws tokens and resets some positions to noise."""

import numpy as np

from sega_jax.method.naming import assignment
from sega_jax.method.schedules.calls import Row, TokenRow, table


def renoising(steps: int, *, renoise_steps: int | None = None, temperature: tuple[float, float] = (1.2, 0.2)) -> Row:
    """Returns the table for Paella's sampler.

    Time falls from 1 to 0 in equal steps, and the share of renoised positions falls with it.

    Args:
        steps: The number of steps. Each step is one model call.
        renoise_steps: How many steps renoise positions, counted from the first step; None means all steps except the
            last.
        temperature: The temperatures of the first and last steps, both positive. The temperatures between them are
            evenly spaced.

    Raises:
        ValueError: `steps` is below 1, `renoise_steps` is not between 0 and `steps`, or `temperature` is not a pair of
            positive numbers.
    """
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    if steps < 1:
        raise ValueError(f"{assignment('steps', steps)} should be at least 1")
    if not 0 <= renoise_steps <= steps:
        raise ValueError(
            f"{assignment('renoise_steps', renoise_steps)} should be from 0 to {assignment('steps', steps)}"
        )
    if not all(np.isfinite(value) and value > 0 for value in temperature) or len(temperature) != 2:
        raise ValueError(
            f"{assignment('temperature', temperature)} should be two positive numbers, for the first and last steps"
        )
    times = np.linspace(1, 0, steps + 1)
    row = TokenRow(np.linspace(*temperature, steps), times[1:], np.arange(steps) < renoise_steps)
    return table(times[:-1], row)
