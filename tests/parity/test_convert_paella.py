"""Converts files in Paella's published formats, with small networks: checks converted folders and refused files."""

import pytest

pytest.importorskip("torch")

import functools
import json
import os
import shutil

import jax
import numpy as np
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file
from support import tiny

import convert.__main__
from convert import convert_paella
from convert.__main__ import main
from convert.paella import NETWORKS
from sega_jax import CheckpointError, load
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModelWithProjection
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.pipelines.weight_files import open_weights
from sega_jax.systems import paella
from sega_jax.systems.registry import weight_stem
from sega_jax.text.files import read_json
from sega_jax.weights.pull import fill

pytestmark = pytest.mark.parity

CONFIGS = {"denoiser": tiny.PAELLA, "vqgan": tiny.VQGAN, "prior": tiny.PRIOR}
COUNTER = "down_blocks.5.1.num_batches_tracked"
MODULES = {part: kind(config.from_dict(CONFIGS[part])) for part, (_, kind, config) in NETWORKS.items()}
TEXTS = {
    "byt5": T5EncoderModel(T5Config.from_dict(tiny.T5)),
    "clip": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(tiny.TEXT_PROJECTED)),
}


def tensors(part, dtype=torch.float32):
    """Returns a network's state dict."""
    state = {name: torch.tensor(array).to(dtype) for name, array in tiny.tensors((MODULES | TEXTS)[part]).items()}
    return state | ({COUNTER: torch.tensor(7)} if part == "vqgan" else {})


@pytest.fixture
def source(tmp_path):
    """Writes the three published files and returns their folder."""
    (tmp_path / "source").mkdir()
    for part, (stem, _, _) in NETWORKS.items():
        torch.save(tensors(part), tmp_path / "source" / f"{stem}.pt")
    return tmp_path / "source"


