"""Tests LoRAs: naming schemes, merging, settings, and files that are rejected before their weights are read."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import tiny
from support.loras import LAYERS, NAMINGS, close, kohya, layers, merged_by_hand, models, old_diffusers, peft, tensors

from sega_jax import CheckpointError, load, merge_lora
from sega_jax.systems.registry import adapters_of
from sega_jax.weights.layout import leaves
from sega_jax.weights.original_names import unet_names

__all__ = ["layers", "models"]  # fixtures


def cast(models, dtype):
    return jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x).astype(dtype)), models)


@pytest.fixture
def write(tmp_path):
    def write(content, name="lora.safetensors", metadata=None):
        save_file(content, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(models, layers, write, naming, alpha):
    result = merge_lora(models, {write(tensors(layers, NAMINGS[naming], alpha)): 0.7})
    assert close(result, merged_by_hand(models, layers, 0.7, alpha))
    assert not close(result, merged_by_hand(models, layers, 0.69, alpha))
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(models), strict=True))


def test_a_path_has_scale_one(models, layers, write):
    path = write(tensors(layers, kohya))
    assert close(merge_lora(models, str(path)), merged_by_hand(models, layers))


def test_unprefixed_names_belong_to_the_unet(models, layers, write):
    only = {place: layer for place, layer in layers.items() if place[0] == "unet"}
    result = {key.removeprefix("unet."): array for key, array in tensors(only, old_diffusers).items()}
    assert close(merge_lora(models, write(result)), merged_by_hand(models, only))


def test_several_loras_add_up(models, layers, write):
    """Some layers are changed by several LoRAs. The LoRAs' order does not matter; a negative scale subtracts a LoRA."""
    halves = [{place: layer for i, (place, layer) in enumerate(layers.items()) if i % 3 != k} for k in (0, 1)]
    a, b = write(tensors(halves[0], kohya), "a.safetensors"), write(tensors(halves[1], peft), "b.safetensors")
    result = merge_lora(models, {a: 0.5, b: -2})
    assert close(result, merged_by_hand(merged_by_hand(models, halves[0], 0.5), halves[1], -2))
    assert close(merge_lora(models, {b: -2, a: 0.5}), result)
    assert close(merge_lora(result, {a: -0.5, b: 2}), models, 1e-5)


def test_networks_without_changes_stay_the_same_objects(models, layers, write):
    only = {place: layer for place, layer in layers.items() if place[0] == "text_encoder"}
    result = merge_lora(models, write(tensors(only, kohya)))
    assert result.unet is models.unet
    assert result.vae is models.vae


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_other_dtypes(models, layers, write, stored):
    in_file = {place: tuple(np.asarray(x).astype(stored) for x in layer) for place, layer in layers.items()}
    rounded = {place: tuple(np.asarray(x).astype(np.float32) for x in layer) for place, layer in in_file.items()}
    assert close(merge_lora(models, write(tensors(in_file, kohya))), merged_by_hand(models, rounded))


@pytest.mark.slow
def test_half_precision_is_rounded_once(models, layers, write):
    path, half = write(tensors(layers, kohya)), cast(models, ml_dtypes.bfloat16)
    result, sums = merge_lora(half, path), merge_lora(cast(half, np.float32), path)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(sums), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype(ml_dtypes.bfloat16))


def test_a_convolution_with_three_tensors(models, write):
    """LyCORIS stores convolutions as up [out, r], mid [r, r, 3, 3] and down [r, in]."""
    rng = np.random.default_rng(1)
    up, mid, down = (rng.standard_normal(s).astype(np.float32) for s in ((24, 2, 1, 1), (2, 2, 3, 3), (2, 24, 1, 1)))
    layer = "lora_unet_mid_block_resnets_0_conv1"
    content = {f"{layer}.lora_up.weight": up, f"{layer}.lora_mid.weight": mid, f"{layer}.lora_down.weight": down}
    result = merge_lora(models, write(content)).unet.mid_block.resnets[0].conv1.kernel[...]
    difference = np.einsum("oa,abhw,bi->hwio", up[..., 0, 0], mid, down[..., 0, 0])
    before = models.unet.mid_block.resnets[0].conv1.kernel[...]
    np.testing.assert_allclose(result, before + difference, rtol=1e-5, atol=1e-5)


