"""Compares a checkpoint's pictures with diffusers' published reference pictures for semantic guidance.

diffusers' nightly tests (tests/pipelines/semantic_stable_diffusion/test_semantic_diffusion.py, 2023 to 2025) generated
three pictures with Stable Diffusion 1.5 in float32 on a GPU and compared nine values of each with reference values. The
pictures start from noise that torch drew on a GPU. The script tests/reference/record_cuda_noise.py recorded this noise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.diffusers_api.stable_diffusion import SemanticStableDiffusionPipeline
from sega_jax.text.files import sha256

# The folder with the recorded noise, and the name of the file with the digests (in sha256sum's format).
NOISE, SUMS = Path(__file__).parent / "published_noise", "SHA256SUMS"
# The largest absolute difference that diffusers' tests allow.
TOLERANCE = 1e-2


class Picture(NamedTuple):
    """A published picture.

    Attributes:
        name: a short name.
        seed: the seed of the initial noise.
        call: the arguments of `SemanticStableDiffusionPipeline`.
        blue: the blue channel of the 3 x 3 pixels in the bottom right corner, row by row, in [0, 1].
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
    """Generates a published picture and returns its largest absolute difference from the nine published values.

    As in diffusers' tests, float32 matrices are multiplied in float32; GPUs and TPUs would round them by default.

    Args:
        pipe: a Stable Diffusion 1.5 pipeline.
        picture: the published picture.
        latents: the initial noise, float32 [1, height / 8, width / 8, 4].

    Returns:
        The difference, at least 0; NaN if one of the generated values is NaN.
    """
    with jax.default_matmul_precision("float32"):
        result = pipe(**picture.call, latents=latents, output_type="np", return_dict=False)
    assert isinstance(result, tuple)
    return float(np.abs(result[0][0, -3:, -3:, -1].ravel() - np.asarray(picture.blue)).max())


def noise(seed: int, folder: Path = NOISE) -> np.ndarray:
    """Returns the recorded initial noise of a published picture, float32 [1, 64, 64, 4].

    Args:
        seed: the seed of the picture.
        folder: a folder that contains a `SEED.npy` file with the noise for each seed, and the files' digests in
            SHA256SUMS.

    Raises:
        FileNotFoundError: the noise or SHA256SUMS is missing.
        ValueError: the digest of the noise differs from the one in SHA256SUMS.
    """
    path = folder / f"{seed}.npy"
    if not path.is_file() or not (folder / SUMS).is_file():
        raise FileNotFoundError(
            f"{path} or {folder / SUMS} is missing; record the noise with python tests/reference/record_cuda_noise.py"
            " FOLDER on a machine with an NVIDIA GPU and torch, or leave the folder out to use the recorded noise"
        )
    if f"{sha256(path)}  {path.name}" not in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        raise ValueError(
            f"the digest of {path} is not in {SUMS}; record the noise again, or leave the folder out to use the"
            " recorded noise"
        )
    return np.load(path, allow_pickle=False)
