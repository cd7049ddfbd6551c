"""Loads Stable Diffusion XL's single files, LoRAs and textual inversions with both libraries, and compares the
results."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import jax
import numpy as np
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.numpy import save_file
from support import published
from support.loras import tensors
from support.sdxl_files import folder, kohya, kohya_original, layers, peft, pipe, single
from support.single_files import shapes

from parity.theirs import first, last, relative
from sega_jax import load
from sega_jax.weights.layout import from_torch, torch_name

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
__all__ = ["folder", "layers", "pipe", "single"]  # fixtures

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
MODELS = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection


def state(network):
    return {key.removeprefix("text_model."): tensor for key, tensor in network.state_dict().items()}


def difference(ours, theirs):
    """Returns the largest relative difference among all weights."""
    worst = 0
    for part in PARTS:
        tensors = state(getattr(theirs, part))
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(ours, part)):
            reference = tensors[torch_name(path).removeprefix("text_model.")].detach().numpy()
            reference = from_torch(path, reference)
            worst = max(worst, np.abs(reference - np.asarray(leaf)).max() / np.abs(reference).max())
    return worst


def test_names_at_full_size():
    configs = published.XL
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in shapes(configs).items()}
        texts = [
            kind(transformers.CLIPTextConfig(**configs[part])) for kind, part in zip(MODELS, PARTS[:2], strict=True)
        ]
        networks = {"unet": diffusers.UNet2DConditionModel(**configs["unet"])}
        networks["vae"] = diffusers.AutoencoderKL(**configs["vae"])
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(networks["unet"].config)),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), configs["vae"]),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(dict(tensors)),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(
            texts[1], dict(tensors), prefix="conditioner.embedders.1.model."
        ),
    }
    networks |= {"text_encoder": texts[0], "text_encoder_2": texts[1]}
    for part, network in networks.items():
        expected = {key: tuple(tensor.shape) for key, tensor in state(network).items() if "position_ids" not in key}
        assert {k.removeprefix("text_model."): tuple(t.shape) for k, t in converted[part].items()} == expected


@pytest.fixture(scope="module")
def theirs(folder):
    def load():
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def same_picture(ours, theirs, prompt, tolerance=1e-5):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", "height": 8, "width": 8}
    reference = last(theirs(prompt, latents=first(latents), **call).images)
    images = ours(prompt, latents=latents, steps=3, output="latent").images
    return relative(images, reference) < tolerance


def test_a_single_file(tmp_path, folder, single, one_device):
    """The weights equal those that diffusers' `from_single_file` loads with the folder's configs."""
    save_file(single, tmp_path / "a.safetensors")
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(folder), local_files_only=True, add_watermarker=False
    )
    theirs.set_progress_bar_config(disable=True)
    ours = load(tmp_path / "a.safetensors", config=folder, devices=one_device)
    assert difference(ours.models, theirs) == 0
    assert same_picture(ours, theirs, "a cat at")


@pytest.mark.parametrize("naming", [kohya, kohya_original, peft])
def test_loras(tmp_path, folder, theirs, pipe, layers, naming, one_device):
    """The merged weights and a picture are the same as in diffusers.

    If the files have alphas, all layers share one alpha, because diffusers 0.42.1 drops some alphas if they differ.
    With kohya's naming, diffusers also drops one layer if the layers have diffusers' names.
    """
    pytest.importorskip("peft")
    changed = {place: (up, down, np.float32(1.5)) for place, (up, down, _) in layers.items()}
    if naming is kohya:
        del changed["unet", "add_embedding.linear_1"]
    save_file(tensors(changed, naming, alpha=naming is not peft), tmp_path / "a.safetensors")
    reference = theirs()
    reference.load_lora_weights(tmp_path, weight_name="a.safetensors")
    reference.fuse_lora(lora_scale=0.7)
    reference.unload_lora_weights()
    ours = load(folder, lora={tmp_path / "a.safetensors": 0.7}, devices=one_device)
    assert difference(ours.models, reference) < 1e-6
    assert difference(pipe.models, reference) > 0.01
    # The libraries sum in different orders, which changes the last digit, and sampling amplifies this difference.
    assert same_picture(ours, reference, "a cat", 1e-4)


def test_textual_inversion(tmp_path, folder, theirs, one_device):
    rng = np.random.default_rng(0)
    vectors = {"clip_l": rng.standard_normal((3, 16)), "clip_g": rng.standard_normal((3, 20))}
    vectors = {name: array.astype(np.float32) for name, array in vectors.items()}
    save_file(vectors, tmp_path / "a.safetensors")
    reference = theirs()
    for name, tokenizer, encoder in (
        ("clip_l", reference.tokenizer, reference.text_encoder),
        ("clip_g", reference.tokenizer_2, reference.text_encoder_2),
    ):
        options = {"token": "<toy>", "tokenizer": tokenizer, "text_encoder": encoder}
        reference.load_textual_inversion({"<toy>": torch.tensor(vectors[name])}, **options)
    ours = load(folder, textual_inversion={"<toy>": tmp_path / "a.safetensors"}, devices=one_device)
    texts = ["b <toy>", "<toy><toy> c"]
    for i, tokenizer in enumerate((reference.tokenizer, reference.tokenizer_2)):
        written = [reference.maybe_convert_prompt(text, tokenizer) for text in texts]
        expected = tokenizer(written, padding="max_length", max_length=12, truncation=True).input_ids
        np.testing.assert_array_equal(ours.tokenizer(texts)[:, i], expected)
    for text in texts:
        assert same_picture(ours, reference, text)