def test_settings_in_the_header(models, layers, write):
    """diffusers' header contains alphas for networks and for single layers, and rank-stabilised scaling."""
    first = next(iter(LAYERS))
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {first: 3.0}, "text_encoder.lora_alpha": 2}
    settings |= {"unet.r": 4, "text_encoder.use_rslora": True}
    path = write(tensors(layers, peft, alpha=False), metadata={"lora_adapter_metadata": json.dumps(settings)})
    expected = {}
    for (part, name), (up, down, _) in layers.items():
        alpha = 3 if name == first else 8 if part == "unet" else 2 * math.sqrt(len(down))
        expected[part, name] = (up, down, np.float32(alpha))
    assert close(merge_lora(models, path), merged_by_hand(models, expected))


def scaled(layers, alpha):
    """Returns the layers with new alphas, computed by `alpha` from network, name and rank."""
    return {
        (part, name): (up, down, np.float32(alpha(part, name, len(down))))
        for (part, name), (up, down, _) in layers.items()
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_settings_next_to_the_file(models, layers, write, tmp_path, rslora):
    """peft's settings also apply to a renamed file. The file is for one network, so its layers have no prefix."""
    unet = {place: layer for place, layer in layers.items() if place[0] == "unet"}
    first, second, *_ = (name for _, name in unet)
    patterns = {first: 3, rf"{second.rpartition('.')[0]}\.\w+": 7}
    settings = {"r": 4, "lora_alpha": 16, "alpha_pattern": patterns, "use_rslora": rslora, "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

    def alpha(part, name, rank):
        siblings = name.rpartition(".")[0] == second.rpartition(".")[0]
        return (3 if name == first else 7 if siblings else 16) * (math.sqrt(rank) if rslora else 1)

    content = {
        f"base_model.model.{name.removeprefix('unet.')}": array
        for name, array in tensors(unet, peft, alpha=False).items()
    }
    expected = merged_by_hand(models, scaled(unet, alpha))
    for name in ("adapter_model.safetensors", "renamed.safetensors"):
        assert close(merge_lora(models, write(content, name)), expected)
    bare = {name.removeprefix("base_model.model."): array for name, array in content.items()}
    unet_alone = merged_by_hand(models, scaled(unet, lambda part, name, rank: rank))
    # The settings do not apply to a file in the same folder that peft did not write.
    assert close(merge_lora(models, write(bare, "other.safetensors")), unet_alone)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_settings_of_one_network_in_the_header(models, layers, write, part):
    """diffusers' save_lora_adapter writes the settings without the name of the network."""
    selected = {place: layer for place, layer in layers.items() if place[0] == part}
    content = {name.removeprefix(f"{part}."): array for name, array in tensors(selected, peft, alpha=False).items()}
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "r": 1, "peft_type": "LORA"})}
    result = merge_lora(models, write(content, metadata=metadata))
    assert close(result, merged_by_hand(models, scaled(selected, lambda part, name, rank: 4)))


def test_the_default_alpha_is_pefts(models, layers, write):
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "text_encoder.r": 4})}
    result = merge_lora(models, write(tensors(layers, peft, alpha=False), metadata=metadata))
    assert close(result, merged_by_hand(models, scaled(layers, lambda part, name, rank: 8)))


def test_load_merges_a_lora(folder, one_device, layers, write):
    path = write(tensors(layers, kohya))
    before = load(folder, devices=one_device)
    after = load(folder, devices=one_device, lora={path: 0.5})
    assert close(after.models, merged_by_hand(before.models, layers, 0.5))
    original = before.models
    before.models = merge_lora(before.models, {path: 0.5})
    assert close(before.models, after.models, 0)
    before.models = original
    assert close(before.models, merged_by_hand(original, {}), 0)


def test_merged_weights_keep_their_devices(folder, layers, write):
    pipe = load(folder, devices=jax.local_devices()[:2])
    result = merge_lora(pipe.models, write(tensors(layers, kohya)))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(pipe.models), strict=True):
        assert a.sharding == b.sharding
    assert close(result, merged_by_hand(pipe.models, layers))


