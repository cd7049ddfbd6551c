"""Single-file checkpoints of Stable Diffusion: small ones, and the tensor shapes of published ones."""

import shutil
from contextlib import contextmanager

from sega_jax.systems import original_files, registry, sdxl, stable_diffusion
from sega_jax.systems.stable_diffusion import Models
from sega_jax.weights.layout import leaves
from support import tiny

KINDS = {
    "1": {"unet": tiny.UNET, "text": tiny.TEXT},
    "2": {"unet": tiny.UNET_2, "text": tiny.TEXT_2},
}


@contextmanager
def resembling(checkpoint, folder):
    """Makes Stable Diffusion's single-file loading use a checkpoint's configs, which are copied to a folder.

    The name of the folder, such as "sd-1.5", decides which vocabulary is downloaded.
    """
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    file = original_files.STABLE_DIFFUSION_FILE._replace(published=lambda *_: folder)
    system = stable_diffusion.SYSTEM
    registry.register(system._replace(checkpoint=system.checkpoint._replace(single_file=file)))
    try:
        yield
    finally:
        registry.unregister(system.name)


def shapes(config, openclip=False):
    """Returns the shape of every tensor of a published single file, computed from our parameters."""
    xl = "text_encoder_2" in config
    models, shape_of = (sdxl.Models if xl else Models).build(**config), {}
    starts = (original_files.OPENCLIP if openclip else original_files.CLIP, original_files.UNET, original_files.VAE)
    starts = (
        (original_files.CLIP_XL, original_files.OPENCLIP_XL, original_files.UNET, original_files.VAE) if xl else starts
    )
    for module, start in zip(models, starts, strict=True):
        names = tiny.original_names(module, start)
        for key, shape in leaves(module).items():
            tensor, _, part = names[key].partition("[")
            assert bool(part) or tensor not in shape_of
            if part:
                shape = (shape_of.get(tensor, (0,))[0] + shape[0], *shape[1:])
            shape = shape[::-1] if tensor.endswith(".text_projection") else shape
            shape_of[tensor] = (*shape, 1, 1) if ".attn_1." in tensor and len(shape) == 2 else shape
    return shape_of
