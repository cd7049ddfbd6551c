"""Checks that merging other forms of adapters gives the same weights as LyCORIS and peft. All parameters are random."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("lycoris")

import diffusers
import jax
import numpy as np
import peft
import torch
from lycoris import LycorisNetwork, create_lycoris, modules
from lycoris.functional.general import apply_dora_scale
from safetensors.torch import save_file
from support.loras import models

from sega_jax import merge_lora
from sega_jax.weights.layout import leaves, torch_name

pytestmark = pytest.mark.parity

__all__ = ["models"]  # a fixture

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV, POINT, NORM = "up_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut", "mid_block.resnets.0.norm1"
RANK = 3


def parameters(models):
    """Returns the UNet's parameters by key, in torch's layout."""
    values = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(models.unet):
        array = np.asarray(leaf)
        if array.ndim > 1:
            array = array.transpose((array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)))
        values[torch_name(path)] = torch.tensor(np.ascontiguousarray(array))
    return values


def layer(values, name):
    """Returns a torch layer with the UNet's weights."""
    weight = values[f"{name}.weight"]
    if weight.ndim == 1:
        module = torch.nn.GroupNorm(4, len(weight))
    elif weight.ndim == 2:
        module = torch.nn.Linear(*reversed(weight.shape))
    else:
        module = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=weight.shape[2] // 2)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(values[f"{name}.bias"])
    return module


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def file_of(module, name, path):
    """Writes a module to a file as LyCORIS does, and returns the file's path."""
    key = f"lora_unet_{name.replace('.', '_')}"
    if isinstance(module, modules.FullModule):
        saved = {"diff": module.weight, "diff_b": module.bias}
    else:
        saved = module.custom_state_dict() or module.state_dict()
    save_file({f"{key}.{end}": tensor.detach().clone().contiguous() for end, tensor in saved.items()}, path)
    return path


