"""What the package brings along, and the sizes of the published networks."""

import importlib.metadata
import math

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from published import SD_1, SD_2

from sega_jax.checkpoint import leaves
from sega_jax.systems.stable_diffusion import Models


def test_the_package_brings_no_torch():
    found, waiting = set(), ["sega_jax"]
    while waiting:
        name = waiting.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            needed = canonicalize_name(requirement.name)
            if needed not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found.add(needed)
                waiting.append(needed)
    assert {"jax", "flax", "optax", "safetensors", "numpy"} <= found
    assert not {"torch", "diffusers", "accelerate"} & found


@pytest.mark.parametrize(
    ("configs", "totals"),
    [
        (SD_1, Models(text_encoder=123_060_480, unet=859_520_964, vae=83_653_863)),
        (SD_2, Models(text_encoder=340_387_840, unet=865_910_724, vae=83_653_863)),
    ],
    ids=["Stable Diffusion 1.5", "Stable Diffusion 2.1"],
)
def test_parameters_of_the_published_networks(configs, totals):
    models = Models.build(**configs)
    counts = Models(*(sum(map(math.prod, leaves(module).values())) for module in models))
    assert counts == totals
