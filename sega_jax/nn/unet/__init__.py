"""The networks that diffusers implements as `UNet2DConditionModel`: Stable Diffusion 1.x and 2.x, Stable Diffusion XL,
the x4 upscaler, and DeepFloyd-IF, which works on pixels."""

from sega_jax.nn.unet.config import UNetConfig
from sega_jax.nn.unet.embedding import guidance_embedding
from sega_jax.nn.unet.model import Context, Projected, UNet2DConditionModel

__all__ = ["Context", "Projected", "UNet2DConditionModel", "UNetConfig", "guidance_embedding"]
