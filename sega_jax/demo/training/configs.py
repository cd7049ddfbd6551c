"""The configs of the demo model, for a checkpoint in diffusers layout."""

from typing import Any, NamedTuple

from sega_jax.demo.training.portraits import SIDE
from sega_jax.demo.training.wording import LENGTH


class Configs(NamedTuple):
    """The config of each component. Training adds the size of the vocabulary to the text encoder's config."""

    text_encoder: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]


DEMO = Configs(
    text_encoder={
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    unet={
        "_class_name": "UNet2DConditionModel",
        "sample_size": SIDE // 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [64, 128, 192],
        # The finest level has the most positions, so attention would be expensive there. The text influences it
        # through the coarser levels.
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": [2, 4, 6],
        "cross_attention_dim": 192,
        "norm_num_groups": 16,
    },
    vae={
        "_class_name": "AutoencoderKL",
        "sample_size": SIDE,
        "latent_channels": 4,
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 16,
    },
    # With linear betas, almost nothing of the picture remains visible at the last timestep. With Stable Diffusion's
    # betas, the noisiest latents still show the colour of large areas (Lin et al. 2024), which the prompt should
    # determine. Predicting v also gives more weight to noisy timesteps.
    scheduler={
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    },
)

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
