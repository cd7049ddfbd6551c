"""Compares layers, blocks and complete networks with torch's, using the same weights and inputs."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import contextlib
import inspect
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from diffusers.models import activations, attention, attention_processor, downsampling, embeddings, upsampling
from safetensors.numpy import load_file, save_file
from support import tiny
from transformers.models.t5 import modeling_t5

from parity.theirs import double, first, last, noise, pair, precision, relative
from sega_jax.nn import clip, layers, t5, unet, vae
from sega_jax.nn.unet.attention import FeedForward
from sega_jax.nn.unet.embedding import TimestepEmbedding, sinusoid
from sega_jax.pipelines import loading

pytestmark = pytest.mark.parity

# Tolerances for relative L2 errors: `LAYER` is for layers and blocks in float32, `NETWORK` for complete networks.
LAYER = 2e-6
NETWORK = {"float32": 1e-5, "float64": 1e-9}

VISION = tiny.SAFETY["vision_config"]
UNETS = {
    "SD 1.x": tiny.UNET,
    "SD 2.x": tiny.UNET_2,
    "deep": tiny.UNET
    | {
        "block_out_channels": [8, 8, 16, 24],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
        "layers_per_block": [2, 1, 2, 1],
        "transformer_layers_per_block": [1, 1, 2, 1],
        "attention_head_dim": [1, 2, 4, 8],
        "cross_attention_dim": [16] * 4,
        "norm_eps": 1e-3,
    },
    "wide": tiny.UNET
    | {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "act_fn": "gelu",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 24,
    },
    "upscaler": tiny.UPSCALER,
    "IF, first stage": tiny.IF_1,
    "IF, second stage": tiny.IF_2,
    "IF, text without a projection": tiny.IF_2
    | {
        "cross_attention_dim": 32,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "addition_embed_type": None,
        "act_fn": "silu",
        "time_embedding_act_fn": None,
        "resnet_skip_time_act": False,
        "mid_block_scale_factor": 0.7,
        "norm_eps": 1e-3,
    },
    "one level of odd width": tiny.UNET
    | {
        "block_out_channels": [9],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "attention_head_dim": 3,
        "norm_num_groups": 3,
    },
}


def unets(config):
    return pair(
        unet.UNet2DConditionModel(unet.UNetConfig.from_dict(config)),
        diffusers.UNet2DConditionModel.from_config(config),
    )


def autoencoders():
    return pair(
        vae.AutoencoderKL(vae.AutoencoderConfig.from_dict(tiny.VAE)), diffusers.AutoencoderKL.from_config(tiny.VAE)
    )


def texts(config):
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    return pair(clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(config)), theirs)


def visions(config):
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    return pair(clip.CLIPVisionModel(clip.CLIPVisionConfig.from_dict(config)), theirs)


def encoders(config):
    theirs = transformers.T5EncoderModel(transformers.T5Config(**config))
    return pair(t5.T5EncoderModel(t5.T5Config.from_dict(config)), theirs)


def tokens(count=3):
    """Returns ids with start, end and padding tokens, for texts of different lengths."""
    ids = np.random.default_rng(0).integers(0, 56, (count, 12))
    ids[:, 0] = tiny.TEXT["bos_token_id"]
    for row, length in zip(ids, (1, 6, 11), strict=True):
        row[length:] = tiny.TEXT["eos_token_id"]
    return ids.astype(np.int32)


class SelfAttention(layers.Attention):
    def __init__(self, channels, heads):
        super().__init__(channels, channels, heads)

    def __call__(self, x):
        return super().__call__(x, *self.project(x))


nn, Attention = torch.nn, attention_processor.Attention
T5 = transformers.T5Config(**tiny.T5)
Downsampling, WORDS, PICTURE = downsampling.Downsample2D, (2, 7, 24), (2, 6, 9, 4)
LAYERS = {
    "linear": (lambda: layers.Linear(24, 10), lambda: nn.Linear(24, 10), WORDS),
    "linear without bias": (lambda: layers.Linear(24, 10, bias=False), lambda: nn.Linear(24, 10, bias=False), WORDS),
    "RMS norm": (lambda: t5.RMSNorm(24, 1e-6), lambda: modeling_t5.T5LayerNorm(24), WORDS),
    "gated gelu": (lambda: t5.GatedGELU(24, 40), lambda: modeling_t5.T5DenseGatedActDense(T5), WORDS),
    "layer norm": (lambda: layers.LayerNorm(24), lambda: nn.LayerNorm(24), WORDS),
    "feed-forward": (lambda: FeedForward(24), lambda: attention.FeedForward(24), WORDS),
    "timestep": (lambda: TimestepEmbedding(24, 20, "silu"), lambda: embeddings.TimestepEmbedding(24, 20), WORDS),
    "attention": (lambda: SelfAttention(24, 3), lambda: Attention(24, heads=3, dim_head=8), WORDS),
    "group norm": (lambda: layers.GroupNorm(2, 4, 1e-5), lambda: nn.GroupNorm(2, 4), PICTURE),
    "group norm, 1e-6": (lambda: layers.GroupNorm(2, 4, 1e-6), lambda: nn.GroupNorm(2, 4, eps=1e-6), PICTURE),
    "conv": (lambda: layers.Conv(4, 6), lambda: nn.Conv2d(4, 6, 3, padding=1), PICTURE),
    "conv 1x1": (lambda: layers.Conv(4, 6, 1), lambda: nn.Conv2d(4, 6, 1), PICTURE),
    "conv 5x5, unpadded": (lambda: layers.Conv(4, 6, 5, padding=0), lambda: nn.Conv2d(4, 6, 5), PICTURE),
    "conv of stride 2": (lambda: layers.Conv(4, 6, stride=2), lambda: nn.Conv2d(4, 6, 3, 2, 1), PICTURE),
    "downsampling": (
        lambda: layers.Downsample(4),
        lambda: Downsampling(4, use_conv=True, name="op"),
        PICTURE,
    ),
    "downsampling of the VAE": (
        lambda: layers.Downsample(4, padding=((0, 1), (0, 1))),
        lambda: Downsampling(4, use_conv=True, padding=0, name="op"),
        PICTURE,
    ),
    "upsampling": (lambda: layers.Upsample(4), lambda: upsampling.Upsample2D(4, use_conv=True), PICTURE),
}


@pytest.mark.parametrize("std", [1, 0.01])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, std):
    """Inputs with a small standard deviation reveal an epsilon that differs from torch's."""
    make_ours, make_theirs, shape = LAYERS[name]
    ours, theirs = pair(make_ours(), make_theirs())
    x = np.float32(std) * noise(*shape)
    assert relative(ours(x), array(theirs(tensor(x)))) < LAYER


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activation(name):
    theirs = transformers.activations.ACT2FN[name] if name == "quick_gelu" else activations.get_activation(name)
    x = 3 * noise(1000)
    assert relative(layers.ACTIVATIONS[name](x), theirs(torch.tensor(x))) < LAYER


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("channels", [8, 9, 320])
def test_sinusoid(channels, flip, shift):
    """The comparison is in float64, because torch's float32 exponential is inaccurate for some frequencies."""
    with double():
        t = np.arange(1000.0)
        theirs = embeddings.get_timestep_embedding(torch.tensor(t), channels, flip, shift)
        assert relative(sinusoid(jnp.asarray(t), channels, flip=flip, shift=shift), theirs) < 1e-12


