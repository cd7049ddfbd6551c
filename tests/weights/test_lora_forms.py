"""Relatives of LoRAs: what every form makes of a weight, by hand in float64, and what is refused of them."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import lora_forms, pickling
from support.loras import models

from sega_jax import CheckpointError, merge_lora
from sega_jax.weights import lora, lora_names
from sega_jax.weights.layout import leaves
from sega_jax.weights.lora_products import FORMS, magnitude_fits

__all__ = ["models"]  # a fixture

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "up_blocks.1.resnets.0.conv1"
NORM = "mid_block.resnets.0.norm1"


def weight(models, name, part="unet", kind="weight"):
    """A parameter in torch's layout, in float64."""
    module = getattr(models, part)
    for step in name.split("."):
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    if kind == "bias":
        return np.asarray(module.bias[...], np.float64)
    if not hasattr(module, "kernel"):
        return np.asarray((module.scale if hasattr(module, "scale") else module.embedding)[...], np.float64)
    array = np.asarray(module.kernel[...], np.float64)
    return array.transpose((array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)))


def close(found, wanted, tolerance=2e-6):
    return np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def kohya(name):
    return f"lora_unet_{name.replace('.', '_')}"


@pytest.fixture
def write(tmp_path):
    def write(content, name="lora.safetensors", metadata=None):
        save_file({key: np.asarray(array) for key, array in content.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def every(models, tmp_path_factory):
    """All forms in one file, each for a linear layer and a convolution of its own: the networks after the merge, and
    the functions from weights to differences by form and layer."""
    shapes = {key.removesuffix(".weight"): shape for key, shape in leaves(models.unet).items() if len(shape) > 1}
    linear = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] != shape[1]]
    convolutions = [name for name, shape in shapes.items() if shape[2:] == (3, 3) and shape[0] > 4]
    content, wanted = {}, {}
    for i, form in enumerate(lora_forms.FORMS):
        layers = {kohya(name): shapes[name] for name in (linear[i], convolutions[i])}
        own, changed = lora_forms.tensors(layers, form, i)
        content |= own
        wanted[form] = {name: changed[kohya(name)] for name in (linear[i], convolutions[i]) if kohya(name) in changed}
    path = tmp_path_factory.mktemp("forms") / "lora.safetensors"
    save_file(content, path)
    return merge_lora(models, {path: 0.7}), wanted


@pytest.mark.parametrize("form", lora_forms.FORMS)
def test_every_form(models, every, form):
    found, wanted = every
    for name, changed in wanted[form].items():
        before, after = weight(models, name), weight(found, name)
        assert close(after, before + 0.7 * changed(before))
        assert not close(after, before, 0.01)


def test_nothing_else_changes(models, every):
    found, wanted = every
    assert {name for layers in wanted.values() for name in layers} == {
        key.removesuffix(".weight")
        for key in leaves(models.unet)
        if key.endswith(".weight")
        and not close(weight(found, key.removesuffix(".weight")), weight(models, key.removesuffix(".weight")), 0)
    }


def test_a_weight_of_few_outputs_and_of_few_inputs(models, write):
    """Whose rank is larger than one of the two: the products are made in another order."""
    for name in ("conv_in", "conv_out"):
        content, changed = lora_forms.tensors(
            {kohya(name): weight(models, name).shape}, "LoRA with a kernel between", seed=3
        )
        found = weight(merge_lora(models, write(content)), name)
        assert close(found, weight(models, name) + changed[kohya(name)](None))


def test_biases_and_norms(models, write):
    rng = np.random.default_rng(0)
    given = {f"{kohya(CONV)}.diff_b": "bias", f"{kohya(NORM)}.w_norm": "weight", f"{kohya(NORM)}.b_norm": "bias"}
    sizes = {key: len(weight(models, CONV if "diff" in key else NORM)) for key in given}
    content = {key: rng.standard_normal(size).astype(np.float32) for key, size in sizes.items()}
    content["lora_te_text_model_embeddings_token_embedding.diff"] = np.ones((60, 16), np.float32)
    found = merge_lora(models, {write(content): -2.0})
    for key, kind in given.items():
        name = CONV if "diff" in key else NORM
        assert close(weight(found, name, kind=kind), weight(models, name, kind=kind) - 2 * content[key])
    words = [weight(one, "embeddings.token_embedding", "text_encoder") for one in (found, models)]
    assert close(words[0], words[1] - 2)
    assert close(weight(found, CONV), weight(models, CONV), 0)


