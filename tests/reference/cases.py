"""Checkpoints, inputs and settings that are shared by `record.py` and the tests."""

import jax
import numpy as np
from support import tiny


def _noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CHECKPOINTS = {
    "sd1_ddim": {},
    "sd1_pndm": {"scheduler": tiny.PNDM},
    "sd2_ddim": {
        "unet": tiny.UNET_2,
        "text": tiny.TEXT_2,
        "scheduler": tiny.DDIM | {"prediction_type": "v_prediction"},
    },
}
CHECKED = {"sd1_checked": {"safety": tiny.SAFETY}}
INPUTS = {
    "ids": np.random.default_rng(0).integers(0, 58, (2, 12), np.int32),
    "x": _noise(1, 2, 7, 10, 4),
    "timestep": np.array([981.0, 3.0], np.float32),
    "context": _noise(2, 2, 12, 16),
    "image": _noise(3, 2, 12, 16, 3),
    "latents": _noise(4, 2, 6, 9, 4),
}

# Small two-level UNets for DeepFloyd-IF and the x4 upscaler, and input tokens for T5.
_IF = {
    "block_out_channels": [12, 16],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
_UPSCALER = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "only_cross_attention": [False, True],
}
UNETS = {
    # Here the text projection does not change the width.
    "if_1": (tiny.IF_1 | _IF | {"encoder_hid_dim": 64, "addition_embed_type_num_heads": 4}, None),
    "if_2": (tiny.IF_2 | _IF, np.array([0.0, 250.0], np.float32)),
    "upscaler": (tiny.UPSCALER | _UPSCALER, np.array([3, 19])),
}
WORDS = np.random.default_rng(10).integers(0, 60, (2, 24), np.int32)
MASK = np.arange(24) < np.array([[5], [24]])
# Captions that end with the end token and are padded with zeros, as in OpenCLIP.
CAPTIONS = np.where(np.arange(12) < [[1], [4], [11]], np.random.default_rng(13).integers(1, 56, (3, 12)), 0)
CAPTIONS[np.arange(3), [1, 4, 11]] = tiny.TEXT["eos_token_id"]
CAPTIONS[:, 0] = tiny.TEXT["bos_token_id"]


def unet_inputs(name):
    """Returns x (with even height and width), the timesteps, the texts, and the noise levels (or None)."""
    config, labels = UNETS[name]
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return _noise(11, 2, 4, 6, config["in_channels"]), INPUTS["timestep"], _noise(12, 2, 7, width), labels


# uint8 pictures of several sizes, for the safety checker.
SHOWN = [
    np.random.default_rng(9).integers(0, 256, (1, *size, 3), np.uint8)
    for size in ((16, 16), (20, 14), (9, 30), (13, 13), (6, 7), (150, 31))
]

