"""Writes small checkpoints of all families in diffusers layout, without torch.

Every tensor is drawn from a generator that is seeded with the tensor's name, so a test and the script that recorded its
expected results use the same numbers. No tensor is zero or the identity, because that could hide errors: scales are
1 + 0.1 N, biases 0.1 N, a safety checker's thresholds 0.6 + 0.06 N, embeddings N, and other weights N / sqrt(fan in).
"""

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from sega_jax.nn.safety import SafetyCheckerConfig, StableDiffusionSafetyChecker
from sega_jax.systems import deepfloyd, original_files, sdxl
from sega_jax.systems import paella as paella_system
from sega_jax.systems import upscaler as upscaler_system
from sega_jax.systems.registry import single_files
from sega_jax.systems.stable_diffusion import Models
from sega_jax.weights.layout import from_torch, leaves, torch_name, torch_shape

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
# Options of SD 2.x and other models: a list of head counts, linear projections, and several layers.
UNET_2 = UNET | {
    "attention_head_dim": [1, 2, 3],
    "use_linear_projection": True,
    "upcast_attention": True,
    "layers_per_block": [1, 2, 1],
    "transformer_layers_per_block": [1, 2, 1],
}
# Options of Stable Diffusion XL: no attention on the first level, more layers on the last, and conditioning on a
# pooled embedding and sizes.
UNET_XL = UNET | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2, 3],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "cross_attention_dim": 36,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}
# Options of the x4 upscaler: some levels attend only to the text, and the noise level is an input.
UPSCALER = UNET | {
    "in_channels": 7,
    "block_out_channels": [8, 16, 16, 24],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
    "num_class_embeds": 20,
}
# DeepFloyd-IF's first stage. The second stage has lists of layer counts, a noise level, and an activation for the
# embedded time.
IF_1 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 2,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"],
    "act_fn": "gelu",
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 6,
    "resnet_time_scale_shift": "scale_shift",
}
IF_2 = IF_1 | {
    "in_channels": 6,
    "block_out_channels": [12, 16, 24],
    "layers_per_block": [1, 2, 3],
    "down_block_types": [*["ResnetDownsampleBlock2D"] * 2, "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", *["ResnetUpsampleBlock2D"] * 2],
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552,
    "resnet_skip_time_act": True,
    "time_embedding_dim": 20,
    "time_embedding_act_fn": "gelu",
}
# A first stage for pipelines, and a second stage that enlarges pictures by a factor of 4 in each direction.
STAGE_1 = IF_1 | {"block_out_channels": [8, 16], "layers_per_block": 1}
STAGE_1 |= {"down_block_types": IF_1["down_block_types"][:2], "up_block_types": IF_1["up_block_types"][1:]}
STAGE_2 = IF_2 | {"sample_size": 32, "block_out_channels": [8, 16], "layers_per_block": [1, 2]}
STAGE_2 |= {"down_block_types": IF_2["down_block_types"][1:], "up_block_types": IF_2["up_block_types"][:2]}
# One level, which compiles in half the time, for tests that do not need more.
UNET_1 = UNET | {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
# Only the middle block has attention.
UNET_0 = UNET_1 | {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
VAE_1 = VAE | {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_act": "quick_gelu",
    "bos_token_id": 56,
    "eos_token_id": 57,
    "pad_token_id": 57,
}
# OpenCLIP's options.
TEXT_PROJECTED = TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "projection_dim": 12,
    "pad_token_id": 0,
}
TEXT_XL_2 = TEXT_PROJECTED | {"hidden_size": 20, "num_hidden_layers": 3}
TEXT_2 = TEXT | {"hidden_act": "gelu", "num_hidden_layers": 3}
T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 60,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}
# Paella's networks: levels with and without attention, and every kind of block.
PAELLA = {
    "c_in": 6,
    "c_out": 6,
    "num_labels": 20,
    "c_r": 9,
    "c_cond": 14,
    "c_hidden": [8, 16, 24],
    "nhead": [1, 2, 3],
    "blocks": [1, 2, 1],
    "level_config": ["CT", "CTA", "CTAF"],
    "clip_embd": 12,
    "byt5_embd": 18,
    "clip_seq_len": 2,
}
VQGAN = {"levels": 3, "bottleneck_blocks": 2, "c_hidden": 16, "c_latent": 3, "codebook_size": 24, "scale_factor": 0.4}
PRIOR = {"clip_r": 12, "c_hidden": 10, "c_r": 9, "num_blocks": 3}
# Networks for pipelines: two levels, grid sides that are multiples of 4, and tokens of 4x4 pixels.
PAELLA_PARTS = {
    "byt5": T5 | {"vocab_size": 259, "d_model": 18, "num_layers": 2},
    "clip": TEXT_PROJECTED,
    "prior": PRIOR,
    "denoiser": PAELLA
    | {"c_hidden": [8, 16], "nhead": [1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"], "sample_size": 4},
    "vqgan": VQGAN | {"levels": 2, "codebook_size": 20},
}
SAFETY = {
    "architectures": ["StableDiffusionSafetyChecker"],
    "model_type": "clip",
    "projection_dim": 8,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 5,
    },
}
FEATURES = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 13, "crop_size": 12, "resample": 3}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
IF_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    **COSINE,
    "clip_sample": True,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "variance_type": "learned_range",
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UPSCALER_BETAS = SD_BETAS | {"beta_start": 0.0001, "beta_end": 0.02}
DDIM = {"_class_name": "DDIMScheduler", **SD_BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PNDM = {
    "_class_name": "PNDMScheduler",
    **SD_BETAS,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EULER = {"_class_name": "EulerDiscreteScheduler", **SD_BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
X4_SCHEDULER = DDIM | {"prediction_type": "v_prediction"}
# The networks of the x4 upscaler, whose autoencoder enlarges latents by a factor of 4.
X4 = {
    "unet": UPSCALER | {"num_class_embeds": 400},
    "text": TEXT | {"hidden_act": "gelu"},
    "vae": VAE
    | {"block_out_channels": [8, 8, 16], "scaling_factor": 0.08333}
    | {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
}
# Two levels, which compile in half the time.
X4_UNET_2 = X4["unet"] | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "only_cross_attention": [True, False],
}
# The most common schedulers with Stable Diffusion's betas. PNDM is listed without and with its default Runge-Kutta
# start.
SCHEDULERS = {
    "DDIM": DDIM,
    "PNDM": PNDM,
    "PNDM, Runge-Kutta": PNDM | {"skip_prk_steps": False},
    "DDPM": {"_class_name": "DDPMScheduler", **SD_BETAS, "clip_sample": False, "steps_offset": 1},
    "Euler": {"_class_name": "EulerDiscreteScheduler", **SD_BETAS},
    "Euler ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", **SD_BETAS},
    "Heun": {"_class_name": "HeunDiscreteScheduler", **SD_BETAS},
    "LMS": {"_class_name": "LMSDiscreteScheduler", **SD_BETAS},
    "DPM": {"_class_name": "DPMSolverMultistepScheduler", **SD_BETAS},
    "DPM, stochastic": {
        "_class_name": "DPMSolverMultistepScheduler", **SD_BETAS, "algorithm_type": "sde-dpmsolver++"
    },
    "UniPC": {"_class_name": "UniPCMultistepScheduler", **SD_BETAS},
}  # fmt: skip
# The other schedulers. Only fast tests use them, because the schedulers above cover the common code.
FURTHER = {
    "KDPM2": {"_class_name": "KDPM2DiscreteScheduler", **SD_BETAS},
    "KDPM2 ancestral": {"_class_name": "KDPM2AncestralDiscreteScheduler", **SD_BETAS},
    "DPM, single-step": {"_class_name": "DPMSolverSinglestepScheduler", **SD_BETAS},
    "DEIS": {"_class_name": "DEISMultistepScheduler", **SD_BETAS},
    "LCM": {"_class_name": "LCMScheduler", **SD_BETAS},
    "TCD": {"_class_name": "TCDScheduler", **SD_BETAS},
}
# Schedulers for networks that were not trained with betas.
WITHOUT_BETAS = {
    "EDM Euler": {"_class_name": "EDMEulerScheduler"},
    "EDM DPM": {"_class_name": "EDMDPMSolverMultistepScheduler"},
    "IPNDM": {"_class_name": "IPNDMScheduler"},
}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws the float32 tensor for the given name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith(("bias", ".beta")):
        return 0.1 * noise
    if name.endswith("embeds_weights"):
        return 0.6 + 0.06 * noise
    if len(shape) == 1 or name.endswith(".gamma"):
        return 1 + 0.1 * noise
    if "embedding" in name and "time" not in name:
        return noise
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))


