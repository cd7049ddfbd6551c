"""Tests confidence intervals against their definitions."""

import numpy as np
import pytest

from sega_jax.sweep.reporting.intervals import mean, mean_probability

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "numbers", [RNG.uniform(size=n) for n in (2, 3, 50)] + [np.zeros(4), np.ones(7), np.full(3, 0.3)]
)
def test_ends_of_the_interval_of_a_probability(numbers):
    """The mean differs from each end by 1.96 standard errors of a mean of Bernoulli variables with this end as their
    probability. The ends of an interval that reaches 0 or 1 are the exceptions, because they have no standard error."""
    centre, low, high = mean_probability(numbers)
    assert centre == numbers.mean()
    assert 0 <= low <= centre + 1e-12
    assert centre - 1e-12 <= high <= 1
    for end in (low, high):
        assert abs(centre - end) == pytest.approx(1.96 * np.sqrt(end * (1 - end) / numbers.size), abs=1e-7)
    assert high - low > 0.1


def test_the_interval_of_probabilities_contains_their_mean_often_enough():
    draws = RNG.uniform(size=(2000, 8)) < 0.15
    inside = [low <= 0.15 <= high for _, low, high in map(mean_probability, draws.astype(float))]
    assert np.mean(inside) > 0.93


def test_other_intervals_are_not_limited():
    numbers = np.array([0.0, 0.0, 1.0])
    centre, low, high = mean(numbers)
    assert low < 0
    assert high - centre == pytest.approx(1.96 * numbers.std(ddof=1) / np.sqrt(3))
    assert centre - low == pytest.approx(high - centre)
    assert mean(np.full(3, 0.5)) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("interval", [mean, mean_probability])
def test_a_single_number_has_no_interval(interval):
    centre, *ends = interval(np.array([0.3]))
    assert centre == 0.3
    assert np.isnan(ends).all()