def tensor(x):
    return first(x) if x.ndim == 4 else torch.tensor(x)


def array(x):
    """Converts torch outputs or inputs to our layout: the first item of a tuple, or all items of a list."""
    x = getattr(x, "sample", x)
    if isinstance(x, list):
        return [array(part) for part in x]
    x = x[0] if isinstance(x, tuple) else x
    return last(x) if x.ndim == 4 else x.numpy()


def calls(module, *inputs):
    """Returns (name, block, {argument: value}) for every block that a call of a torch module runs."""
    blocks = []

    def note(name, block, args, kwargs):
        bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        blocks.append((name, block, bound | bound.pop("kwargs", {})))

    hooks = [
        block.register_forward_pre_hook(lambda b, a, k, name=name: note(name, b, a, k), with_kwargs=True)
        for name, block in module.named_modules()
        if name not in ("", "encoder", "decoder", "embeddings")
        and next(block.children(), None) is not None
        and next(block.parameters(), None) is not None
    ]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return blocks


def scaled(argument, by):
    if isinstance(argument, tuple):
        return tuple(scaled(part, by) for part in argument)
    return by * argument if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


def twin(module, name):
    for part in name.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def projected_text(block, context, parameters):
    """Returns the arguments that replace the text encoder's hidden states in a call of our block."""
    if "keys" in parameters:
        return dict(zip(("keys", "values"), block.project(context), strict=True))
    if "text" not in parameters:
        return {}
    if hasattr(block, "project"):
        return {"text": block.project(context)}
    return {"text": [attention.project(context) for attention in block.attentions]}


def labels(config, batch):
    """Returns one noise level per picture; the last is the largest one. Levels embedded like timesteps may be
    fractions."""
    if "num_class_embeds" in config:
        return np.arange(20)[-batch:].astype(np.int32)
    return np.linspace(0.5, 999, batch, dtype=precision()) if "class_embed_type" in config else None


