"""Published networks at full size: the names and shapes of tensors, and outputs with random weights.

Computing the outputs needs 9 GB of memory and takes a few minutes on two cores.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import functools
import math
import pathlib

import diffusers
import jax
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from support import names, tiny
from support.published import BYT5_XL, IF_1_XL, IF_2_L, SAFETY, SD_1, SD_2, T5_XXL, VIT_H, X4, XL

from parity.theirs import fill, first, last, noise, published, relative, same_names
from sega_jax import Edit
from sega_jax.method.schedules import from_config
from sega_jax.nn import safety
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.systems import sdxl
from sega_jax.systems.clip_text import encode
from sega_jax.systems.stable_diffusion import SYSTEM, Models
from sega_jax.text.tokenizers import Tokenizer
from sega_jax.weights.layout import leaves

pytestmark = pytest.mark.parity

# The relative L2 error in float32.
TOLERANCE = 1e-5

COUNTS = (
    {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
)


@pytest.mark.parametrize("part", Models._fields)
@pytest.mark.parametrize(("configs", "counts"), [(SD_1, COUNTS[0]), (SD_2, COUNTS[1])], ids=["SD 1.5", "SD 2.1"])
def test_names(configs, counts, part):
    with torch.device("meta"):
        reference = published(configs, part)
    ours = getattr(Models.build(**configs), part)
    same_names(ours, reference)
    assert sum(math.prod(shape) for shape in leaves(ours).values()) == counts[part]


@pytest.mark.parametrize("part", sdxl.Models._fields)
def test_names_of_stable_diffusion_xl(part):
    """Our networks, torch's networks and the files `reference/xl_*.txt` have the same tensor names."""
    with torch.device("meta"):
        reference = published(XL, part)
    ours = getattr(sdxl.Models.build(**XL), part)
    same_names(ours, reference)
    listed = names.read(pathlib.Path(__file__).parents[1] / "reference" / f"xl_{part}.txt")
    assert {ours.rename(name): shape for name, shape in listed.items()} == leaves(ours)
    assert len(listed) == len(reference.state_dict())


@pytest.mark.parametrize("config", [IF_1_XL, IF_2_L, X4], ids=["IF-I-XL", "IF-II-L", "x4 upscaler"])
def test_names_of_unets(config):
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(**config)
    same_names(UNet2DConditionModel(UNetConfig.from_dict(config)), reference)


@pytest.mark.parametrize("config", [T5_XXL, BYT5_XL], ids=["T5 v1.1 XXL", "ByT5 XL"])
def test_names_of_text_encoders(config):
    with torch.device("meta"):
        reference = transformers.T5EncoderModel(transformers.T5Config(**config))
    same_names(T5EncoderModel(T5Config.from_dict(config)), reference)


def test_names_of_openclips_text_encoder():
    with torch.device("meta"):
        reference = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**VIT_H))
    same_names(CLIPTextModelWithProjection(CLIPTextConfig.from_dict(VIT_H)), reference)


def safety_checkers(device):
    with torch.device(device):
        reference = StableDiffusionSafetyChecker(transformers.CLIPConfig(**SAFETY))
    return safety.StableDiffusionSafetyChecker(safety.SafetyCheckerConfig.from_dict(SAFETY)), reference


def test_names_of_the_safety_checker():
    """The published file's names, which transformers renames, are also recognised."""
    ours, reference = safety_checkers("meta")
    same_names(ours, reference)
    shapes = leaves(ours)
    assert sum(math.prod(shape) for shape in shapes.values()) == 303_981_588
    published = [name.replace("vision_model.", "vision_model.vision_model.") for name in shapes]
    assert {ours.rename(name) for name in published} == set(shapes)
    assert len(shapes) == 396


def randomised(module):
    """Fills a module with random tensors similar to `tiny`'s; torch draws them, because it is faster."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        tensor.normal_(generator=generator)
        if name.endswith(".bias"):
            tensor.mul_(0.1)
        elif tensor.ndim == 1:
            tensor.mul_(0.1).add_(1)
        elif "embedding" not in name or "time" in name:
            tensor.mul_(tensor[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


IDS = np.random.default_rng(0).integers(0, 49407, (2, 77), np.int32)
X, T, TEXT = noise(1, 64, 64, 4), np.array([999], np.float32), noise(1, 77, 768)
# 256 x 256 pixels, because at 512 x 512 torch's own float32 decoder differs from float64 by 1.7e-5, and ours by 1.3e-6.
Z = noise(1, 32, 32, 4)
THEIRS = {
    "text_encoder": lambda module: module(torch.tensor(IDS)).last_hidden_state,
    "unet": lambda module: last(module(first(X), torch.tensor(T), torch.tensor(TEXT)).sample),
    "vae": lambda module: last(module.decode(first(Z)).sample),
}


@pytest.fixture(scope="module")
def networks():
    """Returns SD 1.5's networks with the weights of random torch networks, and the outputs of those torch networks."""
    models, expected = Models.build(**SD_1)._asdict(), {}
    for part, compute in THEIRS.items():
        reference = randomised(published(SD_1, part))
        expected[part] = compute(reference)
        models[part] = fill(models[part], reference.state_dict())
    return Models(**models), expected


