"""Stubs of the torch objects that are used in code written for diffusers, and a hub of small checkpoints."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from support import loras, sdxl_files, tiny

SD, SD_CHECKED, SD_2, XL = "owner/sd", "owner/sd-checked", "owner/sd-2", "owner/xl"
STAGE_1, STAGE_2, UPSCALER = "owner/if-1", "owner/if-2", "owner/x4"
LORA, OTHER_LORA, WORD, NAMED_WORD, VAE = (
    "owner/lora",
    "owner/other-lora",
    "owner/word",
    "owner/named-word",
    "owner/vae",
)


class Named:
    """A stub of a torch dtype or device, which has only a name."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    __repr__ = __str__


class Generator:
    """A stub of a torch generator, which has only a seed."""

    def __init__(self, device="cpu"):
        self.device, self.seed = Named(device), 67280421310721

    def manual_seed(self, seed):
        self.seed = seed
        return self

    def initial_seed(self):
        return self.seed


float16, bfloat16, float32 = (Named(f"torch.{name}") for name in ("float16", "bfloat16", "float32"))


class Hub:
    """Replaces the hub's client; every repository is a local folder."""

    def __init__(self, folder, stages):
        self.calls, rng = [], np.random.default_rng(0)
        self.folders = {STAGE_1: stages["stage1"], STAGE_2: stages["stage2"], UPSCALER: stages["upscaler"]}
        smallest = {"unet": tiny.UNET_0, "vae": tiny.VAE_1, "text": tiny.TEXT | {"num_hidden_layers": 1}}
        self.folders[SD] = tiny.checkpoint(folder / "sd", **smallest)
        self.folders[SD_CHECKED] = tiny.checkpoint(folder / "checked", **smallest, safety=tiny.SAFETY)
        v = tiny.DDIM | {"prediction_type": "v_prediction"}
        self.folders[SD_2] = tiny.checkpoint(folder / "sd2", **smallest, scheduler=v)
        self.folders[XL] = tiny.xl(folder / "xl", unet=sdxl_files.UNET, vae=tiny.VAE_1)
        for name in (SD, SD_2, XL):
            for path in list(self.folders[name].rglob("*.safetensors")):
                shutil.copy(path, path.with_suffix(".fp16.safetensors"))
        save_file(
            tiny.original(unet=sdxl_files.UNET, vae=tiny.VAE_1, text_2=tiny.TEXT_XL_2),
            self.folders[XL] / "xl_base.safetensors",
        )
        for name in (LORA, OTHER_LORA, WORD, NAMED_WORD):
            self.folders[name] = folder / name.partition("/")[2]
            self.folders[name].mkdir()
        self.models, vectors = {}, rng.standard_normal((1, 16)).astype(np.float32)
        save_file({"<art>": vectors}, self.folders[WORD] / "learned_embeds.safetensors")
        save_file({"emb_params": vectors}, self.folders[NAMED_WORD] / "negative.safetensors")
        self.folders[VAE] = Path(shutil.copytree(self.folders[XL] / "vae", folder / "vae"))

    def add_loras(self, models):
        """Writes LoRAs for the networks of the SDXL checkpoint."""
        for name, seed in ((LORA, 1), (OTHER_LORA, 2)):
            loras.write(
                self.folders[name] / "lora.safetensors", models, {"unet": ["time_embedding.linear_1"]}, seed=seed
            )

    def __call__(self, repo_id, *, revision=None, allow_patterns, **options):
        self.calls.append((repo_id, revision, options))
        return str(self.folders[repo_id])