CONV = "lora_unet_mid_block_resnets_0_conv1"
UP, DOWN = np.ones((24, 2, 1, 1)), np.ones((2, 24, 3, 3))
BROKEN = {
    "unknown": ({"lora_unet_x.lora_up.weight": np.ones((2, 2))}, "unexpected lora_unet_x.lora_up.weight (2, 2)"),
    "an incomplete LoHa": (
        {f"{CONV}.hada_w1_a": np.ones((24, 2))},
        "missing    hada_w1_b and hada_w2_a and hada_w2_b of the unet's mid_block.resnets.0.conv1.weight",
    ),
    "only norms": ({f"{CONV}.dora_scale": np.ones(2)}, "missing    the matrices of the unet's mid_block.resnets.0"),
    "two kinds": (
        {f"{CONV}.lora_up.weight": UP, f"{CONV}.lora_down.weight": DOWN, f"{CONV}.diff": np.ones((24, 24, 3, 3))},
        "ambiguous  LoRA and a difference of the unet's mid_block.resnets.0.conv1.weight",
    ),
    "an unrelated tensor": (
        {f"{CONV}.lora_up.weight": UP, f"{CONV}.lora_down.weight": DOWN, f"{CONV}.hada_t1": np.ones((2, 2, 3, 3))},
        "missing    the matrices of hada_t1 of the unet's mid_block.resnets.0.conv1.weight",
    ),
    "several alphas": (
        {f"{CONV}.lora_up.weight": UP, f"{CONV}.lora_down.weight": DOWN, f"{CONV}.alpha": np.ones(2)},
        "misshapen  ",
    ),
    "a norm": ({"unet.conv_norm_out.lora_A.weight": np.ones((2, 2))}, "unexpected unet.conv_norm_out.lora_A.weight"),
    "only the up matrix": (
        {f"{CONV}.lora_up.weight": np.ones((24, 2, 1, 1))},
        "missing    down of the unet's mid_block.resnets.0.conv1",
    ),
    "ranks": (
        {f"{CONV}.lora_up.weight": np.ones((24, 2, 1, 1)), f"{CONV}.lora_down.weight": np.ones((3, 24, 3, 3))},
        "misshapen  down (3, 24, 3, 3), up (24, 2, 1, 1) of the unet's mid_block.resnets.0.conv1.weight, which is",
    ),
    "kernel": (
        {f"{CONV}.lora_up.weight": np.ones((24, 2, 1, 1)), f"{CONV}.lora_down.weight": np.ones((2, 24, 1, 1))},
        "misshapen",
    ),
    "vectors": ({f"{CONV}.lora_up.weight": np.ones(24), f"{CONV}.lora_down.weight": np.ones(24)}, "misshapen"),
    "no rank": (
        {f"{CONV}.lora_up.weight": np.ones((24, 0, 1, 1)), f"{CONV}.lora_down.weight": np.ones((0, 24, 3, 3))},
        "misshapen",
    ),
    "twice": (
        {f"{CONV}.lora_up.weight": np.ones(1), "unet.mid_block.resnets.0.conv1.lora_B.weight": np.ones(1)},
        "twice      unet.mid_block.resnets.0.conv1.lora_B.weight, up of the unet's",
    ),
    "infinite": (
        {f"{CONV}.lora_up.weight": UP * np.inf, f"{CONV}.lora_down.weight": DOWN},
        "has NaN or infinite entries",
    ),
    "integers": (
        {f"{CONV}.lora_up.weight": np.ones((24, 2), np.int8), f"{CONV}.lora_down.weight": DOWN},
        "is int8, expected a floating type",
    ),
    "nothing": ({}, "it has no tensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_are_rejected(models, write, name):
    content, message = BROKEN[name]
    path = write(content)
    with pytest.raises(CheckpointError) as caught:
        merge_lora(models, path)
    assert f"{path} does not fit this checkpoint's text_encoder and unet:\n" in str(caught.value)
    assert message in str(caught.value)


def test_problems_are_reported_before_the_checkpoint_is_read(folder, one_device, write, monkeypatch):
    monkeypatch.setattr("sega_jax.pipelines.loading.filled", lambda *_: pytest.fail("weights are read"))
    path = write({f"lora_unet_x{i}.alpha": np.ones(1) for i in range(300)})
    with pytest.raises(CheckpointError) as caught:
        load(folder, devices=one_device, lora=path)
    assert str(caught.value).count("unexpected") == 10
    assert str(caught.value).endswith("\n  and 290 more")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"unet.lora_alpha": "x"}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": {"a": null}}',
        '{"unet.alpha_pattern": {"(": 1}}',
        '{"unet.alpha_pattern": {"(a+)+b": 1}}',
    ],
)
def test_broken_settings_in_the_header_are_rejected(models, layers, write, text):
    with pytest.raises(CheckpointError, match="lora_adapter_metadata in its header cannot be used"):
        merge_lora(models, write(tensors(layers, peft), metadata={"lora_adapter_metadata": text}))