START, OUTPUTS, NOISE = _noise(5, 1, 3, 4), _noise(6, 60, 1, 3, 4), _noise(7, 60, 1, 3, 4)
_ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
_THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 5.0}
_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
_V = {"prediction_type": "v_prediction", "set_alpha_to_one": True}
SCHEDULES = {
    "ddim": (tiny.DDIM, 20, 0.0),
    "ddim_eta_clip": (tiny.DDIM | {"clip_sample": True, "timestep_spacing": "trailing"}, 7, 0.6),
    "ddim_v": (tiny.DDIM | _V | {"timestep_spacing": "linspace", "beta_schedule": "linear"}, 9, 0.0),
    "ddim_cosine": (tiny.DDIM | {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 0}, 12, 1.0),
    "pndm": (tiny.PNDM, 20, 0.0),
    "pndm_v": (tiny.PNDM | _V | {"timestep_spacing": "trailing"}, 6, 0.0),
    "pndm_2": (tiny.PNDM, 2, 0.0),
    "pndm_runge_kutta": (tiny.SCHEDULERS["PNDM, Runge-Kutta"], 8, 0.0),
    "ddpm": (tiny.SCHEDULERS["DDPM"], 8, 1.0),
    "ddpm_large": (tiny.SCHEDULERS["DDPM"] | {"variance_type": "fixed_large", "clip_sample": True} | _ZERO, 8, 1.0),
    "ddpm_threshold": (tiny.SCHEDULERS["DDPM"] | _THRESHOLD, 8, 1.0),
    "euler": (tiny.SCHEDULERS["Euler"], 8, 0.0),
    "euler_v": (tiny.SCHEDULERS["Euler"] | {"timestep_type": "continuous", "use_karras_sigmas": True} | _ZERO, 8, 0.0),
    "euler_ancestral": (tiny.SCHEDULERS["Euler ancestral"] | {"timestep_spacing": "leading"}, 8, 1.0),
    "heun": (tiny.SCHEDULERS["Heun"] | {"clip_sample": True}, 8, 0.0),
    "lms": (tiny.SCHEDULERS["LMS"] | {"prediction_type": "sample"}, 8, 0.0),
    "dpm": (tiny.SCHEDULERS["DPM"] | _V, 16, 0.0),
    "dpm_heun": (tiny.SCHEDULERS["DPM"] | {"solver_type": "heun", "use_karras_sigmas": True}, 8, 0.0),
    "dpm_3": (tiny.SCHEDULERS["DPM"] | {"solver_order": 3, "final_sigmas_type": "sigma_min"}, 8, 0.0),
    "dpm_noise": (
        tiny.SCHEDULERS["DPM"] | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        8,
        0.0,
    ),
    "dpm_stochastic": (tiny.SCHEDULERS["DPM, stochastic"] | {"timestep_spacing": "trailing"}, 8, 1.0),
    "unipc": (tiny.SCHEDULERS["UniPC"], 8, 0.0),
    "unipc_3": (tiny.SCHEDULERS["UniPC"] | {"solver_order": 3, "solver_type": "bh1"} | _SIGMA_MIN, 16, 0.0),
    "unipc_noise": (tiny.SCHEDULERS["UniPC"] | {"predict_x0": False, "disable_corrector": [1]} | _SIGMA_MIN, 8, 0.0),
    "kdpm2": (tiny.FURTHER["KDPM2"] | _V | {"use_karras_sigmas": True}, 8, 0.0),
    "kdpm2_ancestral": (tiny.FURTHER["KDPM2 ancestral"] | {"timestep_spacing": "leading"}, 8, 0.0),
    "dpm_single": (tiny.FURTHER["DPM, single-step"], 9, 0.0),
    "dpm_single_3": (
        tiny.FURTHER["DPM, single-step"] | _SIGMA_MIN | {"solver_order": 3, "solver_type": "heun"},
        9,
        0.0,
    ),
    "dpm_single_stochastic": (
        tiny.FURTHER["DPM, single-step"] | {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
        8,
        0.0,
    ),
    "deis": (tiny.FURTHER["DEIS"] | {"timestep_spacing": "trailing"}, 8, 0.0),
    "deis_3": (tiny.FURTHER["DEIS"] | {"solver_order": 3, "lower_order_final": False}, 8, 0.0),
    "lcm": (tiny.FURTHER["LCM"], 4, 0.0),
    "lcm_clip": (tiny.FURTHER["LCM"] | {"clip_sample": True, "original_inference_steps": 30}, 7, 0.0),
    "tcd": (tiny.FURTHER["TCD"], 5, 0.3),
    "tcd_v": (tiny.FURTHER["TCD"] | _V, 8, 1.0),
    "edm_euler": (tiny.WITHOUT_BETAS["EDM Euler"] | {"sigma_schedule": "exponential", "sigma_max": 9.0}, 8, 0.0),
    "edm_dpm": (tiny.WITHOUT_BETAS["EDM DPM"], 16, 0.0),
    "edm_dpm_stochastic": (tiny.WITHOUT_BETAS["EDM DPM"] | {"algorithm_type": "sde-dpmsolver++"}, 8, 0.0),
    "ipndm": (tiny.WITHOUT_BETAS["IPNDM"], 8, 0.0),
}

# Settings for DeepFloyd-IF's stages and the x4 upscaler: (steps, guidance scale, noise level, the scheduler that adds
# this noise).
STAGES = {
    "stage1": (6, 5.0, None, None),
    "stage2": (5, 4.0, 250, {"_class_name": "DDPMScheduler", **tiny.COSINE}),
    "upscaler": (4, 5.0, 100, {"_class_name": "DDPMScheduler", **tiny.UPSCALER_BETAS}),
}
# Pairs of texts; the first text of each pair is the negative prompt.
TEXTS = {"t5": (WORDS, MASK), "clip": (INPUTS["ids"],)}
SMALL = np.random.default_rng(13).integers(0, 256, (1, 8, 8, 3), np.uint8)
INITIAL, ON_SMALL = 2**32 - 1, 2**32 - 2


def fresh(tag, *shape):
    """Returns the noise [1, *shape] that is drawn for a row with seed 0.

    The tag is the index of a call, `INITIAL` for the initial noise, or `ON_SMALL` for the noise added to the small
    picture at the first call.
    """
    key = jax.random.fold_in(jax.random.key(0), tag)
    key = jax.random.fold_in(key, 0) if tag == ON_SMALL else key
    return np.asarray(jax.random.normal(key, (1, *shape)))


# Stable Diffusion XL with two levels, zeros as the negative prompt, and one edit.
XL = {
    "unet": tiny.UNET_XL
    | {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
    },
    "scheduler": tiny.DDIM,
}
XL_WORDS = ["a cat", "glasses"]
XL_SIZES = {"original_size": (20, 34), "crops_top_left": (3, 5), "target_size": (24, 16)}
XL_STEPS, XL_SCALE, XL_MOMENTUM = 6, 5.0, (0.3, 0.6)
XL_EDIT = {"scale": 6.0, "threshold": 0.8, "warmup": 1, "cooldown": 5}

PROMPTS = ["a cat", "dog, b"]
LATENTS = _noise(8, 2, 8, 8, 4)
XL_LATENTS = LATENTS[:1]
_ONE = {
    "num_inference_steps": 6,
    "editing_prompt": ["glasses"],
    "edit_warmup_steps": 1,
    "edit_cooldown_steps": 5,
    "edit_threshold": 0.8,
}
_THREE = {
    "num_inference_steps": 8,
    "guidance_scale": 5.0,
    "negative_prompt": ["bad", "z"],
    "editing_prompt": ["glasses", "b", "cd"],
    "edit_guidance_scale": [4.0, 6.0, 3.0],
    "edit_warmup_steps": [0, 2, 3],
    "edit_cooldown_steps": [5, 7, 6],
    "edit_threshold": [0.9, 0.5, 0.75],
    "reverse_editing_direction": [False, True, False],
    "edit_weights": [1.0, 2.0, 0.5],
    "edit_momentum_scale": 0.3,
    "edit_mom_beta": 0.6,
}
PICTURES = {
    "none": ("sd1_ddim", {"num_inference_steps": 6}),
    "one": ("sd1_ddim", _ONE),
    "three": ("sd1_ddim", _THREE),
    "one_pndm": ("sd1_pndm", _ONE),
    "three_pndm": ("sd1_pndm", _THREE),
    "three_v": ("sd2_ddim", _THREE),
    "one_checked": ("sd1_checked", _ONE),
}