def networks(*, unet=UNET, vae=VAE, text=TEXT) -> Models:
    return (upscaler_system.Models if "num_class_embeds" in unet else Models).build(text, unet, vae)


def tensors(module: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns every tensor of a network's checkpoint, with torch's names and layout."""
    return {prefix + name: values(name, shape) for name, shape in leaves(module).items()}


def filled(module: Any, dtype: DTypeLike = np.float32, part: str = "") -> Any:
    """Fills a network with its tensors, without a file.

    If the module is only a part of a network, `part` is its dotted path.
    """
    prefix = f"{part}." if part else ""

    def read(path, leaf):
        array = values(prefix + torch_name(path), torch_shape(path, leaf.shape))
        return jnp.asarray(from_torch(path, array), dtype)

    return jax.tree_util.tree_map_with_path(read, module)


def checkpoint(
    folder: Path,
    *,
    unet=UNET,
    vae=VAE,
    text=TEXT,
    safety=None,
    scheduler=DDIM,
    length=12,
    dtype=np.float32,
    prefix="",
) -> Path:
    """Writes a checkpoint and returns its folder. `safety` is the config of a safety checker, or None."""
    models = networks(unet=unet, vae=vae, text=text)
    parts = {
        "text_encoder": (text, models.text_encoder, "model", prefix),
        "unet": (unet, models.unet, "diffusion_pytorch_model", ""),
        "vae": (vae, models.vae, "diffusion_pytorch_model", ""),
    }
    if safety is not None:
        checker = StableDiffusionSafetyChecker(SafetyCheckerConfig.from_dict(safety))
        parts["safety_checker"] = (safety, checker, "model", "")
        (folder / "feature_extractor").mkdir(parents=True)
        write_json(folder / "feature_extractor" / "preprocessor_config.json", FEATURES)
    _write(folder, parts, scheduler, dtype)
    (folder / "tokenizer").mkdir()
    tokenizer(folder / "tokenizer", length)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if safety else [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if safety else [None, None],
        "requires_safety_checker": bool(safety),
    }
    write_json(folder / "model_index.json", index)
    return folder


def _write(folder: Path, parts: dict[str, tuple], scheduler: dict, dtype: DTypeLike = np.float32) -> None:
    """Writes the folders of the scheduler and the networks.

    `parts` is {part: (config, module, stem of the weight file, prefix of the tensors' names)}.
    """
    for part, (config, module, stem, start) in parts.items():
        (folder / part).mkdir(parents=True)
        write_json(folder / part / "config.json", config)
        arrays = {name: array.astype(dtype) for name, array in tensors(module, start).items()}
        save_file(arrays, folder / part / f"{stem}.safetensors", {"format": "pt"})
    _write_scheduler(folder / "scheduler", scheduler)


def _write_scheduler(folder: Path, config: dict) -> None:
    folder.mkdir()
    write_json(folder / "scheduler_config.json", config)


def stage(folder: Path, unet=STAGE_1, *, text=T5, scheduler=IF_SCHEDULER, safety=False) -> Path:
    """Writes a checkpoint for a DeepFloyd-IF stage; the UNet's config decides which stage.

    The checkpoint has no text encoder if `text` is None. `safety` adds the name of a safety checker without its files.
    """
    models = deepfloyd.Models.build(text, unet)
    parts = {"unet": (unet, models.unet, "diffusion_pytorch_model", "")}
    if text is not None:
        parts["text_encoder"] = (text, models.text_encoder, "model", "")
    second = deepfloyd.sizes(models).enlarges
    _write(folder, parts, scheduler | ({"sample_max_value": 1.0} if second else {}))
    if second:
        _write_scheduler(folder / "image_noising_scheduler", {"_class_name": "DDPMScheduler", **COSINE})
    if text is not None:
        t5_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "IFSuperResolutionPipeline" if second else "IFPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": safety,
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"] if safety else [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"] if text else [None, None],
        "tokenizer": ["transformers", "T5Tokenizer"] if text else [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": [None, None],
    }
    if second:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    write_json(folder / "model_index.json", index)
    return folder


def upscaler(folder: Path, unet=X4["unet"], *, text=X4["text"]) -> Path:
    """Writes a checkpoint for Stable Diffusion's x4 upscaler, with a tokenizer that fits the text encoder's length."""
    networks = X4 | {"unet": unet, "text": text}
    checkpoint(folder, **networks, scheduler=X4_SCHEDULER, length=text["max_position_embeddings"])
    _write_scheduler(folder / "low_res_scheduler", {"_class_name": "DDPMScheduler", **UPSCALER_BETAS})
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("feature_extractor", "requires_safety_checker", "safety_checker"):
        del index[name]
    index |= {"_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": 350}
    write_json(folder / "model_index.json", index | {"low_res_scheduler": ["diffusers", "DDPMScheduler"]})
    return folder


def xl(folder: Path, *, unet=UNET_XL, vae=VAE, scheduler=EULER, text=TEXT, text_2=TEXT_XL_2, index=None) -> Path:
    """Writes a Stable Diffusion XL checkpoint, with tokenizers that fit the text encoders' lengths."""
    models = sdxl.Models.build(text, text_2, unet, vae)
    parts = {
        "text_encoder": (text, models.text_encoder, "model", "text_model."),
        "text_encoder_2": (text_2, models.text_encoder_2, "model", ""),
        "unet": (unet, models.unet, "diffusion_pytorch_model", ""),
        "vae": (vae, models.vae, "diffusion_pytorch_model", ""),
    }
    _write(folder, parts, scheduler)
    for part, config, pad in (("tokenizer", text, "<|endoftext|>"), ("tokenizer_2", text_2, "a")):
        (folder / part).mkdir()
        tokenizer(folder / part, config["max_position_embeddings"], pad)
    names = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.1",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", names | (index or {}))
    return folder


def original_names(module, start):
    """Returns {key in diffusers' layout: full name in single files} for a network whose names start with `start`."""
    networks = [table for file in single_files() for tables in file.networks.values() for table in tables]
    return next(table for table in networks if table.start == start).full_names(module)


def original(*, unet=UNET, vae=VAE, text=TEXT, text_2=None, openclip=False, ema=False) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint with the original names, as in a single file.

    Args:
        unet, vae, text: the configs of the networks.
        text_2: the config of the second text encoder, for a Stable Diffusion XL file.
        openclip: names the text encoder's tensors as OpenCLIP does, with one more layer.
        ema: adds a moving average of the UNet's weights, which differs from the weights.
    """
    models, arrays = networks(unet=unet, vae=vae, text=text) if text_2 is None else None, {}
    starts = (original_files.OPENCLIP if openclip else original_files.CLIP, original_files.UNET, original_files.VAE)
    if text_2 is not None:
        models = sdxl.Models.build(text, text_2, unet, vae)
        starts = (original_files.CLIP_XL, original_files.OPENCLIP_XL, original_files.UNET, original_files.VAE)
    for module, start in zip(models, starts, strict=True):
        names, fused = original_names(module, start), {}
        for key, array in tensors(module).items():
            name, _, part = names[key].rstrip("]").partition("[")
            if name.endswith(".text_projection"):
                array = np.ascontiguousarray(array.T)
            if part:
                fused.setdefault(name, {})[part] = array
            else:
                # The autoencoder's attention consists of 1x1 convolutions.
                arrays[name] = array[:, :, None, None] if ".attn_1." in name and array.ndim == 2 else array
        for name, parts in fused.items():
            arrays[name] = np.concatenate([parts[part] for part in ("q_proj", "k_proj", "v_proj")])
    if openclip:
        unused = {key: key.replace("resblocks.0.", f"resblocks.{text['num_hidden_layers']}.") for key in arrays}
        arrays |= {new: arrays[key] + 1 for key, new in unused.items() if new != key}
        arrays[f"{original_files.OPENCLIP}text_projection"] = np.ones([text["hidden_size"]] * 2, np.float32)
        arrays[f"{original_files.OPENCLIP}logit_scale"] = np.ones([], np.float32)
    else:
        start = original_files.CLIP if text_2 is None else original_files.CLIP_XL
        arrays[f"{start}text_model.embeddings.position_ids"] = np.arange(12)[None]
    if ema:
        for key in [key for key in arrays if key.startswith(original_files.UNET)]:
            arrays["model_ema." + key.removeprefix("model.").replace(".", "")] = arrays[key] + np.float32(0.01)
        arrays["model_ema.decay"] = np.full((), 0.9999, np.float32)
    arrays["alphas_cumprod"] = np.ones(1000, np.float32)
    return arrays


def paella(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Writes a Paella checkpoint as a conversion does, without the networks named in `without`."""
    configs = {part: None if part in without else config for part, config in PAELLA_PARTS.items()}
    models = paella_system.Models.build(**configs)
    index = {"_class_name": "PaellaPipeline"}
    for part, module in models._asdict().items():
        index[part] = [None, None] if module is None else ["sega_jax", type(module).__name__]
        if module is not None:
            stem = "model" if part in ("byt5", "clip") else "diffusion_pytorch_model"
            (folder / part).mkdir(parents=True)
            write_json(folder / part / "config.json", configs[part])
            save_file(tensors(module), folder / part / f"{stem}.safetensors", {"format": "pt"})
    if models.clip is not None:
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        (folder / "tokenizer").mkdir()
        tokenizer(folder / "tokenizer", 12)
    write_json(folder / "model_index.json", index)
    return folder


def t5_tokenizer(folder: Path) -> None:
    """Writes a T5 tokenizer whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir()
    letters = [chr(i) for i in range(97, 123)] + [",", "."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *((c, -3.0) for c in letters)]
    t5 = Tokenizer(models.Unigram([*vocabulary, ("at", -4.0), ("\u2581a", -4.0)], unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
    write_json(folder / "tokenizer_config.json", special | config)


def spiece(folder: Path, extra: int = 0) -> None:
    """Replaces the tokenizer.json of a T5 tokenizer with a spiece.model that has `extra` additional special tokens."""
    from transformers.convert_slow_tokenizer import import_protobuf

    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    model = import_protobuf().ModelProto()
    for i, (piece, score) in enumerate(pieces):
        model.pieces.add(piece=piece, score=score, type={0: 3, 1: 3, 2: 2}.get(i, 1))
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id = 2
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(extra)]}
    write_json(folder / "tokenizer_config.json", config | names | {"extra_ids": extra})
    special = {name: config[name] for name in ("eos_token", "pad_token", "unk_token")}
    write_json(folder / "special_tokens_map.json", special | names)


def thresholds(special: np.ndarray, concepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns thresholds for a safety checker's cosines [pictures, n] that flag the first and second pictures.

    The second picture is flagged only because a special-care concept lowers the other thresholds. The third picture is
    equally near to an ordinary concept, but not near to a special-care concept. No other picture is near a concept.
    """
    care, near = np.full(special.shape[1], 2, np.float32), np.full(concepts.shape[1], 2, np.float32)
    for least, cosines, picture, beyond in (
        (near, concepts, 0, 0.02),
        (near, concepts, 1, -0.005),
        (care, special, 1, 0.02),
        (near, concepts, 2, -0.005),
    ):
        ahead = cosines[picture] - np.delete(cosines, picture, 0).max(0)
        assert ahead.max() > 0.04, "another picture is equally near; use other pictures"
        least[ahead.argmax()] = cosines[picture, ahead.argmax()] - beyond
    return care, near


def tokenizer(folder: Path, length: int, pad: str = "<|endoftext|>") -> None:
    """Writes a CLIP tokenizer whose tokens are letters."""
    letters = [chr(i) for i in range(97, 123)] + [",", "."]
    names = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {name: i for i, name in enumerate(names)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    special["unk_token"] = "<|endoftext|>"
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    write_json(folder / "tokenizer_config.json", special | config)


def shard(weights: Path) -> tuple[Path, dict[str, Any]]:
    """Splits a weight file into two files and returns the path and content of the index."""
    names = [weights.name.replace(".safetensors", f"-0000{i}-of-00002.safetensors") for i in (1, 2)]
    tensors = load_file(weights)
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if places[key] == name}, weights.with_name(name))
    weights.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    path = weights.with_name(weights.name + ".index.json")
    write_json(path, index)
    return path, index


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(copy.deepcopy(value), indent=2))
