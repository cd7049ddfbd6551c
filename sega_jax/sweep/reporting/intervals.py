"""Means with 95 % confidence intervals. Both kinds of interval assume that the pictures are independent."""

import math
from typing import NamedTuple

import numpy as np

_Z = 1.96  # 95 % of a normal distribution is within this many standard deviations of its mean


class Mean(NamedTuple):
    """A mean, and the ends of its confidence interval. With a single number, both ends are NaN."""

    mean: float
    low: float
    high: float


def mean(numbers: np.ndarray) -> Mean:
    """Returns the mean m of n >= 1 numbers, with the interval m +- 1.96 s / sqrt(n).

    s is the standard deviation with the divisor n - 1. The interval assumes that means of n numbers are distributed
    normally. For small n it is too narrow: with 4 numbers from a normal distribution, it contains the true mean with a
    probability of 0.855 (`2 * scipy.stats.t.cdf(1.96, 3) - 1`).

    Example:
        >>> import numpy as np
        >>> from sega_jax.sweep.reporting.intervals import mean
        >>> [round(end, 2) for end in mean(np.array([1.0, 2.0, 3.0]))]
        [2.0, 0.87, 3.13]
    """
    centre = float(numbers.mean())
    if numbers.size < 2:
        return Mean(centre, math.nan, math.nan)
    half = _Z * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    return Mean(centre, centre - half, centre + half)


def mean_probability(numbers: np.ndarray) -> Mean:
    """Returns the mean m of n >= 1 probabilities, with Wilson's score interval. It is always within [0, 1].

    With z = 1.96, the ends are (m + z^2 / 2n +- z sqrt(m (1 - m) / n + z^2 / 4n^2)) / (1 + z^2 / n). They are the means
    that differ from m by z standard errors, if every number is 0 or 1. For numbers between 0 and 1, the interval is
    wider than necessary, because no other numbers in [0, 1] with the same mean have a larger variance. Unlike an
    interval from the standard deviation, it has a width even if all numbers are equal: four pictures out of four are
    not evidence for a probability of 1.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
        Statistical Association 22, 1927.

    Example:
        >>> import numpy as np
        >>> from sega_jax.sweep.reporting.intervals import mean_probability
        >>> [round(end, 2) for end in mean_probability(np.ones(4))]
        [1.0, 0.51, 1.0]
    """
    centre, n = float(numbers.mean()), numbers.size
    if n < 2:
        return Mean(centre, math.nan, math.nan)
    middle = centre + _Z**2 / (2 * n)
    half = _Z * math.sqrt(centre * (1 - centre) / n + (_Z / (2 * n)) ** 2)
    low, high = ((middle + sign * half) / (1 + _Z**2 / n) for sign in (-1, 1))
    # Rounding may move an end that is 0 or 1 by a tiny amount.
    return Mean(centre, max(low, 0.0), min(high, 1.0))
