"""Records results of torch, transformers and diffusers on small checkpoints, for tests that run without torch.

    pip install -e ".[parity]" && python tests/reference/record.py

The script writes `tests/reference/*.npz` (float32, channels last), and the files `xl_*.txt`, which list the names and
shapes of all tensors in Stable Diffusion XL base. The stored files were made with torch 2.13.0, diffusers 0.42.1 and
transformers 5.23.0 on a CPU. The weights come from `tests/support/tiny.py`, the inputs from `cases.py` in this folder.
"""

import functools
import importlib
import itertools
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
from parity import if_loops
from PIL import Image
from reference import cases
from support import names, published, tiny

from sega_jax import Edit

HERE = Path(__file__).parent
diffusers.utils.logging.set_verbosity_error()


def first(array):
    """Converts an array to a tensor with channels first."""
    return torch.tensor(np.moveaxis(array, -1, -3) if array.ndim > 3 else array)


def last(tensor):
    return tensor.detach().movedim(-3, -1).numpy()


def networks(name):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny.checkpoint(Path(folder) / "tiny", **cases.CHECKPOINTS[name])
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    with torch.no_grad():
        vae, inputs = pipe.vae, {key: first(value) for key, value in cases.INPUTS.items()}
        posterior = vae.encode(inputs["image"]).latent_dist
        return {
            "text": pipe.text_encoder(inputs["ids"].long()).last_hidden_state.numpy(),
            "unet": last(pipe.unet(inputs["x"], inputs["timestep"], inputs["context"]).sample),
            "mean": last(posterior.mean),
            "logvar": last(posterior.logvar),
            "decoded": last(vae.decode(inputs["latents"]).sample),
        }


def unet(name):
    config, _ = cases.UNETS[name]
    net = diffusers.UNet2DConditionModel.from_config(config).eval()
    net.load_state_dict({key: torch.tensor(tiny.values(key, tensor.shape)) for key, tensor in net.state_dict().items()})
    x, *others = cases.unet_inputs(name)
    others = [None if other is None else torch.tensor(other) for other in others]
    return {"output": last(net(first(x), *others).sample)}


def t5():
    net = transformers.T5EncoderModel(transformers.T5Config(**tiny.T5)).eval()
    names = {key: key.replace("encoder.embed_tokens", "shared") for key in net.state_dict()}
    net.load_state_dict(
        {key: torch.tensor(tiny.values(names[key], tensor.shape)) for key, tensor in net.state_dict().items()}
    )
    states = net(torch.tensor(cases.WORDS), torch.tensor(cases.MASK)).last_hidden_state
    return {"states": states.detach().numpy()}


def projection():
    net = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**tiny.TEXT_PROJECTED)).eval()
    net.load_state_dict({key: torch.tensor(tiny.values(key, tensor.shape)) for key, tensor in net.state_dict().items()})
    return {"embeddings": net(torch.tensor(cases.CAPTIONS)).text_embeds.detach().numpy()}


def safety():
    with tempfile.TemporaryDirectory() as folder:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            tiny.checkpoint(Path(folder) / "tiny", **cases.CHECKED["sd1_checked"])
        )
    checker, pictures = pipe.safety_checker, [Image.fromarray(shown[0]) for shown in cases.SHOWN]
    pixels = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        embedded = checker.visual_projection(checker.vision_model(pixels)[1])
    return {
        "pixels": last(pixels),
        "special": cosine_distance(embedded, checker.special_care_embeds).detach().numpy(),
        "concepts": cosine_distance(embedded, checker.concept_embeds).detach().numpy(),
        "flagged": np.array(checker(pixels, np.zeros((len(pictures), 1, 1, 3)))[1]),
    }


def trajectory(config, steps, eta):
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    module = importlib.import_module(type(scheduler).__module__)
    extra = {"eta": eta} if config["_class_name"] in ("DDIMScheduler", "TCDScheduler") else {}
    x, path = torch.tensor(cases.START), []
    for call, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        output, noise = (torch.tensor(a[call]) for a in (cases.OUTPUTS, cases.NOISE))
        with mock.patch.object(module, "randn_tensor", lambda *_, noise=noise, **__: noise, create=True):
            x = scheduler.step(output, t, x, **extra).prev_sample
        path.append(x.numpy())
    return {"timesteps": scheduler.timesteps.numpy(), "path": np.stack(path)}


def pictures(checkpoint, settings):
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.checkpoint(Path(folder) / "tiny", **(cases.CHECKPOINTS | cases.CHECKED)[checkpoint])
        pipe = diffusers.SemanticStableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    latents = first(cases.LATENTS)
    shown = pipe(cases.PROMPTS, latents=latents, output_type="np", **settings)
    results = {
        "latents": last(pipe(cases.PROMPTS, latents=latents, output_type="latent", **settings).images),
        "images": shown.images,
    }
    if shown.nsfw_content_detected is not None:
        results["flagged"] = np.array(shown.nsfw_content_detected)
    calls = len(pipe.scheduler.timesteps)
    for name in ("sem_guidance", "uncond_estimates", "text_estimates", "edit_estimates"):
        if (array := getattr(pipe, name)) is not None:
            results[name] = last(array[:calls])
    return results


STAGES = {
    "stage1": (diffusers.IFPipeline, tiny.stage),
    "stage2": (diffusers.IFSuperResolutionPipeline, functools.partial(tiny.stage, unet=tiny.STAGE_2)),
    "upscaler": (diffusers.StableDiffusionUpscalePipeline, tiny.upscaler),
}