@pytest.fixture
def byt5(tmp_path):
    """Writes a complete ByT5, including the decoder that Paella does not use."""
    (tmp_path / "byt5").mkdir()
    tiny.write_json(tmp_path / "byt5/config.json", tiny.T5 | {"architectures": ["T5ForConditionalGeneration"]})
    encoder = tensors("byt5")
    more = {"encoder.embed_tokens.weight": encoder["shared.weight"], "lm_head.weight": torch.zeros(60, 24)}
    more["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(15, 24)
    torch.save(encoder | more, tmp_path / "byt5/pytorch_model.bin")
    return tmp_path / "byt5"


@pytest.fixture
def openclip(tmp_path):
    """Writes a complete CLIP, including the vision tower that Paella does not use."""
    (tmp_path / "openclip").mkdir()
    config = {"architectures": ["CLIPModel"], "projection_dim": 12}
    text = tiny.TEXT_PROJECTED | {"projection_dim": 99}
    tiny.write_json(tmp_path / "openclip/config.json", config | {"text_config": text, "vision_config": {}})
    more = {"logit_scale": np.ones((), np.float32), "visual_projection.weight": np.ones((12, 8), np.float32)}
    more["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    more["text_model.embeddings.position_ids"] = np.arange(12)[None]
    save_file(tiny.tensors(TEXTS["clip"]) | more, tmp_path / "openclip/model.safetensors", {"format": "pt"})
    tiny.tokenizer(tmp_path / "openclip", 12)
    return tmp_path / "openclip"


def run(source, dest, **options):
    return convert_paella(source, dest, configs=CONFIGS, **options)


def same(folder, parts=tuple(MODULES), dtype=np.float32):
    """Checks that the networks of a converted folder have exactly the tensors of `tiny`."""
    for part in parts:
        module = (MODULES | TEXTS)[part]
        with open_weights(folder / part, weight_stem(paella.SYSTEM, part), None, module.rename) as weights:
            arrays = fill(module, weights, None, lambda array: array)
        for ours, expected in zip(leaves(arrays), leaves(tiny.filled(module)), strict=True):
            assert ours.dtype == dtype
            assert ours.tobytes() == np.asarray(expected).astype(dtype).tobytes()
    return True


def leaves(module):
    return jax.tree.leaves(module)


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
def test_the_three_files(source, tmp_path, to):
    folder = run(source, tmp_path / "dest", to=to)
    assert same(folder)
    with open_weights(folder / "vqgan", "diffusion_pytorch_model", None, str) as weights:
        assert {key: int(array) for key, array in weights.buffers().items()} == {COUNTER: 7}
    for part, (_, _, kind) in NETWORKS.items():
        assert kind.from_dict(read_json(folder / part / "config.json")) == kind.from_dict(CONFIGS[part])
    assert read_json(folder / "model_index.json") == {
        "_class_name": "PaellaPipeline",
        "byt5": [None, None],
        "clip": [None, None],
        "tokenizer": [None, None],
        "denoiser": ["sega_jax", "Paella"],
        "vqgan": ["sega_jax", "VQModel"],
        "prior": [None, None],
    }


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
def test_with_the_text_encoders(source, byt5, openclip, tmp_path, to):
    folder = run(source, tmp_path / "dest", byt5=byt5, openclip=openclip, to=to)
    assert same(folder, (*MODULES, *TEXTS))
    assert T5Config.from_dict(read_json(folder / "byt5/config.json")) == TEXTS["byt5"].config
    assert CLIPTextConfig.from_dict(read_json(folder / "clip/config.json")) == TEXTS["clip"].config
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (folder / "tokenizer").iterdir()} == names
    index = read_json(folder / "model_index.json")
    assert index["byt5"] == ["transformers", "T5EncoderModel"]
    assert index["clip"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["prior"] == ["sega_jax", "PriorModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]


def test_a_converted_folder_loads(tmp_path, one_device):
    """The converted folder gives the same tokens as a folder that was written directly."""
    models = paella.Models.build(**tiny.PAELLA_PARTS)
    tensors = {
        part: {name: torch.tensor(array) for name, array in tiny.tensors(module).items()}
        for part, module in models._asdict().items()
    }
    for part, (stem, _, _) in NETWORKS.items():
        torch.save(tensors[part], tmp_path / f"{stem}.pt")
    for part in ("byt5", "clip"):
        (tmp_path / part).mkdir()
        tiny.write_json(tmp_path / part / "config.json", tiny.PAELLA_PARTS[part])
        torch.save(tensors[part], tmp_path / part / "pytorch_model.bin")
    tiny.tokenizer(tmp_path / "clip", 12)
    configs = {part: tiny.PAELLA_PARTS[part] for part in NETWORKS}
    texts = {"byt5": tmp_path / "byt5", "openclip": tmp_path / "clip"}
    folder = convert_paella(tmp_path, tmp_path.with_name("made"), configs=configs, **texts)
    converted, direct = (load(f, devices=one_device) for f in (folder, tiny.paella(tmp_path / "tiny")))
    images = [pipe("a cat", steps=2, output="tokens").images for pipe in (converted, direct)]
    np.testing.assert_array_equal(*images)


def test_converted_text_encoders_can_be_converted_again(source, byt5, openclip, tmp_path):
    """A conversion also accepts text encoders that another conversion wrote."""
    folder = run(source, tmp_path / "dest", byt5=byt5, openclip=openclip)
    shutil.copytree(folder / "tokenizer", folder / "clip", dirs_exist_ok=True)
    again = run(source, tmp_path / "again", byt5=folder / "byt5", openclip=folder / "clip")
    assert same(again, (*MODULES, *TEXTS))


def test_the_other_name_of_the_embedding(source, byt5, tmp_path):
    encoder = tensors("byt5")
    encoder["encoder.embed_tokens.weight"] = encoder.pop("shared.weight")
    torch.save(encoder, byt5 / "pytorch_model.bin")
    assert same(run(source, tmp_path / "dest", byt5=byt5), ("byt5",))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_training_checkpoints(source, tmp_path, legacy):
    """Reads checkpoints of both training scripts: the weights, or their moving average if the file has one."""
    other = {key: tensor + 1 for key, tensor in tensors("prior").items()}
    files = {
        "paella_v3": {"iter": 3, "state_dict": tensors("denoiser"), "wandb_run_id": "x"},
        "prior_v1": {"state_dict": other, "ema_state_dict": tensors("prior"), "metrics": {"ema_loss": 0.1}},
    }
    for stem, content in files.items():
        torch.save(content, source / f"{stem}.pt", _use_new_zipfile_serialization=not legacy)
    assert same(run(source, tmp_path / "dest"))


def test_casts(source, tmp_path):
    torch.save(tensors("denoiser", torch.float16), source / "paella_v3.pt")
    assert same(run(source, tmp_path / "as they are"), ("denoiser",), np.float16)
    assert same(run(source, tmp_path / "half", dtype="float16"), dtype=np.float16)


# Mistakes


@pytest.fixture
def refused(source, tmp_path):
    """Returns a function that checks that a conversion fails, reports the given words, and leaves no files."""

    def check(*words, error=CheckpointError, dest=tmp_path / "out/dest", **options):
        with pytest.raises(error) as caught:
            run(source, dest, **options)
        missing = [word for word in words if str(word) not in str(caught.value)]
        assert not missing, str(caught.value)
        assert not list((tmp_path / "out").glob("*"))

    return check


@pytest.mark.parametrize("stem", [stem for stem, _, _ in NETWORKS.values()])
def test_missing_files_are_refused(source, refused, stem):
    (source / f"{stem}.pt").unlink()
    refused(f"has no {stem}.pt; fetch all three files")


def test_weights_that_do_not_fit_are_refused(source, refused):
    """The error names every weight that does not fit."""
    wrong = tensors("denoiser")
    del wrong["clf.1.weight"]
    wrong["extra.weight"] = torch.zeros(3)
    wrong["byt5_mapper.bias"] = torch.zeros(3)
    torch.save(wrong, source / "paella_v3.pt")
    refused(
        "missing    clf.1.weight (24, 8, 1, 1)",
        "unexpected extra.weight (3,)",
        "misshapen  byt5_mapper.bias: (3,), expected (14,)",
    )


def test_other_networks_as_text_encoder_are_refused(refused, openclip):
    os.unlink(openclip / "model.safetensors")
    save_file({"transformer.resblocks.0.ln_1.bias": np.zeros(3, np.float32)}, openclip / "model.safetensors")
    refused("unexpected transformer.resblocks.0.ln_1.bias (3,)", "missing    text_projection", openclip=openclip)


def test_weights_that_are_not_finite_are_refused(source, refused):
    wrong = tensors("vqgan")
    wrong["in_block.1.bias"][0] = np.nan
    torch.save(wrong, source / "vqgan_f4.pt")
    refused("in_block.1.bias has NaN or infinite entries")


def test_truncated_files_are_refused(source, refused):
    content = (source / "prior_v1.pt").read_bytes()
    (source / "prior_v1.pt").write_bytes(content[: len(content) // 2])
    refused("prior_v1.pt is truncated")


class Hostile:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("place", ["value", "other entry"])
def test_hostile_files_are_refused(source, refused, tmp_path, place):
    hostile = Hostile(tmp_path / "canary")
    content = {"value": {"x": hostile}, "other entry": {"state_dict": tensors("prior"), "optimizer": hostile}}[place]
    torch.save(content, source / "prior_v1.pt")
    refused("prior_v1.pt was rejected, and none of its code was run")
    assert not (tmp_path / "canary").exists()


def test_invalid_configs_of_the_text_encoders_are_refused(refused, byt5, openclip):
    tiny.write_json(byt5 / "config.json", tiny.T5 | {"feed_forward_proj": "relu"})
    refused("byt5/config.json: text encoder config: feed_forward_proj='relu'", byt5=byt5)
    tiny.write_json(openclip / "config.json", {"text_config": 3})
    refused("text_config=3 should be a JSON object of options", openclip=openclip)
    (openclip / "config.json").unlink()
    refused("config.json is missing", openclip=openclip)


def test_incomplete_tokenizers_are_refused(refused, openclip):
    (openclip / "merges.txt").unlink()
    refused("merges.txt missing", openclip=openclip)


def test_invalid_arguments_are_refused(source, refused, tmp_path):
    refused("is not a folder", byt5=tmp_path / "nowhere", error=FileNotFoundError)
    refused("should be the path of a folder", openclip=3, error=TypeError)
    refused("dest=None should be the path", dest=None, error=TypeError)
    refused("to='torch' should be one of orbax, diffusers", to="torch", error=ValueError)
    refused("dtype='int8'", dtype="int8", error=ValueError)
    refused("is inside the source", dest=source / "dest", error=ValueError)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    refused("is not an empty folder", dest=tmp_path / "full", error=FileExistsError)
    with pytest.raises(ValueError, match="configs has unknown networks unet, expected denoiser, vqgan, prior"):
        convert_paella(source, tmp_path / "out/dest", configs={"unet": {}})


# The shell


def shell(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_shell(source, byt5, openclip, tmp_path, monkeypatch):
    """The command expects networks of the published sizes, so the small networks need other configs."""
    result = shell(source, tmp_path / "dest", "--byt5", byt5, "--openclip", openclip)
    assert result.exit_code == 1
    assert "misshapen  byt5_mapper.weight: (14, 18), expected (1024, 2560)" in result.output
    assert not (tmp_path / "dest").exists()
    monkeypatch.setattr(convert.__main__, "convert_paella", functools.partial(convert_paella, configs=CONFIGS))
    result = shell(source, tmp_path / "dest", "--byt5", byt5, "--openclip", openclip)
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path / 'dest'}" in result.output
    assert json.loads((tmp_path / "dest/model_index.json").read_text())["_class_name"] == "PaellaPipeline"
    assert same(tmp_path / "dest", (*MODULES, *TEXTS))


def test_mistakes_in_the_shell(source, byt5, tmp_path):
    result = shell(source, tmp_path / "dest", "--variant", "fp16")
    assert "--variant fp16 cannot be used, because Paella's published files" in result.output
    result = shell(byt5, tmp_path / "dest", "--byt5", byt5)
    assert "--byt5 applies only to Paella's published files, but" in result.output
    assert "Traceback" not in result.output