def test_the_bias_of_up_and_a_named_adapter(models, write):
    rng, out = np.random.default_rng(0), len(weight(models, LINEAR))
    up, down, bias = (rng.standard_normal(s).astype(np.float32) for s in ((out, 2), (2, 4 * out), (out,)))
    named = {"lora_B.style_0.weight": up, "lora_A.style_0.weight": down, "lora_B.style_0.bias": bias}
    content = {f"base_model.model.{LINEAR}.{end}": array for end, array in named.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 3, "lora_bias": True})}
    found = merge_lora(models, write(content, metadata=metadata))
    assert close(weight(found, LINEAR), weight(models, LINEAR) + 1.5 * up.astype(np.float64) @ down)
    assert close(weight(found, LINEAR, kind="bias"), weight(models, LINEAR, kind="bias") + 1.5 * bias)


def test_relatives_of_peft(models, write):
    """LoKr without a rank has that of the settings; (IA)^3 multiplies the bias with the outputs; DoRA's norms."""
    rng, shape = np.random.default_rng(0), weight(models, LINEAR).shape
    own, changed = lora_forms.lokr(rng, shape)
    del own["alpha"]
    content = {f"base_model.model.{LINEAR}.{end}": array.astype(np.float32) for end, array in own.items()}
    settings = {"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"net.2": 16}}
    found = merge_lora(models, write(content, metadata={"lora_adapter_metadata": json.dumps(settings)}))
    assert close(weight(found, LINEAR), weight(models, LINEAR) + changed(None) / 4)

    outputs, inputs = (rng.standard_normal(s).astype(np.float32) for s in ((shape[0], 1), (1, shape[1])))
    for vector, bias in ((outputs, outputs[:, 0]), (inputs, 1)):
        found = merge_lora(models, write({f"base_model.model.{LINEAR}.ia3_l.default": vector}))
        assert close(weight(found, LINEAR), weight(models, LINEAR) * vector)
        assert close(weight(found, LINEAR, kind="bias"), weight(models, LINEAR, kind="bias") * bias)

    for name, norms in ((LINEAR, (-1,)), (CONV, (1, -1, 1, 1))):
        own, changed = lora_forms.with_norms(lora_forms.lora, 0)(rng, weight(models, name).shape)
        own["lora_magnitude_vector"] = own.pop("dora_scale").reshape(norms)
        content = {f"unet.{name}.{end}": np.asarray(array, np.float32) for end, array in own.items()}
        found = merge_lora(models, write(content))
        assert close(weight(found, name), weight(models, name) + changed(weight(models, name)))


def test_several_relatives_start_from_the_same_weight(models, write):
    """So that their order is of no matter."""
    files = {}
    total = weight(models, LINEAR)
    for seed, form in enumerate(("DoRA of outputs", "(IA)^3 of outputs", "OFT", "LoRA")):
        content, changed = lora_forms.tensors({kohya(LINEAR): total.shape}, form, seed)
        files[write(content, f"{seed}.safetensors")] = 0.25
        total = total + 0.25 * changed[kohya(LINEAR)](weight(models, LINEAR))
    assert close(weight(merge_lora(models, files), LINEAR), total)
    assert close(weight(merge_lora(models, dict(reversed(files.items()))), LINEAR), total)


def test_scale_zero_changes_nothing(models, write):
    layers = {kohya(LINEAR): weight(models, LINEAR).shape}
    for form in ("DoRA of outputs", "OFT"):
        found = merge_lora(models, {write(lora_forms.tensors(layers, form)[0]): 0})
        assert close(weight(found, LINEAR), weight(models, LINEAR), 0)


@pytest.mark.parametrize(
    ("ending", "stored"),
    [(".bin", np.float16), (".pt", ml_dtypes.bfloat16), (".pth", np.float32), (".ckpt", np.float16)],
)
def test_files_of_torch(models, tmp_path, ending, stored):
    """Also of one whose tensors are in its `state_dict`, and of a file from before torch 1.6."""
    layers = {kohya(LINEAR): weight(models, LINEAR).shape}
    content, _ = lora_forms.tensors(layers, "LoRA", dtype=stored)
    content = content if ending in (".bin", ".pt") else {"state_dict": content, "epoch": 3}
    path = pickling.save(content, tmp_path / f"a{ending}", legacy=ending == ".pt")
    own = content.get("state_dict", content)
    up, down = (own[f"{kohya(LINEAR)}.lora_{name}.weight"].astype(np.float64) for name in ("up", "down"))
    found = weight(merge_lora(models, path), LINEAR)
    assert close(found, weight(models, LINEAR) + 2 / 3 * up @ down)


def by_role(content):
    """The tensors by the roles that a form knows."""
    found = {lora_names.parsed(name).role: array for name, array in content.items()}
    if "on_input" in found:
        found[f"vector_{found.pop('on_input')}"] = found.pop("vector")
    return found


@pytest.mark.parametrize("form", lora_forms.FORMS)
def test_tensors_of_other_sizes(models, form):
    """A tensor with one more entry, or none, along any of its axes does not fit."""
    name = LINEAR if lora_forms.FORMS[form][1] else CONV
    shape = weight(models, name).shape
    content, _ = lora_forms.tensors({name: shape}, form)
    shapes = {role: array.shape for role, array in by_role(content).items()}
    (one,) = (one for one in FORMS if any(needed <= shapes.keys() for needed in one.needs))
    assert one.fits(shapes, shape)
    assert magnitude_fits(shapes, shape)
    for role, own in shapes.items():
        for axis, size in enumerate(own):
            for other in (size + 1, 0):
                changed = shapes | {role: (*own[:axis], other, *own[axis + 1 :])}
                assert not (one.fits(changed, shape) and magnitude_fits(changed, shape)), (role, changed)
        if own:
            assert not (one.fits(shapes | {role: ()}, shape) and magnitude_fits(shapes | {role: ()}, shape))


@pytest.mark.parametrize(
    ("form", "huge"),
    [
        ("LoKr of whole matrices", {"lokr_w1": (2**15, 1), "lokr_w2": (1, 2**15)}),
        ("LoHa", {"hada_w1_a": (2**15, 1), "hada_w1_b": (1, 2**15)}),
        ("OFT", {"oft_blocks": (2**10, 12, 2, 2)}),
    ],
)
def test_products_that_would_be_huge(models, write, monkeypatch, form, huge):
    content, _ = lora_forms.tensors({kohya(LINEAR): weight(models, LINEAR).shape}, form)
    content |= {f"{kohya(LINEAR)}.{end}": np.ones(shape, np.float32) for end, shape in huge.items()}
    for one in FORMS:
        monkeypatch.setattr(type(one), "difference", lambda *_: pytest.fail("a product is made"))
    with pytest.raises(CheckpointError, match="misshapen  "):
        merge_lora(models, write(content))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("oft_R.weight", "peft's OFT"),
        ("boft_R", "peft's BOFT"),
        ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("bm.weight", "GLoRA with a kernel"),
        ("hra_u", "HRA"),
    ],
)
def test_other_methods_are_refused_by_name(models, write, end, words):
    path = write({f"base_model.model.{LINEAR}.{end}": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError) as caught:
        merge_lora(models, path)
    assert str(
        caught.value
    ) == f"{path} contains {words}, which is not supported; use another kind of LoRA" or words in str(caught.value)


def test_words_in_the_file_are_mentioned(models, write):
    content, changed = lora_forms.tensors({kohya(LINEAR): weight(models, LINEAR).shape}, "LoRA")
    with pytest.warns(UserWarning, match=r"lora\.safetensors also contains words of textual inversion, which are ignored"):
        found = merge_lora(models, write(content | {"bundle_emb.cat.clip_l": np.ones((2, 16), np.float32)}))
    assert close(weight(found, LINEAR), weight(models, LINEAR) + changed[kohya(LINEAR)](None))


def test_values_are_read_one_layer_at_a_time(tmp_path):
    """The peak of memory is that of a few layers, not of the file."""
    network = {f"layer{i}": {"kernel": {"value": np.zeros((64, 128), np.float32)}} for i in range(32)}
    content, _ = lora_forms.tensors(dict.fromkeys(network, (128, 64)), "a difference", dtype=np.float16)
    save_file(content, path := tmp_path / "lora.safetensors")
    names = {"net": lora_names.LoraNames(("",), lora_names.layer_keys)}
    for _ in range(2):  # the first time, modules and tables are loaded
        tracemalloc.start()
        (change,) = lora.read({"net": network}, path, names)
        sizes = [change.layers["net"][f"{name}.weight"].difference(np.zeros((128, 64))).nbytes for name in network]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sizes == [128 * 64 * 4] * 32
    assert peak < path.stat().st_size / 2


def test_several_adapters(models, write):
    content = {
        f"unet.{LINEAR}.lora_{side}.{name}.weight": np.ones((2, 2), np.float32) for side in "AB" for name in ("x", "y")
    }
    with pytest.raises(CheckpointError, match=r"lora\.safetensors contains several adapters, x and y; save each"):
        merge_lora(models, write(content))


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_begins_like_a_pickle(models, tmp_path, length):
    content, changed = lora_forms.tensors({kohya(LINEAR): weight(models, LINEAR).shape}, "LoRA")
    path = tmp_path / "lora.safetensors"
    save_file(content, path)
    data = path.read_bytes()
    own = int.from_bytes(data[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + own].ljust(length) + data[8 + own :])
    assert close(weight(merge_lora(models, path), LINEAR), weight(models, LINEAR) + changed[kohya(LINEAR)](None))
