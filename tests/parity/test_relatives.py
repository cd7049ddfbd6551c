"""Compares variants of Stable Diffusion and SDXL with diffusers: distilled networks, smaller UNets, and EDM training.

A small network with random weights represents each variant. For calls without edits, the tests compare the pictures and
the latents after every call. For Stable Diffusion 1.x, they also compare the recorded arrays of a call with edits.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch
from safetensors.numpy import save_file
from support import loras, tiny

import sega_jax
from parity import theirs
from parity.both import differ, run
from parity.theirs import double, first, fresh, inject, last, noise, relative
from sega_jax.nn.unet import guidance_embedding
from sega_jax.weights.layout import leaves

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

SEED, PROMPTS, END = 7, ["a cat", "dog, b"], 1e-4
TRAILING = {"timestep_spacing": "trailing"}
TWO_LEVELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}
XL_TWO_LEVELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 2],
}
# The name suffixes of the layers that the published LCM LoRA changes.
LCM_LORA = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
# The mean and standard deviation of each channel in Playground 2.5's latents.
STATISTICS = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
# {name: (UNet, scheduler, (steps, our guidance_scale, diffusers' guidance_scale, eta))}
STABLE_DIFFUSION = {
    "LCM": (TWO_LEVELS | {"time_cond_proj_dim": 18}, tiny.FURTHER["LCM"], (4, 6.5, 6.5, None)),
    "Turbo": (TWO_LEVELS, tiny.SCHEDULERS["Euler ancestral"] | TRAILING, (1, 1.0, 0.0, None)),
}
# The UNets that are also tested with edits.
EDITED = {"BK-SDM": {"mid_block_type": None}, "one resnet in the middle": {"mid_block_type": "UNetMidBlock2D"}}
XL = {
    "SSD-1B": (
        XL_TWO_LEVELS
        | {
            "layers_per_block": 2,
            "mid_block_type": "UNetMidBlock2D",
            "down_block_types": ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2,
            "transformer_layers_per_block": [[1, 2], [2, 1]],
            "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1]],
        },
        tiny.EULER,
        (4, 5.0, 5.0, None),
    ),
    "Vega": (
        XL_TWO_LEVELS
        | {
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, [2, 2]],
            "reverse_transformer_layers_per_block": [[1, 2, 1], 1],
        },
        tiny.EULER,
        (4, 5.0, 5.0, None),
    ),
    "KOALA": (
        XL_TWO_LEVELS | {"mid_block_type": None, "transformer_layers_per_block": [0, 3]},
        tiny.EULER,
        (4, 5.0, 5.0, None),
    ),
    "LCM": (XL_TWO_LEVELS | {"time_cond_proj_dim": 16}, tiny.FURTHER["LCM"], (4, 8.0, 8.0, None)),
    "Playground": (XL_TWO_LEVELS, tiny.WITHOUT_BETAS["EDM DPM"], (6, 3.0, 3.0, None)),
}


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion(name, tmp_path, one_device):
    unet, scheduler, call = STABLE_DIFFUSION[name]
    folder = tiny.checkpoint(tmp_path / "tiny", unet=tiny.UNET | unet, scheduler=scheduler, vae=tiny.VAE_1)
    plain(folder, diffusers.StableDiffusionPipeline.from_pretrained(folder), one_device, call)


@pytest.mark.parametrize("name", XL)
def test_xl(name, tmp_path, one_device):
    unet, scheduler, call = XL[name]
    vae = tiny.VAE_1 | (STATISTICS if "Playground" in name else {})
    folder = tiny.xl(tmp_path / "tiny", unet=tiny.UNET_XL | unet, scheduler=scheduler, vae=vae)
    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    plain(folder, reference, one_device, call)


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_the_lora_of_lcm(naming, tmp_path, one_device):
    """The LoRA changes the same layers as the published one, and the checkpoint has a different scheduler."""
    pytest.importorskip("peft")
    folder = tiny.checkpoint(tmp_path / "tiny", unet=tiny.UNET | TWO_LEVELS, scheduler=tiny.PNDM, vae=tiny.VAE_1)
    shapes = leaves(tiny.networks(unet=tiny.UNET | TWO_LEVELS).unet)
    rng, layers = np.random.default_rng(0), {}
    for name in (key.removesuffix(".weight") for key in shapes if key.endswith(".weight")):
        if name.endswith(LCM_LORA):
            outputs, inputs, *window = shapes[f"{name}.weight"]
            down = 0.2 * rng.standard_normal((4, inputs, *window))
            up = 0.2 * rng.standard_normal((outputs, 4, *[1] * len(window)))
            layers["unet", name] = (up.astype(np.float32), down.astype(np.float32), np.float32(2))
    save_file(loras.tensors(layers, loras.NAMINGS[naming], alpha=naming == "kohya"), tmp_path / "lcm.safetensors")
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference.scheduler = diffusers.LCMScheduler.from_config(reference.scheduler.config)
    reference.load_lora_weights(tmp_path, weight_name="lcm.safetensors")
    options = {"lora": tmp_path / "lcm.safetensors", "scheduler": "LCMScheduler"}
    plain(folder, reference, one_device, (4, 1.0, 1.0, None), **options)


def plain(folder, reference, device, call, **options):
    """Checks that without edits, both libraries give the same latents and pictures from the same noise."""
    steps, scale, their_scale, eta = call
    ours = sega_jax.load(folder, devices=device, dtype="float32", **options)
    shape, seen, expected = ours.latent_shape(), [], []
    reference.set_progress_bar_config(disable=True)
    inject(reference.scheduler, fresh(range(SEED, SEED + 2), shape))
    start = noise(2, *shape)
    a = ours(
        PROMPTS,
        seed=SEED,
        steps=steps,
        guidance_scale=scale,
        latents=start,
        output="float",
        eta=eta,
        callback=lambda *step: seen.append(step[2]),
        progress=False,
    )

    def keep(pipe, i, t, values):
        expected.append(last(values["latents"]))
        return values

    b = reference(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=their_scale,
        latents=first(start),
        output_type="np",
        callback_on_step_end=keep,
        **({} if eta is None else {"eta": eta}),
    )
    assert len(seen) == len(expected) == steps
    assert max(relative(x, y) for x, y in zip(seen, expected, strict=True)) < END
    np.testing.assert_allclose(a.images, b.images, atol=20 * END)


@pytest.mark.parametrize("name", EDITED)
def test_edits(name, tmp_path, one_device):
    unet = tiny.UNET | TWO_LEVELS | EDITED[name]
    folder = tiny.checkpoint(tmp_path / "tiny", unet=unet, scheduler=tiny.DDIM, vae=tiny.VAE_1)
    ours, reference = theirs.load(folder, "float32", one_device)
    call = {
        "prompt": PROMPTS,
        "num_inference_steps": 6,
        "editing_prompt": ["glasses", "b"],
        "edit_warmup_steps": [1, 2],
        "edit_cooldown_steps": [5, 6],
        "edit_threshold": [0.8, 0.6],
        "edit_guidance_scale": [4, 6],
    }
    results = run(ours, reference, call | {"output_type": "np"})
    for array in ("latents", "uncond_estimates", "text_estimates", "edit_estimates", "sem_guidance"):
        assert relative(*results[array]) < 3e-4, array
    assert differ(*results["images"]) <= 1e-3


def test_the_embedding_of_the_guidance_scale():
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    for channels in (18, 256, 17):
        with double():
            scales = np.array([1.0, 1.7, 7.5, 15.0])
            expected = embed(None, torch.tensor(scales) - 1, embedding_dim=channels, dtype=torch.float64)
            np.testing.assert_allclose(guidance_embedding(scales, channels), expected, atol=1e-9)
            # At the largest scale, rounding a frequency to float32 changes the phase by 1e-3.
            np.testing.assert_allclose(guidance_embedding(scales.astype(np.float32), channels), expected, atol=3e-3)
