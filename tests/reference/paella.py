"""Inputs for Paella's networks, shared by `record_paella.py` and the tests, and functions that read the results."""

from functools import cache
from pathlib import Path

import numpy as np
from support import tiny

HERE = Path(__file__).parent
# Text files that list the name and shape of every tensor in the published files.
PUBLISHED = {"paella": "paella_v3.txt", "vqgan": "vqgan_f4.txt", "prior": "prior_v1.txt"}


def _noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Texts of several lengths, with and without CLIP's embeddings of the text and of one or two pictures.
_FULL = {"byt5": _noise(0, 2, 7, 18), "clip": _noise(1, 2, 12), "clip_image": _noise(2, 2, 12)}
CONDITIONS = {
    "full": _FULL,
    "influenced": _FULL,
    "empty": {"byt5": _noise(3, 1, 1, 18), "clip": _noise(4, 1, 12)},
    "text": {"byt5": _noise(5, 1, 5, 18)},
    "pictures": {"byt5": _noise(6, 1, 4, 18), "clip_image": _noise(7, 1, 2, 12)},
    "apart": {"byt5": _noise(8, 1, 4, 18), "clip": _noise(9, 1, 12)},
}
# Noise levels for the embedding at its published width.
LEVELS = np.linspace(0, 1, 33, dtype=np.float32)
# The factors by which the public inference script multiplies attention.
INFLUENCE = (1.2, 0.4)


def paella(name):
    """Returns the config of a case; in the case "apart", attention attends only to the text."""
    return tiny.PAELLA | {"self_attn": name != "apart"}


def paella_inputs(name):
    """Returns token grids and their noise levels."""
    batch, rng = len(CONDITIONS[name]["byt5"]), np.random.default_rng(10)
    size = (8, 16) if batch > 1 else (16, 8)
    return rng.integers(0, 20, (batch, *size)), np.array([1.0, 0.37], np.float32)[-batch:]


# {path: number of input channels} for each kind of block in Paella's denoiser.
BLOCKS = {
    "down_blocks.0.0": 8,
    "down_blocks.0.1": 8,
    "down_blocks.1.0": 8,
    "down_blocks.1.3": 16,
    "down_blocks.2.4": 24,
    "up_blocks.0.4": 24,
    "up_blocks.1.0": 16,
}
# The same for the VQGAN, and the path of the prior's block.
VQ_BLOCKS = {"down_blocks.2": 8, "down_blocks.1": 4, "down_blocks.5": 16, "up_blocks.3": 16}
PRIOR_BLOCK = "blocks.1"
STDS = (1.0, 0.01)
# Paella at its published width, with one block of each kind per level. The outputs of the second level's blocks are
# recorded, but only every 40th channel is kept.
WIDE = {"blocks": [1, 1, 1], "num_labels": 4}
WIDE_BLOCKS = {"up_blocks.1.0": 1280, "up_blocks.1.1": 1280, "up_blocks.1.2": 1280}


def block_inputs(channels, std, level=9, text=14):
    """Returns x and a skip tensor with `channels` channels each, an embedded noise level, and a condition's tokens."""
    picture = [np.float32(std) * _noise(seed, 1, 4, 6, channels) for seed in (11, 12)]
    return *picture, _noise(13, 1, level), _noise(14, 1, 5, text)


def wide_inputs(channels):
    return block_inputs(channels, 1.0, 64, 1024)


def prior_block_input(std):
    return np.float32(std) * _noise(15, 2, 31)


# Inputs for runs of the two public samplers with a batch of two: the text of each branch, and the random numbers. The
# runs are recorded in float64 only, where no two tokens have equal probability. The temperatures are high, so that the
# random numbers matter.
BRANCHES = {
    "uncond": {"byt5": _noise(21, 1, 1, 18), "clip": _noise(22, 1, 12)},
    "cond": {"byt5": _noise(23, 1, 7, 18), "clip": _noise(24, 1, 12), "clip_image": _noise(25, 1, 12)},
    "edit": {"byt5": _noise(26, 1, 3, 18), "clip": _noise(27, 1, 12)},
}
START = np.random.default_rng(28).integers(0, 20, (2, 4, 8))
GUMBEL = np.random.default_rng(29).gumbel(size=(6, *START.shape, 20))
UNIFORM = np.random.default_rng(30).random((6, *START.shape))
CFG, TEMPERATURE = 8.0, (9.0, 2.0)
# The published sampler, and the sampler by the authors of semantic guidance, where threshold and momentum have no
# effect.
SAMPLERS = {
    "published": {"steps": 5, "renoise_steps": 4},
    "edited": {"steps": 6, "renoise_steps": 4, "edit_guidance_scale_c": 7.0, "edit_warmup_steps_c": 2}
    | {"reverse_editing_direction_c": True, "edit_threshold_c": 0.8, "edit_momentum_scale": 0.5},
    "quantised": {"steps": 4, "renoise_steps": 3, "mode": "quant"},
}
# Inputs for the prior: two text embeddings, the initial noise, and the noise for each of the prior's 60 calls.
IMAGINED = (_noise(31, 2, 12), _noise(32, 61, 2, 12))


IMAGE = np.random.default_rng(16).random((2, 16, 24, 3), np.float32)
TOKENS = np.random.default_rng(17).integers(0, 24, (2, 3, 2))
LATENTS = _noise(18, 2, 2, 3, 3)
PRIOR = (_noise(19, 2, 12), np.array([1.0, 0.37], np.float32), _noise(20, 2, 12))


@cache
def recorded(dtype):
    """Returns the arrays in `paella_DTYPE.npz` as {name: array}."""
    with np.load(HERE / f"paella_{dtype}.npz") as file:
        return dict(file)


def published(network):
    """Returns the shapes of the tensors in a published file as {name: shape}."""
    lines = (HERE / PUBLISHED[network]).read_text().splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in map(str.split, lines)}
