"""Tests the script that records noise from torch's GPU generator. The tests run on the CPU, and on a GPU if there is
one."""

import numpy as np
import pytest
import torch
from reference import record_cuda_noise

from sega_jax.diffusers_api.published_pictures import PICTURES, noise


def test_the_noise_is_recorded(tmp_path):
    record_cuda_noise.record(tmp_path / "new", "cpu")
    for picture in PICTURES:
        drawn = torch.randn((1, 4, 64, 64), generator=torch.manual_seed(picture.seed))
        recorded = noise(picture.seed, tmp_path / "new")
        assert recorded.dtype == np.float32
        assert np.array_equal(recorded, drawn.numpy().transpose(0, 2, 3, 1))
        assert (tmp_path / "new" / f"{picture.seed}.npy").stat().st_size == 65536 + 128
    assert min(record_cuda_noise.differences(tmp_path / "new").values()) > record_cuda_noise.TOLERANCE  # no GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU")
def test_this_gpu_draws_the_recorded_noise(tmp_path):
    record_cuda_noise.record(tmp_path)
    assert max(record_cuda_noise.differences(tmp_path).values()) < record_cuda_noise.TOLERANCE