@pytest.mark.parametrize("text", ["{", "\\xff", '{"lora_alpha": null}', f'{{"lora_alpha": {10**400}}}'])
def test_broken_settings_next_to_a_file_are_rejected(models, layers, write, tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be used"):
        merge_lora(models, write(tensors(layers, peft), "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_initialisations_that_change_the_checkpoint_are_rejected(models, layers, write, tmp_path, method):
    """A LoRA with one of these initialisations must be added to weights that peft has changed."""
    settings = {"r": 4, "lora_alpha": 4, "init_lora_weights": method}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"init_lora_weights='{method}' also changed the weights of the network"):
        merge_lora(models, write(tensors(layers, peft), "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": "gaussian"}))
    merge_lora(models, write(tensors(layers, peft), "adapter_model.safetensors"))


def test_a_file_of_peft_without_settings_raises_a_warning(models, layers, write):
    content = {f"base_model.model.{key}": array for key, array in tensors(layers, peft, False).items()}
    path = write(content, "adapter_model.safetensors")
    with pytest.warns(
        UserWarning, match=r"has no adapter_config\.json .* next to it; alpha is assumed to equal the rank"
    ):
        merge_lora(models, path)


def test_overflow_is_rejected(models, write):
    half = cast(models, np.float16)
    content = {
        f"{CONV}.lora_up.weight": np.full((24, 2, 1, 1), 1e4),
        f"{CONV}.lora_down.weight": np.ones((2, 24, 3, 3)),
    }
    with pytest.raises(CheckpointError, match=r"mid_block\.resnets\.0\.conv1\.weight overflows float16 when merged"):
        merge_lora(half, {write(content): 10})


def test_wrong_arguments_are_rejected(models, layers, write, tmp_path):
    path = write(tensors(layers, kohya))
    for error, message, arguments in [
        (TypeError, "models=int should be the networks of a pipeline", (3, path)),
        (TypeError, "lora=3 should be the path of a LoRA, or", (models, 3)),
        (TypeError, r"lora=\[.* should be the path", (models, [path])),
        (ValueError, "the scale '1' of .* should be a finite number", (models, {path: "1"})),
        (ValueError, "the scale nan of", (models, {path: float("nan")})),
        (CheckpointError, r"none\.safetensors is missing", (models, tmp_path / "none.safetensors")),
        (CheckpointError, r"lora\.bin is missing", (models, tmp_path / "lora.bin")),
    ]:
        with pytest.raises(error, match=message):
            merge_lora(*arguments)


def test_deepfloyds_unet_has_only_diffusers_names(first):
    names = adapters_of(first.models).lora["unet"].layers(first.models.unet)
    assert names["mid_block.attentions.0.to_q"] == "mid_block.attentions.0.to_q.weight"


@pytest.mark.parametrize(
    "config",
    [
        {"time_cond_proj_dim": 18},
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {
            "transformer_layers_per_block": [[1], [0], 1],
            "reverse_transformer_layers_per_block": [1, [1, 2], [2, 1]],
        },
    ],
)
def test_original_names_exist_for_every_layer_of_unet_variants(config):
    unet = tiny.networks(unet=tiny.UNET | config).unet
    names = unet_names(unet)
    assert len(set(names.values())) == len(names) == len(leaves(unet))
