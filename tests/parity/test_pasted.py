"""Values of torch in pasted code, as torch has them."""

import pytest

pytest.importorskip("torch")

import jax
import numpy as np
import torch

from sega_jax.diffusers_api import StableDiffusionPipeline
from sega_jax.diffusers_api.torch_values import Seeds, devices_of, is_dtype, is_generator
from sega_jax.pipelines.execution.devices import Devices

pytestmark = pytest.mark.parity


def test_dtypes_and_devices(small_folder):
    """They are told apart, and mean what their names say."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert is_dtype(dtype)
    current = Devices(jax.devices()[:1])
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        assert not is_dtype(device)
        assert devices_of(device, current) is current
    face = StableDiffusionPipeline.from_pretrained(small_folder, torch_dtype=torch.bfloat16, device_map="cpu")
    assert str(face.dtype) == "bfloat16"
    assert str(face.to(torch.device("cpu"), torch.float32).dtype) == "float32"


def test_generators():
    """The seed of a generator, and another one for its next picture."""
    generator = torch.Generator("cpu").manual_seed(31)
    assert is_generator(generator)
    seeds = Seeds(generator)
    assert seeds.value == 31
    seeds.advance()
    assert Seeds(generator).value != 31
    assert Seeds(generator.manual_seed(31)).value == 31
    assert 0 <= Seeds(torch.Generator()).value < 2**32
    assert not is_generator(np.random.default_rng(0))
