"""Runs the code blocks from diffusers' documentation on small checkpoints.

Every block that uses one of our pipelines either runs or is refused with a known message. Blocks are identified by
their page and their index on the page.
"""

import jax
import numpy as np
import pytest
from PIL import Image
from support.pasted import (
    LORA,
    NAMED_WORD,
    OTHER_LORA,
    SD,
    SD_2,
    SD_CHECKED,
    STAGE_1,
    STAGE_2,
    UPSCALER,
    VAE,
    WORD,
    XL,
    Generator,
    Hub,
    float32,
)

from sega_jax import Pipeline, diffusers_api, load
from sega_jax.diffusers_api import base
from sega_jax.pipelines.execution.devices import Devices

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PICTURE = Image.new("RGB", (8, 8), "red")
# The code blocks in diffusers' documentation run 50 steps in half precision. These tests run fewer steps and share a
# few compiled programs.
FEW = {"num_inference_steps": 2}
XL_URL = f"https://huggingface.co/{XL}/blob/main/xl_base.safetensors"


class Pasted:
    """The environment in which a code block runs: it provides the imported names and the checkpoints."""

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path

    def __getattr__(self, name):
        return getattr(diffusers_api, name)

    def load(self, name=XL, kind="AutoPipelineForText2Image", **options):
        pipeline = getattr(diffusers_api, kind).from_pretrained(name, **{"dtype": float32} | options).to("cuda")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def with_lora(self, *names):
        pipeline = self.load()
        for name, source in zip(names, (LORA, OTHER_LORA), strict=False):
            pipeline.load_lora_weights(source, weight_name="lora.safetensors", adapter_name=name)
        return pipeline


@pytest.fixture(scope="module")
def hub(tmp_path_factory, stages):
    hub = Hub(tmp_path_factory.mktemp("hub"), stages)
    hub.devices = Devices(jax.devices()[:1])
    pipe = diffusers_api.StableDiffusionXLPipeline.from_pretrained(hub.folders[XL]).pipeline
    hub.add_loras(pipe.models)
    return hub


