"""Checks that diffusers converts our single files to the right names and shapes at full size, and to the right weights
for small networks."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import numpy as np
import torch
from diffusers.loaders import single_file_utils
from support import published, tiny
from support.single_files import KINDS, shapes

from parity import theirs
from sega_jax.systems import original_files

pytestmark = pytest.mark.parity

FULL = {"1": published.SD_1, "2": published.SD_2}


def converted(tensors, configs, reference):
    """Returns the tensors into which diffusers converts a single file, by part."""
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), {"layers_per_block": 2} | configs["unet"])
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), configs["vae"])
    if any(key.startswith(original_files.OPENCLIP) for key in tensors):
        encoder = single_file_utils.convert_open_clip_checkpoint(reference, dict(tensors))
    else:
        encoder = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    encoder = {key.removeprefix("text_model."): tensor for key, tensor in encoder.items()}
    return {"unet": unet, "vae": vae, "text_encoder": encoder}


@pytest.mark.parametrize("kind", FULL)
def test_names_at_full_size(kind):
    configs = FULL[kind]
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in shapes(configs, kind == "2").items()}
        reference = {part: theirs.published(configs, part) for part in ("unet", "vae", "text_encoder")}
    state_dicts = converted(tensors, configs, reference["text_encoder"])
    for part, network in reference.items():
        expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        expected = {key: shape for key, shape in expected.items() if "position_ids" not in key}
        assert {key: tuple(tensor.shape) for key, tensor in state_dicts[part].items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind):
    configs = {
        "unet": KINDS[kind]["unet"] | {"layers_per_block": 1},
        "vae": tiny.VAE,
        "text_encoder": KINDS[kind]["text"],
    }
    options = {"unet": configs["unet"], "text": configs["text_encoder"]}
    original = tiny.original(**options, openclip=kind == "2")
    # diffusers recognises OpenCLIP's unused last layer by its number, 23, so the small file leaves that layer out.
    unused = f"resblocks.{configs['text_encoder']['num_hidden_layers']}."
    tensors = {key: torch.tensor(array) for key, array in original.items() if unused not in key}
    tensors.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    state_dicts = converted(tensors, configs, theirs.published(configs, "text_encoder"))
    for part, network in tiny.networks(**options)._asdict().items():
        expected = tiny.tensors(network)
        assert state_dicts[part].keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(state_dicts[part][key].numpy(), array)
