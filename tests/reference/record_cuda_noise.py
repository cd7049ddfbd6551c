"""Records the initial noise of the reference pictures that diffusers published for its semantic guidance.

    python tests/reference/record_cuda_noise.py FOLDER

The script needs an NVIDIA GPU and torch, but not diffusers. For each of the three pictures, it writes the noise to
`SEED.npy` (float32 [1, 64, 64, 4], channels last, 64 KB). It also writes the digests of these files. Finally, it
compares this noise with the noise in the library, which was recorded by this script on an H200 with torch 2.11.
`sega-jax verify MODEL --noise FOLDER` reads the folder.

In diffusers 0.14, `prepare_latents` called `randn_tensor` with the shape (1, 4, 64, 64), the text embeddings' dtype
(float32), and a generator on the GPU, which drew all the noise in a single operation. This script does the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from sega_jax.diffusers_api.published_pictures import PICTURES, SUMS, noise
from sega_jax.text.files import sha256

SHAPE = (1, 4, 64, 64)
# The largest allowed difference between noise drawn on different GPUs.
TOLERANCE = 1e-5


def draw(seed: int, device: str) -> torch.Tensor:
    """Draws the noise for a seed in the same way as diffusers' `randn_tensor`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, device=torch.device(device), dtype=torch.float32)


def record(folder: Path, device: str = "cuda") -> None:
    """Writes the noise for all pictures, and the digests of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for picture in PICTURES:
        path = folder / f"{picture.seed}.npy"
        np.save(path, np.ascontiguousarray(draw(picture.seed, device).movedim(1, -1).cpu().numpy()))
        lines.append(f"{sha256(path)}  {path.name}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def differences(folder: Path) -> dict[int, float]:
    """Returns {seed: the largest difference between the noise in a folder and the library's}."""
    seeds = [picture.seed for picture in PICTURES]
    return {seed: float(np.abs(noise(seed, folder) - noise(seed)).max()) for seed in seeds}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch finds no NVIDIA GPU, and only NVIDIA GPUs draw this noise; run this on a machine that has one")
    target = Path(sys.argv[1])
    record(target)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n{(target / SUMS).read_text()}Wrote {target}")
    print(f"Largest differences from the library's noise, by seed: {differences(target)}")
    sys.exit(max(differences(target).values()) > TOLERANCE)
