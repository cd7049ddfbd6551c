"""Tests the forms of adapters: compares their weight differences with results computed in float64, and checks that bad
files are rejected."""

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
    """Returns a parameter in torch's layout, in float64."""
    module = getattr(models, part)
    for step in name.split("."):
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    if kind == "bias":
        return np.asarray(module.bias[...], np.float64)
    if not hasattr(module, "kernel"):
        return np.asarray((module.scale if hasattr(module, "scale") else module.embedding)[...], np.float64)
    array = np.asarray(module.kernel[...], np.float64)
    return array.transpose((array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)))


def close(result, expected, tolerance=2e-6):
    return np.abs(result - expected).max() <= tolerance * np.abs(expected).max()


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
    """Merges a file that contains every form, each for one linear layer and one convolution.

    Returns:
        The networks after the merge, and {form: {layer: function that computes the difference from the weight}}.
    """
    shapes = {key.removesuffix(".weight"): shape for key, shape in leaves(models.unet).items() if len(shape) > 1}
    linear = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] != shape[1]]
    convolutions = [name for name, shape in shapes.items() if shape[2:] == (3, 3) and shape[0] > 4]
    content, expected = {}, {}
    for i, form in enumerate(lora_forms.FORMS):
        layers = {kohya(name): shapes[name] for name in (linear[i], convolutions[i])}
        tensors, changed = lora_forms.tensors(layers, form, i)
        content |= tensors
        expected[form] = {name: changed[kohya(name)] for name in (linear[i], convolutions[i]) if kohya(name) in changed}
    path = tmp_path_factory.mktemp("forms") / "lora.safetensors"
    save_file(content, path)
    return merge_lora(models, {path: 0.7}), expected


@pytest.mark.parametrize("form", lora_forms.FORMS)
def test_every_form(models, every, form):
    result, expected = every
    for name, changed in expected[form].items():
        before, after = weight(models, name), weight(result, name)
        assert close(after, before + 0.7 * changed(before))
        assert not close(after, before, 0.01)


def test_other_layers_do_not_change(models, every):
    result, expected = every
    assert {name for layers in expected.values() for name in layers} == {
        key.removesuffix(".weight")
        for key in leaves(models.unet)
        if key.endswith(".weight")
        and not close(weight(result, key.removesuffix(".weight")), weight(models, key.removesuffix(".weight")), 0)
    }


def test_a_rank_larger_than_the_inputs_or_outputs(models, write):
    """With such a rank, the products are computed in a different order."""
    for name in ("conv_in", "conv_out"):
        content, changed = lora_forms.tensors(
            {kohya(name): weight(models, name).shape}, "LoRA with a kernel between", seed=3
        )
        result = weight(merge_lora(models, write(content)), name)
        assert close(result, weight(models, name) + changed[kohya(name)](None))


def test_biases_and_norms(models, write):
    rng = np.random.default_rng(0)
    kinds = {f"{kohya(CONV)}.diff_b": "bias", f"{kohya(NORM)}.w_norm": "weight", f"{kohya(NORM)}.b_norm": "bias"}
    sizes = {key: len(weight(models, CONV if "diff" in key else NORM)) for key in kinds}
    content = {key: rng.standard_normal(size).astype(np.float32) for key, size in sizes.items()}
    content["lora_te_text_model_embeddings_token_embedding.diff"] = np.ones((60, 16), np.float32)
    result = merge_lora(models, {write(content): -2.0})
    for key, kind in kinds.items():
        name = CONV if "diff" in key else NORM
        assert close(weight(result, name, kind=kind), weight(models, name, kind=kind) - 2 * content[key])
    tables = [weight(networks, "embeddings.token_embedding", "text_encoder") for networks in (result, models)]
    assert close(tables[0], tables[1] - 2)
    assert close(weight(result, CONV), weight(models, CONV), 0)


def test_the_bias_of_an_up_projection_and_a_named_adapter(models, write):
    rng, out = np.random.default_rng(0), len(weight(models, LINEAR))
    up, down, bias = (rng.standard_normal(s).astype(np.float32) for s in ((out, 2), (2, 4 * out), (out,)))
    named = {"lora_B.style_0.weight": up, "lora_A.style_0.weight": down, "lora_B.style_0.bias": bias}
    content = {f"base_model.model.{LINEAR}.{end}": array for end, array in named.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 3, "lora_bias": True})}
    result = merge_lora(models, write(content, metadata=metadata))
    assert close(weight(result, LINEAR), weight(models, LINEAR) + 1.5 * up.astype(np.float64) @ down)
    assert close(weight(result, LINEAR, kind="bias"), weight(models, LINEAR, kind="bias") + 1.5 * bias)


