"""Converts small checkpoints from safetensors to the Flax format of diffusers 0.30 and transformers 4.46.

The names of the Linen modules are written here by hand. They were compared once with the parameters that those versions
of the libraries create from torch's weights for the same networks.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
from flax import serialization
from safetensors.numpy import load_file

from support import tiny

CLASSES = ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection")
CLASSES += ("StableDiffusionSafetyChecker", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
CLASSES += ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")


def linen_path(key: str, array: np.ndarray, transformers: bool) -> tuple[str, ...]:
    """Returns the path of a parameter in the Linen module, given its key in torch's file.

    Keys of transformers networks start with the name of the tower, such as "text_model.".
    """
    if not transformers:
        key = re.sub(r"\.(\d+)", r"_\1", key)
        for ours, linen in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out_0", "proj_attn")):
            if key.startswith(("encoder.", "decoder.")):
                key = key.replace(f"mid_block.attentions_0.{ours}.", f"mid_block.attentions_0.{linen}.")
    *parents, last = key.split(".")
    if last == "weight":
        last = "embedding" if parents[-1].endswith("_embedding") and array.ndim == 2 else "kernel"
        if array.ndim == 1:
            last = "scale"
    return (*parents, last)


def tree(tensors: dict[str, np.ndarray], transformers: bool) -> dict:
    """Returns the parameters of a Linen module as a nested dictionary, from torch's tensors."""
    root: dict = {}
    for key, array in tensors.items():
        *parents, last = linen_path(key, array, transformers)
        inside = root
        for parent in parents:
            inside = inside.setdefault(parent, {})
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim) if last == "kernel" else None
        inside[last] = array if axes is None else np.ascontiguousarray(array.transpose(axes))
    return root


def tree_of(path: Path) -> dict:
    """Returns the parameters of a Linen module from a safetensors file that `tiny` wrote."""
    tensors, part = load_file(path), path.parent.name
    if part == "text_encoder":
        tensors = {re.sub(r"^(?!text_model\.)", "text_model.", key): array for key, array in tensors.items()}
    if part == "safety_checker":
        tensors = {re.sub(r"^(?=vision_model\.)", "vision_model.", key): array for key, array in tensors.items()}
    return tree(tensors, path.name == "model.safetensors")


def write(path: Path, content: dict) -> Path:
    path.write_bytes(serialization.msgpack_serialize(content))
    return path


def flax_path(path: Path) -> Path:
    """Returns the path of the msgpack file that replaces a safetensors file."""
    name = {"model.safetensors": "flax_model", "diffusion_pytorch_model.safetensors": "diffusion_flax_model"}
    return path.with_name(f"{name[path.name]}.msgpack")


def checkpoint(source: Path, folder: Path) -> Path:
    """Copies a checkpoint from `tiny`, with msgpack instead of safetensors files and Flax's class names."""
    shutil.copytree(source, folder)
    for path in folder.rglob("*.safetensors"):
        write(flax_path(path), tree_of(path))
        path.unlink()
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("scheduler/*.json")]:
        text = path.read_text()
        for name in CLASSES if "architectures" not in json.loads(text) else ():
            text = text.replace(f'"{name}"', f'"Flax{name}"')
        path.write_text(text)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    only_flax = {"use_memory_efficient_attention": False, "split_head_dim": False, "dropout": 0.0}
    tiny.write_json(folder / "unet" / "config.json", unet | only_flax)
    return folder