def test_text_encoder(networks):
    models, expected = networks
    assert relative(jax.jit(encode)(models.text_encoder, IDS).states, expected["text_encoder"]) < TOLERANCE


def test_unet(networks):
    models, expected = networks
    assert relative(jax.jit(lambda unet, *x: unet(*x))(models.unet, X, T, TEXT), expected["unet"]) < TOLERANCE


def test_decoder(networks):
    models, expected = networks
    assert relative(jax.jit(lambda vae, z: vae.decode(z))(models.vae, Z), expected["vae"]) < TOLERANCE


def test_safety_checker():
    ours, reference = safety_checkers("cpu")
    ours, pixels = fill(ours, randomised(reference).state_dict()), noise(2, 224, 224, 3)
    pictures = reference.visual_projection(reference.vision_model(first(pixels))[1])
    _, concepts = jax.jit(lambda net: net.cosines(pixels))(ours)
    assert relative(concepts, cosine_distance(pictures, reference.concept_embeds)) < TOLERANCE


def test_two_steps(networks, tmp_path, one_device):
    """Runs the complete pipeline at 256 x 256, with one edit that has no warm-up."""
    tiny.tokenizer(tmp_path, 77)
    pipe = Pipeline(SYSTEM, networks[0], Tokenizer(tmp_path, 77, 49408), from_config(tiny.DDIM), Devices(one_device))
    out = pipe("a cat", Edit("glasses", warmup=0), steps=2, height=256, width=256, output="float")
    assert out.images.shape == (1, 256, 256, 3)
    assert out.finite.all()
    assert out.images.std() > 0


def member(module, name):
    return module[int(name)] if name.isdigit() else getattr(module, name)


def parts(config, *names):
    """Yields parts of our UNet and torch's with the same random weights; other parameters have shapes but no values."""
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(**config)
    ours = UNet2DConditionModel(UNetConfig.from_dict(config))
    for name in names:
        part = randomised(reference.get_submodule(name).to_empty(device="cpu"))
        yield fill(functools.reduce(member, name.split("."), ours), part.state_dict()), part


def keys_and_values(block, text):
    return [attention.project(text) for attention in block.attentions]


def test_the_middle_block_of_if():
    """In IF-I-XL, this block has 2,816 channels in 44 heads, and the pooled text embedding has 4,096 channels in 64
    heads; together they need 1.7 GB."""
    (ours, middle), (pooling, pooled) = parts(IF_1_XL, "mid_block", "add_embedding")
    x, text, states = noise(2, 8, 8, 2816), noise(2, 77, 2816, seed=1), noise(2, 77, 4096, seed=2)
    time = pooled(torch.tensor(states))
    assert relative(jax.jit(lambda net: net(states))(pooling), time) < TOLERANCE
    output = jax.jit(lambda net: net(x, time.numpy(), keys_and_values(net, text)))(ours)
    assert relative(output, last(middle(first(x), time, torch.tensor(text)))) < TOLERANCE


def test_a_level_of_if():
    """Covers a level with 1,408 channels in 22 heads, both down and up: seven resnets and attentions, and both
    resamplers."""
    (down, its_down), (up, its_up) = parts(IF_1_XL, "down_blocks.1", "up_blocks.2")
    time, text = noise(2, 2816, seed=1), noise(2, 77, 2816, seed=2)
    x = noise(2, 16, 16, 704)
    seen = [first(x), torch.tensor(time), torch.tensor(text)]
    output, skips = jax.jit(lambda net: net(x, time, keys_and_values(net, text)))(down)
    expected, its_skips = its_down(*seen)
    for ours, its in zip([output, *skips], [expected, *its_skips], strict=True):
        assert relative(ours, last(its)) < TOLERANCE

    x, skips = noise(2, 8, 8, 2112), [noise(2, 8, 8, c, seed=i) for i, c in enumerate((704, 1408, 1408, 1408))]
    output = jax.jit(lambda net: net(x, time, keys_and_values(net, text), list(skips)))(up)
    expected = its_up(first(x), tuple(map(first, skips)), *seen[1:])
    assert output.shape == (2, 16, 16, 1408)
    assert relative(output, last(expected)) < TOLERANCE


def test_one_layer_of_t5():
    config = T5_XXL | {"num_layers": 1, "vocab_size": 100}
    reference = randomised(transformers.T5EncoderModel(transformers.T5Config(**config)))
    ours = fill(T5EncoderModel(T5Config.from_dict(config)), reference.state_dict())
    ids, mask = IDS % 100, (np.arange(77) < np.array([[9], [77]])).astype(np.int32)
    expected = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    assert relative(jax.jit(lambda net: net(ids, mask))(ours), expected) < TOLERANCE
