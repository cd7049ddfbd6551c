"""The pictures that diffusers published for its semantic guidance, and how near a checkpoint's pictures come to them.

The nightly tests of diffusers (tests/pipelines/semantic_stable_diffusion/test_semantic_diffusion.py, 2023 to 2025) made
three pictures with Stable Diffusion 1.5 in float32 on a GPU and compared nine values of each. The pictures start from
noise that torch drew on a GPU; tests/reference/record_cuda_noise.py recorded it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.diffusers_api.stable_diffusion import SemanticStableDiffusionPipeline
from sega_jax.text.files import sha256

# The recorded noise, and the digests in such a folder: one line a file, as the command sha256sum writes it.
NOISE, SUMS = Path(__file__).parent / "published_noise", "SHA256SUMS"
# As in the tests of diffusers.
TOLERANCE = 1e-2


class Picture(NamedTuple):
    """A published picture.

    Attributes:
        seed: of the noise that it begins with.
        call: arguments of `SemanticStableDiffusionPipeline`.
        blue: the blue of the last 3 x 3 pixels, row by row, in [0, 1].
    """

    name: str
    seed: int
    call: Mapping[str, Any]
    blue: tuple[float, ...]


_SETTINGS = {"guidance_scale": 7, "edit_momentum_scale": 0.5, "edit_mom_beta": 0.6}
PICTURES = (
    Picture(
        "sunglasses",
        3,
        {
            **_SETTINGS,
            "prompt": "a photo of a cat",
            "editing_prompt": ["sunglasses"],
            "reverse_editing_direction": [False],
            "edit_warmup_steps": 10,
            "edit_guidance_scale": 6,
            "edit_threshold": 0.95,
        },
        (0.4189, 0.3773, 0.3014, 0.4142, 0.4166, 0.3628, 0.3619, 0.4336, 0.4300),
    ),
    Picture(
        "no crowd",
        9,
        {
            **_SETTINGS,
            "prompt": "an image of a crowded boulevard, realistic, 4k",
            "editing_prompt": "crowd, crowded, people",
            "reverse_editing_direction": True,
            "edit_warmup_steps": 10,
            "edit_guidance_scale": 8.3,
            "edit_threshold": 0.9,
        },
        (0.3090, 0.3050, 0.2902, 0.3063, 0.3257, 0.2942, 0.2908, 0.2872, 0.2770),
    ),
    Picture(
        "boat and monet",
        48,
        {
            **_SETTINGS,
            "prompt": "a castle next to a river",
            "editing_prompt": ["boat on a river, boat", "monet, impression, sunrise"],
            "reverse_editing_direction": False,
            "edit_warmup_steps": [15, 18],
            "edit_guidance_scale": 6,
            "edit_threshold": [0.9, 0.8],
        },
        (0.7355, 0.7537, 0.7434, 0.6648, 0.6473, 0.6304, 0.6481, 0.6750, 0.6517),
    ),
)


def difference(pipe: SemanticStableDiffusionPipeline, picture: Picture, latents: np.ndarray) -> float:
    """Makes a published picture with a checkpoint and returns the largest absolute difference of its nine values.

    The result is NaN if one of the values is.

    Matrices of float32 are multiplied in float32, as in the tests of diffusers; GPUs and TPUs would round them first.

    Args:
        pipe: of Stable Diffusion 1.5.
        picture: what to make.
        latents: the noise that the picture begins with, float32 [1, height / 8, width / 8, 4].
    """
    with jax.default_matmul_precision("float32"):
        result = pipe(**picture.call, latents=latents, output_type="np", return_dict=False)
    assert isinstance(result, tuple)
    return float(np.abs(result[0][0, -3:, -3:, -1].ravel() - np.asarray(picture.blue)).max())


def noise(seed: int, folder: Path = NOISE) -> np.ndarray:
    """Returns the noise that a GPU drew for the seed of a picture, float32 [1, 64, 64, 4].

    Args:
        seed: of a picture.
        folder: has `SEED.npy` with what a GPU drew, and the digests of such files.

    Raises:
        FileNotFoundError: the folder does not have it.
        ValueError: the file is not the one that was recorded.
    """
    path = folder / f"{seed}.npy"
    if not path.is_file() or not (folder / SUMS).is_file():
        raise FileNotFoundError(
            f"{path} or {folder / SUMS} is missing; record the noise on a machine with an NVIDIA GPU and torch, by"
            " python tests/reference/record_cuda_noise.py FOLDER, or leave the folder out"
        )
    if f"{sha256(path)}  {path.name}" not in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        raise ValueError(f"{path} is not the file whose digest is in {SUMS}; record it again, or leave the folder out")
    return np.load(path, allow_pickle=False)