def test_other_adapters_of_peft(models, write):
    """LoKr without a rank uses the settings' rank. (IA)^3 for outputs also multiplies the bias. DoRA sets norms."""
    rng, shape = np.random.default_rng(0), weight(models, LINEAR).shape
    tensors, changed = lora_forms.lokr(rng, shape)
    del tensors["alpha"]
    content = {f"base_model.model.{LINEAR}.{end}": array.astype(np.float32) for end, array in tensors.items()}
    settings = {"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"net.2": 16}}
    result = merge_lora(models, write(content, metadata={"lora_adapter_metadata": json.dumps(settings)}))
    assert close(weight(result, LINEAR), weight(models, LINEAR) + changed(None) / 4)

    outputs, inputs = (rng.standard_normal(s).astype(np.float32) for s in ((shape[0], 1), (1, shape[1])))
    for vector, bias in ((outputs, outputs[:, 0]), (inputs, 1)):
        result = merge_lora(models, write({f"base_model.model.{LINEAR}.ia3_l.default": vector}))
        assert close(weight(result, LINEAR), weight(models, LINEAR) * vector)
        assert close(weight(result, LINEAR, kind="bias"), weight(models, LINEAR, kind="bias") * bias)

    for name, norms in ((LINEAR, (-1,)), (CONV, (1, -1, 1, 1))):
        tensors, changed = lora_forms.with_norms(lora_forms.lora, 0)(rng, weight(models, name).shape)
        tensors["lora_magnitude_vector"] = tensors.pop("dora_scale").reshape(norms)
        content = {f"unet.{name}.{end}": np.asarray(array, np.float32) for end, array in tensors.items()}
        result = merge_lora(models, write(content))
        assert close(weight(result, name), weight(models, name) + changed(weight(models, name)))


def test_several_adapters_start_from_the_original_weight(models, write):
    """The order of the adapters does not matter."""
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
        result = merge_lora(models, {write(lora_forms.tensors(layers, form)[0]): 0})
        assert close(weight(result, LINEAR), weight(models, LINEAR), 0)


@pytest.mark.parametrize(
    ("ending", "stored"),
    [(".bin", np.float16), (".pt", ml_dtypes.bfloat16), (".pth", np.float32), (".ckpt", np.float16)],
)
def test_pickled_files(models, tmp_path, ending, stored):
    """Some files have their tensors in a `state_dict`, and one is in the format that torch used before version 1.6."""
    layers = {kohya(LINEAR): weight(models, LINEAR).shape}
    content, _ = lora_forms.tensors(layers, "LoRA", dtype=stored)
    content = content if ending in (".bin", ".pt") else {"state_dict": content, "epoch": 3}
    path = pickling.save(content, tmp_path / f"a{ending}", legacy=ending == ".pt")
    tensors = content.get("state_dict", content)
    up, down = (tensors[f"{kohya(LINEAR)}.lora_{name}.weight"].astype(np.float64) for name in ("up", "down"))
    result = weight(merge_lora(models, path), LINEAR)
    assert close(result, weight(models, LINEAR) + 2 / 3 * up @ down)


def by_role(content):
    """Returns {role: tensor}, with the roles that forms use."""
    result = {lora_names.parsed(name).role: array for name, array in content.items()}
    if "on_input" in result:
        result[f"vector_{result.pop('on_input')}"] = result.pop("vector")
    return result


@pytest.mark.parametrize("form", lora_forms.FORMS)
def test_tensors_of_other_sizes_do_not_fit(models, form):
    """A tensor does not fit if one of its axes is one entry too long, or empty."""
    name = LINEAR if lora_forms.FORMS[form][1] else CONV
    shape = weight(models, name).shape
    content, _ = lora_forms.tensors({name: shape}, form)
    shapes = {role: array.shape for role, array in by_role(content).items()}
    (instance,) = (candidate for candidate in FORMS if any(needed <= shapes.keys() for needed in candidate.needs))
    assert instance.fits(shapes, shape)
    assert magnitude_fits(shapes, shape)
    for role, sizes in shapes.items():
        for axis, size in enumerate(sizes):
            for other in (size + 1, 0):
                changed = shapes | {role: (*sizes[:axis], other, *sizes[axis + 1 :])}
                assert not (instance.fits(changed, shape) and magnitude_fits(changed, shape)), (role, changed)
        if sizes:
            assert not (instance.fits(shapes | {role: ()}, shape) and magnitude_fits(shapes | {role: ()}, shape))


@pytest.mark.parametrize(
    ("form", "huge"),
    [
        ("LoKr of full matrices", {"lokr_w1": (2**15, 1), "lokr_w2": (1, 2**15)}),
        ("LoHa", {"hada_w1_a": (2**15, 1), "hada_w1_b": (1, 2**15)}),
        ("OFT", {"oft_blocks": (2**10, 12, 2, 2)}),
    ],
)
def test_huge_products_are_rejected_before_they_are_computed(models, write, monkeypatch, form, huge):
    content, _ = lora_forms.tensors({kohya(LINEAR): weight(models, LINEAR).shape}, form)
    content |= {f"{kohya(LINEAR)}.{end}": np.ones(shape, np.float32) for end, shape in huge.items()}
    for instance in FORMS:
        monkeypatch.setattr(type(instance), "difference", lambda *_: pytest.fail("a product is computed"))
    with pytest.raises(CheckpointError, match="misshapen  "):
        merge_lora(models, write(content))


@pytest.mark.parametrize(
    ("end", "method"),
    [
        ("oft_R.weight", "peft's OFT"),
        ("boft_R", "peft's BOFT"),
        ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("bm.weight", "GLoRA with a kernel"),
        ("hra_u", "HRA"),
    ],
)
def test_unsupported_methods_are_rejected_by_name(models, write, end, method):
    path = write({f"base_model.model.{LINEAR}.{end}": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError) as caught:
        merge_lora(models, path)
    assert str(
        caught.value
    ) == f"{path} contains {method}, which is not supported; use a different kind of LoRA" or method in str(
        caught.value
    )


def test_words_of_textual_inversion_in_the_file_raise_a_warning(models, write):
    content, changed = lora_forms.tensors({kohya(LINEAR): weight(models, LINEAR).shape}, "LoRA")
    with pytest.warns(
        UserWarning, match=r"lora\.safetensors also contains words from textual inversion, which are ignored"
    ):
        result = merge_lora(models, write(content | {"bundle_emb.cat.clip_l": np.ones((2, 16), np.float32)}))
    assert close(weight(result, LINEAR), weight(models, LINEAR) + changed[kohya(LINEAR)](None))


def test_values_are_read_one_layer_at_a_time(tmp_path):
    """Peak memory depends on the size of a few layers, not on the size of the file."""
    network = {f"layer{i}": {"kernel": {"value": np.zeros((64, 128), np.float32)}} for i in range(32)}
    content, _ = lora_forms.tensors(dict.fromkeys(network, (128, 64)), "a difference", dtype=np.float16)
    save_file(content, path := tmp_path / "lora.safetensors")
    names = {"net": lora_names.LoraNames(("",), lora_names.layer_keys)}
    for _ in range(2):  # the first iteration also loads modules and tables
        tracemalloc.start()
        (change,) = lora.read({"net": network}, path, names)
        sizes = [change.layers["net"][f"{name}.weight"].difference(np.zeros((128, 64))).nbytes for name in network]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sizes == [128 * 64 * 4] * 32
    assert peak < path.stat().st_size / 2


def test_a_file_with_several_adapters_is_rejected(models, write):
    content = {
        f"unet.{LINEAR}.lora_{side}.{name}.weight": np.ones((2, 2), np.float32) for side in "AB" for name in ("x", "y")
    }
    with pytest.raises(CheckpointError, match=r"lora\.safetensors contains several adapters, x and y; save each"):
        merge_lora(models, write(content))


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_looks_like_the_start_of_a_pickle(models, tmp_path, length):
    content, changed = lora_forms.tensors({kohya(LINEAR): weight(models, LINEAR).shape}, "LoRA")
    path = tmp_path / "lora.safetensors"
    save_file(content, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + size].ljust(length) + data[8 + size :])
    assert close(weight(merge_lora(models, path), LINEAR), weight(models, LINEAR) + changed[kohya(LINEAR)](None))