def inputs(config, size, batch, std=1.0):
    """Returns the arguments for a call of the UNet."""
    x, text = noise(batch, *size, config["in_channels"]), noise(batch, 12, width(config), seed=1)
    t = np.array([999, 500, 0][:batch], precision())
    return std * x, t, text, labels(config, batch)


def width(config):
    """Returns the number of channels of the text encoder's hidden states."""
    return config.get("encoder_hid_dim") or np.max(config["cross_attention_dim"])


def torch_inputs(x, *others):
    """Converts the arguments to those of torch's UNet."""
    return first(x), *(None if other is None else torch.tensor(other) for other in others)


def unet_and_inputs(config, size):
    return *unets(config), torch_inputs(*inputs(config, size, 2))


NETWORKS = {
    "UNet": lambda: unet_and_inputs(tiny.UNET_2, (5, 7)),
    "upscaler": lambda: unet_and_inputs(tiny.UPSCALER, (5, 7)),
    "IF, first stage": lambda: unet_and_inputs(tiny.IF_1, (8, 4)),
    "IF, second stage": lambda: unet_and_inputs(tiny.IF_2, (8, 4)),
    "VAE": lambda: (*autoencoders(), (first(noise(2, 16, 20, 3)),)),
    "text": lambda: (*texts(tiny.TEXT), (torch.tensor(tokens()),)),
    "vision": lambda: (*visions(VISION), (first(noise(2, 12, 12, 3)),)),
}


@pytest.mark.parametrize("std", [1, 0.01])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks(name, std):
    """Compares every block of a network, on the inputs that the block gets within the network, and on the same inputs
    scaled to a small standard deviation."""
    ours, theirs, inputs = NETWORKS[name]()
    errors = {}
    for name, block, arguments in calls(theirs, *inputs):
        arguments = {key: scaled(value, std) for key, value in arguments.items()}
        expected = array(block(**arguments))
        x = array(next(iter(arguments.values())))
        values = {"x": x, "context": x}
        for key, argument in {"embedding": "temb", "context": "encoder_hidden_states"}.items():
            if arguments.get(argument) is not None:
                values[key] = array(arguments[argument])
        if "res_hidden_states_tuple" in arguments:
            # Our block gets all remaining skips, and takes the picture's size from the skip after its own.
            values["skips"] = [expected, *array(list(arguments["res_hidden_states_tuple"]))]
        block = twin(ours, name)
        if not isinstance(block, (layers.Downsample, layers.Upsample)):
            parameters = inspect.signature(block).parameters
            values |= projected_text(block, values["context"], parameters)
            out = block(**{key: values[key] for key in parameters if key in values})
            errors[name] = relative(out[0] if isinstance(out, tuple) else out, expected)
    assert len(errors) > 5
    assert {name: error for name, error in errors.items() if error >= LAYER} == {}


@pytest.fixture
def tolerance(request):
    with contextlib.ExitStack() as stack:
        if request.param == "float64":
            stack.enter_context(double())
            # diffusers computes DeepFloyd-IF's softmax for the pooled text embedding in float32.
            stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield NETWORK[request.param]


def compare_unets(config, size, std=1.0):
    ours, theirs = unets(config)
    args = inputs(config, size, 3, std)
    return relative(jax.jit(type(ours).__call__)(ours, *args), last(theirs(*torch_inputs(*args)).sample))


# These sizes are not divisible by the downsampling factor, except the size for IF, which requires divisibility.
@pytest.mark.parametrize("tolerance", ["float32", "float64"], indirect=True)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("SD 1.x", (5, 7)),
        ("SD 2.x", (5, 7)),
        ("upscaler", (9, 3)),
        ("IF, first stage", (8, 4)),
        ("IF, second stage", (4, 12)),
    ],
)
def test_unet(name, size, tolerance):
    assert compare_unets(UNETS[name], size) < tolerance


@pytest.mark.parametrize(
    ("name", "size"),
    [("deep", (9, 3)), ("wide", (9, 3)), ("one level of odd width", (9, 3)), ("IF, text without a projection", (8, 4))],
)
def test_unet_of_another_shape(name, size):
    """The networks also agree on inputs with a small standard deviation."""
    for std in (1, 0.01):
        assert compare_unets(UNETS[name], size, std) < NETWORK["float32"]