def stage(name):
    steps, scale, level, _ = cases.STAGES[name]
    kind, write = STAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        pipe = kind.from_pretrained(write(Path(folder) / "tiny"))
    pipe.set_progress_bar_config(disable=True)
    words = cases.TEXTS["clip" if name == "upscaler" else "t5"]
    negative, prompt = pipe.text_encoder(*map(torch.tensor, words)).last_hidden_state.detach()[:, None]
    call = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "num_inference_steps": steps}
    call |= {"guidance_scale": scale, "output_type": "latent" if name == "upscaler" else "pt"}
    size = (8, 8) if name != "stage2" else (32, 32)
    drawn = [] if name == "upscaler" else [cases.fresh(cases.INITIAL, *size, 3)]
    if level is not None:
        call |= {"image": first(cases.SMALL / np.float32(127.5) - 1), "noise_level": level}
        drawn.append(cases.fresh(cases.ON_SMALL, *size, 3))
    if name == "upscaler":
        call["latents"] = first(cases.fresh(cases.INITIAL, *size, 4))
    step, calls = pipe.scheduler.step, itertools.count()

    def injected(*args, **kwargs):
        noise = first(cases.fresh(next(calls), *size, args[2].shape[1]))
        with mock.patch.object(sys.modules[type(pipe.scheduler).__module__], "randn_tensor", return_value=noise):
            return step(*args, **kwargs)

    pipe.scheduler.step = injected
    with mock.patch.object(sys.modules[kind.__module__], "randn_tensor", side_effect=list(map(first, drawn))):
        return {"x": last(pipe(**call).images)}


def xl():
    """Records the encoded texts (a missing negative prompt, a prompt and a concept), their embedding, and an edited
    run."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            tiny.xl(Path(folder) / "tiny", **cases.XL), add_watermarker=False
        )
    cond, uncond, pooled, unpooled = pipe.encode_prompt(cases.XL_WORDS[:1])
    concept, _, its_pooled, _ = pipe.encode_prompt(cases.XL_WORDS[1:])
    states, pooled = torch.cat([uncond, cond, concept]), torch.cat([unpooled, pooled, its_pooled])
    sizes = torch.tensor([[float(side) for size in cases.XL_SIZES.values() for side in size]] * 3)
    embedded = []
    pipe.unet.add_embedding.register_forward_hook(lambda *call: embedded.append(call[2]))

    def predict(_call, t, x):
        added, branches = {"text_embeds": pooled, "time_ids": sizes}, torch.cat([x] * 3)
        with torch.no_grad():
            return pipe.unet(branches, t, encoder_hidden_states=states, added_cond_kwargs=added).sample.split(1)

    run = if_loops.sample(
        predict,
        cases.XL["scheduler"],
        cases.XL_LATENTS,
        None,
        steps=cases.XL_STEPS,
        guidance_scale=cases.XL_SCALE,
        edits=[Edit(cases.XL_WORDS[1], **cases.XL_EDIT)],
        momentum=cases.XL_MOMENTUM,
    )
    return {
        "states": states.detach().numpy(),
        "pooled": pooled.detach().numpy(),
        "told": embedded[0].numpy(),
        "latents": run.x,
        "image": np.clip(if_loops.decoded(pipe.vae, run.x) / 2 + 0.5, 0, 1),
        "uncond": run.uncond,
        "cond": run.cond,
        "edits": run.edits,
        "sem_guidance": run.sem_guidance,
    }


def xl_names():
    """Yields each network and a list of its tensors, with the names that they have in the published files.

    In those files, the names of the first text encoder's tensors start with "text_model."; transformers 5 omits this
    prefix.
    """
    kinds = {
        "text_encoder": lambda c: transformers.CLIPTextModel(transformers.CLIPTextConfig(**c)),
        "text_encoder_2": lambda c: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**c)),
        "unet": lambda c: diffusers.UNet2DConditionModel(**c),
        "vae": lambda c: diffusers.AutoencoderKL(**c),
    }
    for part, build in kinds.items():
        with torch.device("meta"):
            tensors = build(published.XL[part]).state_dict()
        prefix = "text_model." if part == "text_encoder" else ""
        yield part, names.as_text({f"{prefix}{name}": tuple(tensor.shape) for name, tensor in tensors.items()})


def main():
    np.savez_compressed(HERE / "xl.npz", **xl())
    for part, lines in xl_names():
        (HERE / f"xl_{part}.txt").write_text(lines)
    for name in cases.CHECKPOINTS:
        np.savez_compressed(HERE / f"networks_{name}.npz", **networks(name))
    for name in cases.UNETS:
        np.savez_compressed(HERE / f"unet_{name}.npz", **unet(name))
    np.savez_compressed(HERE / "t5.npz", **t5())
    np.savez_compressed(HERE / "projection.npz", **projection())
    np.savez_compressed(HERE / "safety.npz", **safety())
    for name in cases.STAGES:
        np.savez_compressed(HERE / f"stage_{name}.npz", **stage(name))
    for name, case in cases.SCHEDULES.items():
        np.savez_compressed(HERE / f"schedule_{name}.npz", **trajectory(*case))
    for name, case in cases.PICTURES.items():
        np.savez_compressed(HERE / f"pictures_{name}.npz", **pictures(*case))


if __name__ == "__main__":
    main()