@pytest.fixture
def pasted(hub, tmp_path, monkeypatch, one_device):
    """Returns the environment for code blocks. All pipelines use the same `Devices`, so they share their programs."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr(base, "Devices", lambda *_: hub.devices)
    monkeypatch.setattr(base, "load", lambda source, **options: load(source, **{"devices": hub.devices} | options))
    return Pasted(tmp_path)


def check_pictures(out):
    """Checks that the pictures returned by a call are not uniform, and returns the pictures."""
    images = out.images
    assert len(images)
    assert all(image is not None and np.std(np.asarray(image)) > 0 for image in images)
    return images


# stable_diffusion.md


def offloading(p):
    pipeline = p.DiffusionPipeline.from_pretrained(XL, dtype=float32, device_map="cuda")
    pipeline.enable_model_cpu_offload()
    check_pictures(pipeline("cat", **FEW))


def schedulers(p):
    pipeline = p.load(kind="DiffusionPipeline", dtype=float32)
    pipeline.scheduler = p.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    check_pictures(pipeline("cat", **FEW))
    pipeline.scheduler = p.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    check_pictures(pipeline("cat", negative_prompt="bad", **FEW))


# using-diffusers/loading.md


def separate_vae(p):
    vae = p.AutoModel.from_pretrained(VAE, dtype=float32)
    check_pictures(p.load(kind="DiffusionPipeline", vae=vae)("cat", **FEW))


def perturbed_attention(p):
    p.AutoPipelineForText2Image.from_pipe(p.load(), enable_pag=True)


def without_safety_checker(p):
    assert p.DiffusionPipeline.from_pretrained(SD_CHECKED).safety_checker is not None
    assert p.DiffusionPipeline.from_pretrained(SD_CHECKED, safety_checker=None).safety_checker is None


# using-diffusers/schedulers.md


def loaded_scheduler(p):
    dpm = p.DPMSolverMultistepScheduler.from_pretrained(XL, subfolder="scheduler")
    pipeline = p.load(kind="DiffusionPipeline", scheduler=dpm)
    assert pipeline.scheduler.name == "DPMSolverMultistepScheduler"


def listed_timesteps(p):
    pipeline = p.load(kind="DiffusionPipeline")
    pipeline.scheduler = p.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    check_pictures(pipeline(prompt="cat", negative_prompt="", timesteps=[999, 500, 13]))


def zero_snr(p):
    pipeline = p.DiffusionPipeline.from_pretrained(SD_2, device_map="cuda")
    pipeline.scheduler = p.DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    check_pictures(pipeline("cat", guidance_rescale=0.7, **FEW))


def trailing(p):
    pipeline = p.load(kind="DiffusionPipeline")
    pipeline.scheduler = p.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    check_pictures(pipeline(prompt="cat", negative_prompt="", num_inference_steps=5))


def listed_sigmas(p):
    pipeline = p.load(kind="DiffusionPipeline")
    pipeline.scheduler = p.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    )
    pipeline(prompt="cat", negative_prompt="", sigmas=[14.6, 0.1, 0.0])


# using-diffusers/batched_inference.md


def batches(p):
    pipeline = p.load(kind="DiffusionPipeline")
    assert len(check_pictures(pipeline(prompt=["cat", "dog", "hat", "mat"], **FEW))) == 4
    assert len(check_pictures(pipeline(prompt="cat", num_images_per_prompt=4, **FEW))) == 4
    assert len(check_pictures(pipeline(prompt=["cat", "dog"], num_images_per_prompt=2, **FEW))) == 4


def one_generator_per_picture(p):
    pipeline = p.load(kind="DiffusionPipeline")
    generator = [Generator("cuda").manual_seed(i) for i in range(4)]
    images = check_pictures(pipeline(prompt=["cat"] * 4, generator=generator, output_type="np", **FEW))
    assert np.array_equal(images, pipeline(prompt=["cat"] * 4, seed=[0, 1, 2, 3], output_type="np", **FEW).images)
    again = [Generator("cuda").manual_seed(0)] * 4
    assert len({image.tobytes() for image in pipeline(prompt=["cat"] * 4, generator=again, **FEW).images}) == 4


# using-diffusers/callback.md


def guidance_cutoff(p):
    class Cutoff:
        tensor_inputs = ("prompt_embeds", "add_text_embeds", "add_time_ids")

        def __call__(self, pipeline, step, timestep, callback_kwargs):
            return callback_kwargs

    p.load(kind="StableDiffusionXLPipeline")("cat", callback_on_step_end=Cutoff(), guidance_scale=6.5)


def interruption(p):
    calls = []

    def interrupt(pipeline, i, t, callback_kwargs):
        calls.append(i)
        pipeline._interrupt = i == 1
        return callback_kwargs

    check_pictures(
        p.load(kind="StableDiffusionXLPipeline")("cat", num_inference_steps=5, callback_on_step_end=interrupt)
    )
    assert calls == [0, 1]


def intermediate_latents(p):
    shapes = []

    def decode(pipeline, step, timestep, callback_kwargs):
        shapes.append(callback_kwargs["latents"][0].shape)
        return callback_kwargs

    call = {"callback_on_step_end": decode, "callback_on_step_end_tensor_inputs": ["latents"]}
    check_pictures(p.load()(prompt="cat", negative_prompt="bad", **call, **FEW))
    assert shapes == [shapes[0]] * 2


# using-diffusers/conditional_image_generation.md


def seeds(p):
    pipeline = p.load(SD, variant="fp16")
    call = {"output_type": "np", **FEW}
    images = pipeline("cat", generator=Generator("cuda").manual_seed(31), **call).images
    assert np.array_equal(images, pipeline("cat", generator=31, **call).images)
    check_pictures(p.load(XL, variant="fp16")("cat", generator=Generator("cuda").manual_seed(31), **FEW))


def sizes(p):
    pipeline = p.load(SD)
    assert check_pictures(pipeline("cat", height=24, width=16, **FEW))[0].size == (16, 24)
    check_pictures(pipeline("cat", guidance_scale=3.5, **FEW))
    check_pictures(pipeline(prompt="cat", negative_prompt="bad", **FEW))


def embeddings(p):
    pipeline = p.load(SD)
    embeds, negative = (np.asarray(pipeline.pipeline.encode(word).states, np.float32) for word in ("cat", "bad"))
    images = pipeline(prompt_embeds=embeds, negative_prompt_embeds=negative, output_type="np", **FEW).images
    assert np.array_equal(images, pipeline("cat", negative_prompt="bad", output_type="np", **FEW).images)


def torch_compile(p):
    p.load(SD).unet = lambda *args: None  # torch.compile returns a function


# using-diffusers/textual_inversion_inference.md


def textual_inversion(p):
    pipeline = p.load(SD)
    before = pipeline("cat, <art> style", output_type="np", **FEW).images
    pipeline.load_textual_inversion(WORD)
    assert not np.array_equal(pipeline("cat, <art> style", output_type="np", **FEW).images, before)
    pipeline.load_textual_inversion(NAMED_WORD, weight_name="negative.safetensors", token="easynegative")
    check_pictures(pipeline("cat", negative_prompt="easynegative", **FEW))
    pipeline.unload_textual_inversion("easynegative")
    pipeline.unload_textual_inversion()
    assert np.array_equal(pipeline("cat, <art> style", output_type="np", **FEW).images, before)


def word_by_position(p):
    p.load(SD)("cat", "easynegative")


# using-diffusers/weighted_prompts.md


def weighted_prompts(p):
    pipeline = p.load(kind="DiffusionPipeline", dtype=float32)
    text = pipeline.pipeline.encode("(cat:1.4)", weighted=True)
    embeds = {"prompt_embeds": text.states.astype(np.float32), "pooled_prompt_embeds": text.pooled.astype(np.float32)}
    check_pictures(pipeline(**embeds, **FEW))


# using-diffusers/img2img.md


def image_to_image(p):
    pipeline = p.load(SD, "AutoPipelineForImage2Image", variant="fp16", use_safetensors=True)
    pipeline.enable_model_cpu_offload()
    pipeline.enable_xformers_memory_efficient_attention()
    for options in ({}, {"strength": 0.8}, {"guidance_scale": 8.0}, {"negative_prompt": "bad"}):
        check_pictures(pipeline("cat", image=PICTURE, num_inference_steps=4, **options))
    check_pictures(pipeline("cat", image=PICTURE, strength=0.45, guidance_scale=10.5, num_inference_steps=5))


def latents_as_image(p):
    pipeline = p.load(SD, "AutoPipelineForImage2Image")
    latents = pipeline("cat", image=PICTURE, output_type="latent", num_inference_steps=4).images
    pipeline("cat", image=latents[0])


def generated_image(p):
    text2image = p.load(SD)("cat", **FEW).images[0]
    check_pictures(p.load(SD, "AutoPipelineForImage2Image")("dog", image=text2image, num_inference_steps=4))


def upscaling(p):
    pipeline = p.StableDiffusionUpscalePipeline.from_pretrained(UPSCALER, dtype=float32).to("cuda")
    pipeline.enable_xformers_memory_efficient_attention()
    image = check_pictures(pipeline(prompt="cat", image=PICTURE, **FEW))[0]
    assert image.size[0] == 4 * PICTURE.size[0]


# using-diffusers/other-formats.md


def single_file(p):
    check_pictures(p.StableDiffusionXLPipeline.from_single_file(XL_URL, dtype=float32, device_map="cuda")("cat", **FEW))
    check_pictures(p.DiffusionPipeline.from_single_file(XL_URL, dtype=float32)("cat", **FEW))


def single_file_with_config(p):
    check_pictures(p.StableDiffusionXLPipeline.from_single_file(XL_URL, config=XL)("cat", **FEW))
    file = p.tmp_path / "xl.safetensors"
    file.symlink_to(p.hub.folders[XL] / "xl_base.safetensors")
    options = {"config": str(p.hub.folders[XL]), "local_files_only": True}
    check_pictures(p.StableDiffusionXLPipeline.from_single_file(str(file), **options)("cat", **FEW))


def saving(p):
    pipeline = p.DiffusionPipeline.from_single_file(XL_URL)
    pipeline.save_pretrained(p.tmp_path / "saved")
    call = {"output_type": "np", "seed": 3, **FEW}
    again = p.DiffusionPipeline.from_pretrained(p.tmp_path / "saved")
    assert np.array_equal(again("cat", **call).images, pipeline("cat", **call).images)


# using-diffusers/image_quality.md


def freeu(p):
    p.load(SD, "DiffusionPipeline", safety_checker=None).enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def disabled_freeu(p):
    p.load(SD).disable_freeu()


# tutorials/using_peft_for_inference.md


def lora_scale(p):
    pipeline, call = p.with_lora("cereal"), {"output_type": "np", "seed": 3, **FEW}
    images = [pipeline("cat", cross_attention_kwargs={"scale": scale}, **call).images for scale in (1.0, 0.5, 0.0)]
    assert np.array_equal(images[0], pipeline("cat", **call).images)
    assert not np.array_equal(images[0], images[1])
    pipeline.unload_lora_weights()
    assert np.array_equal(images[2], pipeline("cat", **call).images)


def fused_lora(p):
    pipeline = p.with_lora("ikea")
    pipeline.set_adapters("ikea", adapter_weights=0.7)
    pipeline.fuse_lora(adapter_names=["ikea"], lora_scale=1.0)
    pipeline.unload_lora_weights()
    check_pictures(pipeline("cat", **FEW))


def block_weights(p):
    p.with_lora("cereal").set_adapters("cereal", {"unet": {"down": 0.9}, "text_encoder": 0.5})


def hotswap(p):
    pipeline = p.with_lora("ikea")
    pipeline.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(OTHER_LORA, hotswap=True, adapter_name="ikea", weight_name="lora.safetensors")
    assert pipeline.get_active_adapters() == ["ikea"]


def two_loras(p):
    pipeline = p.with_lora("ikea", "feng")
    pipeline.set_adapters(["ikea", "feng"], adapter_weights=[0.7, 0.8])
    check_pictures(pipeline("cat", cross_attention_kwargs={"scale": 1.0}, **FEW))
    pipeline.fuse_lora(adapter_names=["ikea", "feng"], lora_scale=1.0)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(p.tmp_path / "fused")
    call = {"output_type": "np", "seed": 3, **FEW}
    again = p.load(str(p.tmp_path / "fused"), "DiffusionPipeline")
    assert np.array_equal(again("cat", **call).images, pipeline("cat", **call).images)
    pipeline.unfuse_lora()


def upload(p):
    p.load().push_to_hub("fused")


def active_adapters(p):
    pipeline = p.with_lora("ikea", "feng")
    pipeline.set_adapters("feng")
    assert pipeline.get_active_adapters() == ["feng"]
    assert pipeline.get_list_adapters() == {"unet": ["ikea", "feng"]}
    pipeline.disable_lora()
    assert pipeline.get_active_adapters() == []
    pipeline.enable_lora()
    pipeline.delete_adapters("ikea")
    assert pipeline.get_list_adapters() == {"unet": ["feng"]}


def lora_of_one_network(p):
    p.load().unet.load_lora_adapter(LORA, adapter_name="cinematic", prefix="unet")


# api/pipelines/stable_diffusion


def euler(p):
    pipeline = p.StableDiffusionPipeline.from_pretrained(SD)
    pipeline.scheduler = p.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler = p.EulerDiscreteScheduler.from_pretrained(SD, subfolder="scheduler")
    pipeline = p.StableDiffusionPipeline.from_pretrained(SD, scheduler=scheduler)
    assert isinstance(pipeline.scheduler, p.EulerDiscreteScheduler)


def components(p):
    text2img = p.StableDiffusionPipeline.from_pretrained(SD)
    img2img = p.StableDiffusionImg2ImgPipeline(**text2img.components)
    check_pictures(img2img("cat", PICTURE, num_inference_steps=4))


def inpainting(p):
    p.StableDiffusionInpaintPipeline.from_pretrained(SD)


def second_version(p):
    pipe = p.DiffusionPipeline.from_pretrained(SD_2, dtype=float32, variant="fp16")
    pipe.scheduler = p.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    check_pictures(pipe.to("cuda")("cat", num_inference_steps=3))


def without_watermark(p):
    p.StableDiffusionXLPipeline.from_pretrained(XL, add_watermarker=False)


def xl_text_to_image(p):
    options = {"dtype": float32, "variant": "fp16", "use_safetensors": True}
    pipeline = p.StableDiffusionXLPipeline.from_pretrained(XL, **options).to("cuda")
    check_pictures(pipeline(prompt="cat", crops_coords_top_left=(256, 0), **FEW))
    check_pictures(pipeline(prompt="cat", prompt_2="dog", **FEW))
    image = p.AutoPipelineForImage2Image.from_pipe(pipeline).to("cuda")
    check_pictures(image("dog", image=PICTURE, strength=0.8, guidance_scale=10.5, num_inference_steps=3))


def refiner(p):
    p.load(kind="DiffusionPipeline")(prompt="cat", denoising_end=0.8, output_type="latent")


def negative_sizes(p):
    p.load()(prompt="cat", negative_original_size=(512, 512), negative_target_size=(1024, 1024))


def turbo(p):
    pipeline = p.load(variant="fp16")
    check_pictures(pipeline(prompt="cat", guidance_scale=0.0, num_inference_steps=1))
    image = p.AutoPipelineForImage2Image.from_pipe(pipeline).to("cuda")
    check_pictures(image("cat", image=PICTURE, strength=0.5, guidance_scale=0.0, num_inference_steps=2))
    pipeline.upcast_vae()
    assert pipeline.vae.decoder.conv_in.kernel[...].dtype == np.float32
    options = {"dtype": float32, "variant": "fp16"}
    pipeline = p.StableDiffusionXLPipeline.from_single_file(XL_URL, **options).to("cuda")
    pipeline.scheduler = p.EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    check_pictures(pipeline("cat", guidance_scale=0.0, num_inference_steps=1))


# api/pipelines/deepfloyd_if.md


def cascade(p):
    stage_1 = p.DiffusionPipeline.from_pretrained(STAGE_1)
    stage_2 = p.DiffusionPipeline.from_pretrained(STAGE_2, text_encoder=None)
    for stage in (stage_1, stage_2):
        stage.enable_model_cpu_offload()
        stage.enable_sequential_cpu_offload()
    generator, call = Generator().manual_seed(1), {"output_type": "np", **FEW}
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), stage_1.encode_prompt("cat"), strict=True))
    small = stage_1(**embeds, generator=generator, **call).images
    large = check_pictures(stage_2(image=small, **embeds, generator=generator, **call))
    assert large.shape[1] > small.shape[1]
    names = ("feature_extractor", "safety_checker", "watermarker")
    stage_3 = p.DiffusionPipeline.from_pretrained(UPSCALER, **{name: getattr(stage_1, name) for name in names})
    assert stage_3.pipeline.prepare("cat", image=large, noise_level=20).rows == 1


def tensors(p):
    p.DiffusionPipeline.from_pretrained(STAGE_1)("cat", output_type="pt", clean_caption=False)


def stages_by_name(p):
    p.IFPipeline.from_pretrained(STAGE_1)
    p.IFSuperResolutionPipeline.from_pretrained(STAGE_2)


def if_image_to_image(p):
    p.IFImg2ImgPipeline.from_pretrained(STAGE_1)


def fast_timesteps(p):
    pipe = p.DiffusionPipeline.from_pretrained(STAGE_1)
    check_pictures(pipe("cat", timesteps=[900, 300, 20], clean_caption=False))


def text_encoder_only(p):
    p.DiffusionPipeline.from_pretrained(STAGE_1, unet=None, device_map="auto")


# Examples in docstrings


def semantic(p):
    pipe = p.SemanticStableDiffusionPipeline.from_pretrained(SD, torch_dtype=float32).to("cuda")
    concepts = ["smiling, smile", "glasses", "curls", "beard"]
    out = pipe(
        prompt="a cat",
        num_images_per_prompt=1,
        guidance_scale=7,
        editing_prompt=concepts,
        reverse_editing_direction=[False] * 4,
        edit_warmup_steps=[1] * 4,
        edit_guidance_scale=[4, 5, 5, 5.4],
        edit_threshold=[0.99, 0.975, 0.925, 0.96],
        edit_momentum_scale=0.3,
        edit_mom_beta=0.6,
        edit_weights=[1, 1, 1, 1, 1],
        num_inference_steps=3,
    )
    check_pictures(out)


# {page: {indices of blocks: the function that runs them, or (this function, the expected error message)}}.
BLOCKS = {
    "stable_diffusion.md": {(0, 3): offloading, (1, 2, 4): schedulers},
    "using-diffusers/loading.md": {
        (10,): separate_vae,
        (12,): (perturbed_attention, "enable_pag=True is not supported: sega_jax has no perturbed attention guidance"),
        (13,): without_safety_checker,
    },
    "using-diffusers/schedulers.md": {
        (0, 1): loaded_scheduler,
        (2,): listed_timesteps,
        (3, 4): zero_snr,
        (5,): trailing,
        (6, 7): (listed_sigmas, "sigmas=.* is not supported; give timesteps, or choose a different scheduler"),
    },
    "using-diffusers/batched_inference.md": {(0, 1, 2): batches, (3, 4): one_generator_per_picture},
    "using-diffusers/callback.md": {
        (0,): (guidance_cutoff, "callback_on_step_end=.* needs prompt_embeds, .*, but callbacks receive only the"),
        (1,): interruption,
        (2, 3, 4): intermediate_latents,
    },
    "using-diffusers/conditional_image_generation.md": {
        (0, 1, 2, 3, 10): seeds,
        (7, 8, 9): sizes,
        (11,): embeddings,
        (12,): (torch_compile, "unet: JAX compiles the networks at the first call; leave torch.compile out"),
    },
    "using-diffusers/textual_inversion_inference.md": {
        (0, 1): textual_inversion,
        (2,): (word_by_position, "height='easynegative' should be a whole number"),
    },
    "using-diffusers/reusing_seeds.md": {(2,): one_generator_per_picture},
    "using-diffusers/weighted_prompts.md": {(1, 2): weighted_prompts},
    "using-diffusers/img2img.md": {
        (3, 6, 7, 8, 17, 21): image_to_image,
        (9,): generated_image,
        (11, 12, 13, 14): (latents_as_image, "image"),
        (16,): upscaling,
        (22,): (torch_compile, "leave torch.compile out"),
    },
    "using-diffusers/other-formats.md": {
        (0, 8): single_file,
        (2, 5, 6, 7): single_file_with_config,
        (11,): saving,
    },
    "using-diffusers/image_quality.md": {
        (0, 1, 2): (freeu, "enable_freeu: FreeU is not supported and would change the picture; leave it out"),
        (4,): disabled_freeu,
    },
    "tutorials/using_peft_for_inference.md": {
        (0, 5, 27): lora_scale,
        (3,): fused_lora,
        (4,): (torch_compile, "leave torch.compile out"),
        (6,): (
            block_weights,
            "adapter_weights: 'unet' has weights for individual blocks, which are not supported; give one",
        ),
        (8, 9, 10): hotswap,
        (11, 19, 20, 21, 23, 24): two_loras,
        (22,): (upload, "push_to_hub is not supported: write a folder with save_pretrained and upload it"),
        (25, 28, 29, 30, 31): active_adapters,
        (2, 26): (lora_of_one_network, "no attribute 'load_lora_adapter'"),
    },
    "api/pipelines/stable_diffusion/overview.md": {
        (0,): euler,
        (1,): components,
        (2,): (inpainting, "StableDiffusionInpaintPipeline has no counterpart in sega_jax"),
    },
    "api/pipelines/stable_diffusion/stable_diffusion_2.md": {
        (0,): second_version,
        (2,): upscaling,
    },
    "api/pipelines/stable_diffusion/stable_diffusion_xl.md": {
        (1,): without_watermark,
        (2, 3, 4, 5, 14, 16): xl_text_to_image,
        (7, 8, 10, 11, 12): (refiner, "denoising_end=0.8 is not supported; it belongs to the SDXL refiner"),
        (13, 15): (negative_sizes, "negative_original_size=.* is not supported; the negative prompt uses the sizes"),
    },
    "api/pipelines/stable_diffusion/sdxl_turbo.md": {
        (1, 2, 3, 4, 6): turbo,
        (5,): (torch_compile, "leave torch.compile out"),
    },
    "SemanticStableDiffusionPipeline.__call__": {(0,): semantic},
    "api/pipelines/deepfloyd_if.md": {
        (5, 10, 11): cascade,
        (1, 13): (tensors, "output_type='pt' .* is not supported; use 'np'"),
        (4,): stages_by_name,
        (2, 8): (if_image_to_image, "IFImg2ImgPipeline has no counterpart in sega_jax"),
        (6, 7): fast_timesteps,
        (9,): (torch_compile, "leave torch.compile out"),
        (12,): (text_encoder_only, "unet=None is not supported"),
    },
}


def cases():
    for page, blocks in BLOCKS.items():
        for numbers, entry in blocks.items():
            function, refusal = entry if isinstance(entry, tuple) else (entry, None)
            yield pytest.param(function, refusal, id=f"{page}-{','.join(map(str, numbers))}")


@pytest.mark.parametrize(("function", "refusal"), list(cases()))
def test_code_block(function, refusal, pasted, hub):
    pasted.hub = hub
    if refusal is None:
        function(pasted)
        return
    with pytest.raises((AttributeError, ImportError, NotImplementedError, TypeError, ValueError), match=refusal):
        function(pasted)


def test_same_pictures_as_the_native_pipeline(pasted, hub):
    pipe = pasted.StableDiffusionPipeline.from_pretrained(SD)
    native = Pipeline(**pipe.pipeline.components)
    images = pipe("cat", generator=Generator().manual_seed(4), output_type="latent", **FEW).images
    assert np.array_equal(images, native("cat", seed=4, steps=2, output="latent", progress=False).images)