@pytest.mark.parametrize("tolerance", ["float32", "float64"], indirect=True)
def test_vae(tolerance):
    ours, theirs = autoencoders()
    image, latents = noise(2, 16, 20, 3), noise(2, 5, 7, 4)
    assert relative(jax.jit(type(ours).decode)(ours, latents), last(theirs.decode(first(latents)).sample)) < tolerance
    posterior = theirs.encode(first(image)).latent_dist
    mean, logvar = jax.jit(type(ours).encode)(ours, image)
    assert relative(mean, last(posterior.mean)) < tolerance
    assert relative(logvar, last(posterior.logvar)) < tolerance


@pytest.mark.parametrize("config", [tiny.TEXT, tiny.TEXT_2], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("tolerance", ["float32", "float64"], indirect=True)
def test_text(config, tolerance):
    ours, theirs = texts(config)
    expected = theirs(torch.tensor(tokens())).last_hidden_state
    assert relative(jax.jit(type(ours).__call__)(ours, tokens()), expected) < tolerance


@pytest.mark.parametrize("tolerance", ["float32", "float64"], indirect=True)
@pytest.mark.parametrize("end", [2, 57])
def test_projected_text(tolerance, end):
    """transformers finds the end token by its id; with old configs, it takes the token with the largest id."""
    config = tiny.TEXT_PROJECTED | {"eos_token_id": end}
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    ours, theirs = pair(clip.CLIPTextModelWithProjection(clip.CLIPTextConfig.from_dict(config)), theirs)
    expected = theirs(torch.tensor(tokens())).text_embeds
    assert relative(jax.jit(type(ours).__call__)(ours, tokens()), expected) < tolerance


@pytest.mark.parametrize("size", [12, 50])
@pytest.mark.parametrize("tolerance", ["float32", "float64"], indirect=True)
def test_t5(size, tolerance):
    """The texts have padding on the right, padding on the left, or none; some are longer than T5's maximum distance."""
    ours, theirs = encoders(tiny.T5)
    ids = np.random.default_rng(0).integers(0, 60, (3, size)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, 5:] = mask[1, :3] = 0
    expected = theirs(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    for kind in (int, bool):
        assert relative(jax.jit(type(ours).__call__)(ours, ids, mask.astype(kind)), expected) < tolerance


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (12, 20), (4, 10), (9, 30), (64, 1000)])
def test_buckets(count, farthest):
    """The buckets also agree for distances at the ends of the buckets' ranges."""
    theirs = modeling_t5.T5Attention._relative_position_bucket
    offset = torch.arange(1200)[None] - torch.arange(1200)[:, None]
    expected = theirs(offset, num_buckets=count, max_distance=farthest)
    assert np.array_equal(t5.buckets(1200, count, farthest), expected)


@pytest.mark.parametrize(
    "options", [{}, {"hidden_act": "gelu", "patch_size": 3, "layer_norm_eps": 1e-3}], ids=["quick_gelu", "gelu"]
)
@pytest.mark.parametrize("tolerance", ["float32", "float64"], indirect=True)
def test_vision(options, tolerance):
    """Patches of 5 pixels leave a border of the 12 x 12 pictures uncovered; patches of 3 pixels do not."""
    ours, theirs = visions(VISION | options)
    pixels = noise(3, 12, 12, 3)
    assert relative(jax.jit(type(ours).__call__)(ours, pixels), theirs(first(pixels)).pooler_output) < tolerance


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_files_with_old_names(prefix, tmp_path, one_device):
    """Published files prefix text keys with `text_model.`, and old ones name the VAE's attention layers differently."""
    folder = tiny.checkpoint(tmp_path / "tiny", prefix=prefix)
    if prefix:
        rename(folder / "vae" / "diffusion_pytorch_model.safetensors")
    ours = loading.load(folder, devices=one_device).models
    theirs = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    expected = theirs(torch.tensor(tokens())).last_hidden_state.detach()
    assert relative(ours.text_encoder(tokens()), expected) < NETWORK["float32"]
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    latents = noise(2, 4, 4, 4)
    assert relative(ours.vae.decode(latents), last(theirs.decode(first(latents)).sample)) < NETWORK["float32"]


def rename(file):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): array for name, array in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("size", [(9, 8), (14, 20), (23, 9), (12, 21)])
def test_tiled_decoding(size):
    """The tiles have 8 x 8 positions, except for smaller ones at the right and bottom edges."""
    ours, theirs = pair(
        vae.AutoencoderKL(vae.AutoencoderConfig.from_dict(tiny.VAE)), diffusers.AutoencoderKL.from_config(tiny.VAE)
    )
    theirs.enable_tiling()
    x = noise(2, *size, 4)
    tiled = np.asarray(jax.jit(lambda net, x: net.decode(x, 8))(ours, x))
    assert relative(tiled, last(theirs.decode(first(x)).sample)) < 1e-5
    assert relative(tiled, ours.decode(x)) > 1e-4
