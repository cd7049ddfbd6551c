"""The schedule of tokens, which are renoised and drawn anew."""

import numpy as np

from sega_jax.method.schedules.calls import Row, TokenRow, table


def renoising(steps: int, *, renoise_steps: int | None = None, temperature: tuple[float, float] = (1.2, 0.2)) -> Row:
    """Rows of Paella's sampler: time falls from 1 to 0 in equal steps, and so does the share of renoised positions.

    Args:
        steps: of the model, one a row.
        renoise_steps: after how many of them no position is renoised any more; None is all but the last.
        temperature: of the first step and of the last, and even steps between.

    Raises:
        ValueError: less than one step, other numbers of renoised steps, or a temperature that is not positive.
    """
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    if steps < 1:
        raise ValueError(f"steps={steps} should be at least 1")
    if not 0 <= renoise_steps <= steps:
        raise ValueError(f"renoise_steps={renoise_steps} should be from 0 to steps={steps}")
    if not all(np.isfinite(value) and value > 0 for value in temperature) or len(temperature) != 2:
        raise ValueError(f"temperature={temperature} should be two positive numbers, of the first step and the last")
    times = np.linspace(1, 0, steps + 1)
    row = TokenRow(np.linspace(*temperature, steps), times[1:], np.arange(steps) < renoise_steps)
    return table(times[:-1], row)