def far(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


LYCORIS = {
    "LoRA": (modules.LoConModule, {}, (LINEAR, CONV, POINT)),
    "LoRA with a kernel between": (modules.LoConModule, {"use_tucker": True}, (CONV,)),
    "LoRA with the rank's root": (modules.LoConModule, {"rs_lora": True}, (LINEAR, CONV)),
    "LoHa": (modules.LohaModule, {}, (LINEAR, CONV, POINT)),
    "LoHa with kernels between": (modules.LohaModule, {"use_tucker": True}, (CONV,)),
    "LoKr": (modules.LokrModule, {}, (LINEAR, CONV, POINT)),
    "LoKr by 2": (modules.LokrModule, {"factor": 2}, (LINEAR, CONV)),
    "LoKr the other way": (modules.LokrModule, {"factor": 2, "unbalanced_factorization": True}, (LINEAR, CONV)),
    "LoKr of two products": (modules.LokrModule, {"decompose_both": True, "lora_dim": 1}, (LINEAR, CONV)),
    "LoKr with a kernel between": (modules.LokrModule, {"use_tucker": True, "lora_dim": 1}, (CONV,)),
    "LoKr of full matrices": (modules.LokrModule, {"full_matrix": True}, (LINEAR, CONV)),
    "DoRA": (modules.LoConModule, {"weight_decompose": True}, (LINEAR, CONV)),
    "DoRA of inputs": (modules.LoConModule, {"weight_decompose": True, "wd_on_out": False}, (LINEAR, CONV)),
    "DoRA of a LoHa": (modules.LohaModule, {"weight_decompose": True, "wd_on_out": False}, (LINEAR, CONV)),
    "DoRA of a LoKr": (modules.LokrModule, {"weight_decompose": True}, (LINEAR, CONV)),
    "(IA)^3": (modules.IA3Module, {}, (LINEAR, CONV)),
    "(IA)^3 of inputs": (modules.IA3Module, {"train_on_input": True}, (LINEAR, CONV)),
    "a difference": (modules.FullModule, {}, (LINEAR, CONV)),
    "a norm": (modules.NormModule, {}, (NORM,)),
    "GLoRA": (modules.GLoRAModule, {}, (LINEAR, CONV)),
    "OFT": (modules.DiagOFTModule, {}, (LINEAR, CONV)),
    "OFT with a constraint": (modules.DiagOFTModule, {"constraint": 0.01, "rescaled": True}, (LINEAR, CONV)),
    "BOFT": (modules.ButterflyOFTModule, {"lora_dim": 8}, (LINEAR, CONV)),
    "BOFT with a constraint": (
        modules.ButterflyOFTModule,
        {"lora_dim": 8, "constraint": 0.01, "rescaled": True},
        (LINEAR, CONV),
    ),
}


@pytest.mark.parametrize("form", LYCORIS)
def test_lycoris(models, tmp_path, form):
    """Alpha equals the rank here, because LyCORIS 4.1.3 merges LoHa and LoKr with the square of alpha / rank."""
    kind, settings, names = LYCORIS[form]
    before = parameters(models)
    for name in names:
        original = layer(before, name)
        settings = {"lora_dim": RANK, "alpha": settings.get("lora_dim", RANK)} | settings
        module = randomised(kind("", original, **settings))
        ours = parameters(merge_lora(models, file_of(module, name, tmp_path / "a.safetensors")))
        with torch.no_grad():
            weight, bias = module.get_merged_weight(1.0, original.weight.shape)
        assert far(ours[f"{name}.weight"], weight.detach()) < 1e-6
        assert far(ours[f"{name}.weight"], before[f"{name}.weight"]) > 0.01
        if bias is not None:
            assert far(ours[f"{name}.bias"], bias.detach()) < 1e-6
            assert far(ours[f"{name}.bias"], before[f"{name}.bias"]) > 0.01


@pytest.mark.parametrize("form", [form for form in LYCORIS if form.startswith(("Lo", "DoRA", "GLoRA"))])
def test_alphas_of_lycoris(models, tmp_path, form):
    """A merged layer gives the same output as LyCORIS' layer with the adapter, for an alpha of twice the rank."""
    kind, settings, names = LYCORIS[form]
    before = parameters(models)
    generator = torch.Generator().manual_seed(1)
    for name in names:
        original = layer(before, name)
        module = randomised(kind("", original, **{"lora_dim": RANK, "alpha": 2 * RANK} | settings))
        ours = layer(parameters(merge_lora(models, file_of(module, name, tmp_path / "a.safetensors"))), name)
        shape = (5, original.weight.shape[1]) if original.weight.ndim == 2 else (2, original.weight.shape[1], 5, 4)
        inputs = torch.randn(shape, generator=generator)
        with torch.no_grad():
            assert far(ours(inputs), module(inputs)) < 3e-6
            assert far(original(inputs), module(inputs)) > 0.01


@pytest.mark.parametrize("scale", [0.0, 0.6, -1.0])
def test_other_scales_of_dora(models, tmp_path, scale):
    """With scales other than 1, DoRA with norms per input gives the same weights as LyCORIS' function and ComfyUI."""
    original = layer(parameters(models), CONV)
    module = randomised(modules.LoConModule("", original, 1, RANK, 2.0, weight_decompose=True, wd_on_out=False))
    path = file_of(module, CONV, tmp_path / "a.safetensors")
    ours = parameters(merge_lora(models, {path: scale}))[f"{CONV}.weight"]
    with torch.no_grad():
        theirs = apply_dora_scale(original.weight, module.get_diff_weight(1)[0], module.dora_scale, scale)
    assert far(ours, theirs) < 1e-6


NETWORKS = {
    "LoRA and norms": {"algo": "locon", "train_norm": True, "use_tucker": True},
    "LoHa": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "(IA)^3": {"algo": "ia3"},
    "OFT": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
}


@pytest.mark.parametrize("form", NETWORKS)
def test_networks_of_lycoris(folder, models, tmp_path, form):
    """The adapters change all layers in the blocks of a UNet, and use LyCORIS' names."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    blocks = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
    LycorisNetwork.apply_preset({"target_module": blocks, "enable_conv": True})
    sizes = {f"{layer}_{size}": 4 for layer in ("linear", "conv") for size in ("dim", "alpha")}
    network = create_lycoris(unet, 1.0, **sizes, **NETWORKS[form])
    for number, one in enumerate(network.loras):
        network.add_module(one.lora_name, randomised(one, number))
    saved = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    save_file(saved, tmp_path / "a.safetensors")
    network.merge_to(1.0)
    theirs, before, ours = unet.state_dict(), parameters(models), parameters(merge_lora(models, tmp_path))
    assert max(far(ours[key], theirs[key]) for key in ours) < 1e-6
    assert sum(far(ours[key], before[key]) > 0.01 for key in ours) >= len(network.loras) > 100


TARGETS = ["to_q", "ff.net.2", "conv1", "proj_in"]
PEFT = {
    "LoHa": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, init_weights=False, alpha_pattern={"to_q": 2}),
    "LoHa with kernels between": peft.LoHaConfig(
        r=3, alpha=5, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS, init_weights=False),
    "LoKr of two products": peft.LoKrConfig(
        r=1, alpha=5, target_modules=TARGETS, init_weights=False, decompose_both=True, use_effective_conv2d=True
    ),
    "LoKr of full matrices": peft.LoKrConfig(
        r=64, alpha=5, target_modules=TARGETS, init_weights=False, rank_pattern={"to_q": 32}
    ),
    "(IA)^3": peft.IA3Config(target_modules=["to_q", "ff.net.2"], feedforward_modules=["ff.net.2"]),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
    "LoRA with biases": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS[1:], lora_bias=True, use_rslora=True, rank_pattern={"conv1": 2}
    ),
}


@pytest.mark.parametrize("form", PEFT)
@pytest.mark.parametrize("adapter", ["default", "style_0"])
def test_peft(folder, models, tmp_path, form, adapter):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    wrapped = peft.get_peft_model(unet, PEFT[form], adapter_name=adapter)
    randomised_adapter(wrapped)
    # One adapter is a safetensors file, the other a pickle.
    wrapped.save_pretrained(tmp_path, safe_serialization=adapter == "default")
    where = tmp_path if adapter == "default" else tmp_path / adapter
    theirs = wrapped.merge_and_unload().state_dict()
    ours = parameters(merge_lora(models, where))
    assert ours.keys() == theirs.keys() == leaves(models.unet).keys()
    assert max(far(ours[key], theirs[key]) for key in ours) < 1e-6
    assert max(far(before[key], theirs[key]) for key in ours) > 0.01


def randomised_adapter(wrapped):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif any(word in name for word in ("lora_", "hada_", "lokr_", "ia3_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
