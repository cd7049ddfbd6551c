"""Tests our NumPy version of torch's GPU noise against known values."""

import numpy as np
import pytest
from support.cuda_noise import MOST, normal, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox(counter, key, expected):
    """The expected values are the known answers for philox4x32 with 10 rounds that Philox's authors published."""
    words = tuple(np.array([int(word, 16)], np.uint64) for word in counter.split())
    result = philox(words, tuple(int(word, 16) for word in key.split()))
    assert " ".join(f"{int(word[0]):08x}" for word in result) == expected


def test_values_printed_by_torch():
    """The expected values are torch.randn(19, device="cuda") after torch.manual_seed(42), printed to four digits."""
    expected = [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175, 0.5280, -1.2753, -1.6621, -0.3033]
    expected += [-0.0926, 0.1992, -1.1204, 1.8577, -0.7145, 0.6881, 0.7968]
    noise = normal(42, (19,))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, expected, rtol=0, atol=6e-5)
    assert np.array_equal(normal(42, (1, 4, 64, 64)).ravel()[:19], noise)


def test_all_64_bits_of_a_seed_count():
    assert not np.array_equal(normal(2**32 + 42, (19,)), normal(42, (19,)))
    assert np.isfinite(normal(2**64 - 1, (MOST,))).all()


@pytest.mark.parametrize(("seed", "shape"), [(-1, (2,)), (2**64, (2,)), (0, (MOST + 1,))])
def test_unsupported_seeds_and_shapes_are_errors(seed, shape):
    with pytest.raises(ValueError, match=r"should be from 0 to 2\^64 - 1, and shape=.* at most 16384 values"):
        normal(seed, shape)
