"""Replacing a checkpoint's networks with separately published ones from folders, single files and repositories."""

import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from support import pickling, tiny
from support.hub import NAME, Stub, fetched

from sega_jax import CheckpointError, SemanticStableDiffusionPipeline, load
from sega_jax.cli.main import main
from sega_jax.pipelines import loading
from sega_jax.systems import original_files

pytestmark = pytest.mark.usefixtures("one_by_default")

VAE = "vae/diffusion_pytorch_model.safetensors"
PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Writes a checkpoint with different weights and returns its folder."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("other") / "tiny", unet=tiny.UNET_1)
    for path in folder.rglob("*.safetensors"):
        save_file({name: (array * 0.9).astype(array.dtype) for name, array in load_file(path).items()}, path)
    return folder


@pytest.fixture(scope="module")
def expected(other, one_device):
    return load(other, devices=one_device).models


def equal(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def originals(folder):
    """Returns {network: tensors} for a folder, with a single file's tensor names but without prefixes."""
    tensors_by_network = {}
    for part, start in zip(PARTS, (original_files.CLIP, original_files.UNET, original_files.VAE), strict=True):
        module = tiny.networks(unet=tiny.UNET_1)._asdict()[part]
        names = tiny.original_names(module, start)
        (path,) = (folder / part).glob("*.safetensors")
        tensors = {names[module.rename(key)]: array for key, array in load_file(path).items()}
        convolutions = {key: a[:, :, None, None] for key, a in tensors.items() if ".attn_1." in key and a.ndim == 2}
        tensors_by_network[part] = {key.removeprefix(start): array for key, array in (tensors | convolutions).items()}
    return tensors_by_network


@pytest.mark.parametrize("part", PARTS)
def test_folders(small_folder, small, other, expected, part, tmp_path):
    for source in (other / part, str(other / part), other):
        models = load(small_folder, devices=small.devices, **{part: source}).models._asdict()
        assert equal(models[part], expected._asdict()[part])
        assert all(equal(models[rest], small.models._asdict()[rest]) for rest in PARTS if rest != part)
    (weights,) = (shutil.copytree(other / part, tmp_path / "bin")).glob("*.safetensors")
    stem = "pytorch_model" if part == "text_encoder" else weights.stem
    pickling.save(load_file(weights), weights.with_name(f"{stem}.bin"))
    weights.unlink()
    pickled = load(small_folder, devices=small.devices, **{part: tmp_path / "bin"})
    assert equal(pickled.models._asdict()[part], models[part])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("form", ["diffusers", "diffusers with a prefix", "original", "original with a prefix", "ckpt"])
def test_weight_files(small_folder, small, other, expected, part, form, tmp_path):
    path = tmp_path / "a.safetensors"
    if form.startswith("diffusers"):
        (weights,) = (other / part).glob("*.safetensors")
        prefix = "" if form == "diffusers" else "network."
        save_file({f"{prefix}{key}": array for key, array in load_file(weights).items()}, path)
    elif form == "ckpt":
        loss = {"loss.logvar": np.ones(3, np.float32)} if part == "vae" else {}
        path = pickling.save({"state_dict": originals(other)[part] | loss, "epoch": 3}, tmp_path / "a.ckpt")
    else:
        prefix = "" if form == "original" else "model.diffusion_model."
        save_file({f"{prefix}{key}": array for key, array in originals(other)[part].items()}, path)
    models = load(small_folder, devices=small.devices, **{part: path}).models._asdict()
    assert equal(models[part], expected._asdict()[part])


def test_one_network_of_a_single_file(small_folder, small, other, expected, tmp_path):
    """The file contains all networks of a checkpoint."""
    starts = dict(zip(PARTS, (original_files.CLIP, original_files.UNET, original_files.VAE), strict=True))
    tensors = {f"{starts[part]}{key}": a for part, of in originals(other).items() for key, a in of.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert equal(load(small_folder, devices=small.devices, vae=tmp_path / "a.safetensors").models.vae, expected.vae)


def test_a_folder_without_the_network(small_folder, small, other, expected, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "copy")
    shutil.rmtree(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    without = {name: value for name, value in index.items() if name != "vae"}
    for entries in (index, without, index | {"vae": [None, None]}):
        tiny.write_json(folder / "model_index.json", entries)
        assert equal(load(folder, devices=small.devices, vae=other / "vae").models.vae, expected.vae)
    save_file(load_file(other / VAE), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors' is a file without a config, and .* has no vae config"):
        load(folder, devices=small.devices, vae=tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="vae is missing; expected"):
        load(folder, devices=small.devices)


def test_a_single_file_without_the_network(small_folder, small, other, expected, tmp_path):
    tensors = tiny.original(unet=tiny.UNET_1)
    save_file({k: v for k, v in tensors.items() if not k.startswith(original_files.VAE)}, tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors", config=small_folder, devices=small.devices, vae=other / VAE)
    assert equal(found.models.vae, expected.vae)
    assert equal(found.models.unet, small.models.unet)
    with pytest.raises(CheckpointError, match=r"has no vae \(.* give a file, folder or repository .* as vae"):
        load(tmp_path / "a.safetensors", config=small_folder, devices=small.devices)


def test_a_network_with_another_config(small_folder, small, other, tmp_path):
    """The latents' scaling factor and the number of layers differ from those in the checkpoint."""
    folder = shutil.copytree(other / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    tiny.write_json(folder / "config.json", config | {"scaling_factor": 0.5})
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        assert load(small_folder, devices=small.devices, vae=source).models.vae.config.scaling_factor == 0.5
    deeper = tiny.checkpoint(tmp_path / "deeper", unet=tiny.UNET)
    found = load(small_folder, devices=small.devices, unet=deeper / "unet").models.unet
    assert len(found.down_blocks) == len(tiny.UNET["block_out_channels"])


def test_the_text_encoder_of_a_complete_clip(small_folder, small, other, expected, tmp_path):
    """CLIP's config contains the text encoder's config, and its weights include the vision tower."""
    text = json.loads((other / "text_encoder/config.json").read_text())
    whole = {"architectures": ["CLIPModel"], "text_config": text, "vision_config": {"hidden_size": 4}}
    (tmp_path / "clip").mkdir()
    tiny.write_json(tmp_path / "clip/config.json", whole | {"projection_dim": 8, "hidden_size": 3})
    tensors = load_file(other / "text_encoder/model.safetensors")
    tensors = {f"text_model.{key.removeprefix('text_model.')}": array for key, array in tensors.items()}
    spare = {"vision_model.x": (2,), "text_projection.weight": (8, 16), "logit_scale": (), "visual_projection.x": (2,)}
    tensors |= {key: np.ones(shape, np.float32) for key, shape in spare.items()}
    save_file(tensors, tmp_path / "clip/model.safetensors")
    found = load(small_folder, devices=small.devices, text_encoder=tmp_path / "clip").models.text_encoder
    assert equal(found, expected.text_encoder)
    tiny.write_json(tmp_path / "clip/config.json", {"architectures": ["T5EncoderModel"]})
    with pytest.raises(CheckpointError, match="is T5EncoderModel, expected CLIPTextModel or CLIPModel"):
        load(small_folder, devices=small.devices, text_encoder=tmp_path / "clip")


def test_repositories(small_folder, small, other, expected, tmp_path, monkeypatch):
    """Covers repositories that contain a network or a checkpoint, and folders and files in them."""
    client = Stub(other / "vae", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    (other / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    weights = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert equal(load(small_folder, devices=small.devices, vae=NAME).models.vae, expected.vae)
    assert fetched(client) == weights
    client.folder = other
    for source in (NAME, f"{NAME}/vae", f"https://huggingface.co/{NAME}/tree/main/vae", f"{NAME}/{VAE}"):
        shutil.rmtree(client.cache)
        assert equal(load(small_folder, devices=small.devices, vae=source).models.vae, expected.vae)
        assert fetched(client) == {f"vae/{name}" for name in weights}
    face = SemanticStableDiffusionPipeline.from_pretrained(small_folder, vae=NAME, devices=small.devices)
    assert equal(face.vae, expected.vae)


def test_the_variant_applies_to_the_checkpoint_only(small_folder, small, other, expected, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "copy")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    found = load(folder, variant="fp16", vae=other / "vae", devices=small.devices)
    assert equal(found.models.vae, expected.vae)


REFUSED = {
    "no such file": ("nowhere.safetensors", FileNotFoundError, "vae='.*' is neither a file nor a folder"),
    "a folder of something else": ("empty", CheckpointError, "has no config.json, and no vae folder"),
    "no weights": ("bare", CheckpointError, r"has no weights \(diffusion_pytorch_model\.safetensors"),
    "another class": ("tiny-vae", CheckpointError, "is AutoencoderTiny, expected AutoencoderKL"),
    "another network": ("unet", CheckpointError, "is UNet2DConditionModel, expected AutoencoderKL"),
    "a file of another network": ("unet.safetensors", CheckpointError, r"has no vae under diffusers' or the original"),
    "a broken file": ("broken.safetensors", CheckpointError, "truncated or not a safetensors file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rejected_sources(small_folder, small, other, tmp_path, name):
    source, error, words = REFUSED[name]
    (tmp_path / "empty").mkdir()
    for folder, kind in (("bare", "AutoencoderKL"), ("tiny-vae", "AutoencoderTiny")):
        (tmp_path / folder).mkdir()
        tiny.write_json(tmp_path / folder / "config.json", {"_class_name": kind})
    shutil.copytree(other / "unet", tmp_path / "unet")
    shutil.copy(other / "unet/diffusion_pytorch_model.safetensors", tmp_path / "unet.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08")
    with pytest.raises(error, match=words):
        load(small_folder, devices=small.devices, vae=tmp_path / source)


def test_invalid_values(small_folder, small):
    for value in (3, True, b"vae"):
        with pytest.raises(TypeError, match=r"vae=.* should be"):
            load(small_folder, devices=small.devices, vae=value)
    with pytest.raises(ValueError, match="vae='' should be"):
        load(small_folder, devices=small.devices, vae="")


@pytest.mark.slow
def test_the_shell(small_folder, small, other, expected, tmp_path, monkeypatch):
    """The command that reproduces a picture contains absolute paths."""
    monkeypatch.chdir(other)
    monkeypatch.setattr(loading, "fill_pipeline", lambda *_: small)
    words = ["edit", "--model", small_folder, "--vae", "vae", "--unet", other, "--prompt", "a", "--steps", "1"]
    result = CliRunner().invoke(main, [*map(str, words), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (picture,) = (tmp_path / "out").glob("*original.png")
    info = CliRunner().invoke(main, ["info", str(picture)]).output
    assert f"--vae {other / 'vae'}" in info
    assert f"--unet {other}" in info


def with_prefixes(other, prefixes):
    """Returns the tensors of an autoencoder under several prefixes, with different values for each prefix."""
    own = originals(other)["vae"]
    return {f"{prefix}{key}": array + np.float32(i) for i, prefix in enumerate(prefixes) for key, array in own.items()}


@pytest.mark.parametrize("others", [("ema.",), ("first_stage_model_ema.",), ("aux.", "vae_ema.")])
def test_several_networks_in_a_file(small_folder, small, other, expected, tmp_path, others):
    """The family's prefix is preferred, and moving averages are avoided."""
    save_file(with_prefixes(other, ("first_stage_model.", *others)), tmp_path / "a.safetensors")
    assert equal(load(small_folder, devices=small.devices, vae=tmp_path / "a.safetensors").models.vae, expected.vae)


def test_networks_with_ambiguous_prefixes(small_folder, small, other, expected, tmp_path):
    save_file(with_prefixes(other, ("model.", "model_ema.")), tmp_path / "a.safetensors")
    assert equal(load(small_folder, devices=small.devices, vae=tmp_path / "a.safetensors").models.vae, expected.vae)
    save_file(with_prefixes(other, ("one.", "two.")), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"networks that may be the vae, with the prefixes 'one\.' and 'two\.'"):
        load(small_folder, devices=small.devices, vae=tmp_path / "a.safetensors")


def test_shapes_distinguish_networks(small_folder, small, other, expected, tmp_path):
    """Only one of the file's two text encoders has the right shapes."""
    tensors = load_file(other / "text_encoder/model.safetensors")
    wide = {f"clip_g.{key}": np.concatenate([array, array]) for key, array in tensors.items()}
    save_file({f"clip_l.{key}": array for key, array in tensors.items()} | wide, tmp_path / "a.safetensors")
    found = load(small_folder, devices=small.devices, text_encoder=tmp_path / "a.safetensors")
    assert equal(found.models.text_encoder, expected.text_encoder)


PREDICTS_V = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}


def predicts(small_folder, devices, **options):
    options = load(options.pop("source", small_folder), devices=devices, **options).scheduler.options
    return options["prediction_type"], options["rescale_betas_zero_snr"]


@pytest.mark.parametrize("form", ["diffusers", "with a prefix", "original", "header"])
def test_a_unet_that_declares_its_prediction_type(small_folder, small, other, tmp_path, form):
    path, header = tmp_path / "a.safetensors", None
    tensors = originals(other)["unet"] if form == "original" else load_file(other / "unet" / path_name(other, "unet"))
    if form == "with a prefix":
        tensors = {f"unet.{key}": array for key, array in tensors.items()}
    if form == "header":
        header = {"modelspec.predict_key": "v-prediction"}
    save_file(tensors | ({} if header else PREDICTS_V), path, header)
    assert predicts(small_folder, small.devices, unet=path) == ("v_prediction", form != "header")


def path_name(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return path.name


def test_declarations_about_unused_unets_are_ignored(small_folder, small, other, tmp_path):
    """A file's declaration is ignored if only its autoencoder is used or its UNet is replaced."""
    whole = tiny.original(unet=tiny.UNET_1) | PREDICTS_V
    save_file(whole, tmp_path / "a.safetensors")
    assert predicts(small_folder, small.devices, vae=tmp_path / "a.safetensors") == ("epsilon", False)
    options = {"source": tmp_path / "a.safetensors", "config": small_folder}
    assert predicts(small_folder, small.devices, **options) == ("v_prediction", True)
    assert predicts(small_folder, small.devices, **options, unet=other / "unet") == ("epsilon", False)
    assert predicts(small_folder, small.devices, **options, unet=small.models.unet) == ("epsilon", False)
    with pytest.raises(
        ValueError, match=r"moving average of the unet in .*a\.safetensors, but this network is replaced"
    ):
        predicts(small_folder, small.devices, **options, unet=other / "unet", ema=True)


def test_a_variant_of_the_replacement_only(small_folder, small, other, expected, tmp_path):
    folder = shutil.copytree(other / "unet", tmp_path / "unet")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert equal(load(small_folder, devices=small.devices, unet=folder, variant="fp16").models.unet, expected.unet)
