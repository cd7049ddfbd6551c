"""The conditional UNets of diffusers' `UNet2DConditionModel`: those of Stable Diffusion 1.x and 2.x and of its x4
upscaler, and those of DeepFloyd-IF, in pixels."""

from sega_jax.nn.unet.config import UNetConfig
from sega_jax.nn.unet.embedding import guidance_embedding
from sega_jax.nn.unet.model import Context, Projected, UNet2DConditionModel

__all__ = ["Context", "Projected", "UNet2DConditionModel", "UNetConfig", "guidance_embedding"]
