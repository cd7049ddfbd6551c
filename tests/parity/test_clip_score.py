"""Compares the cosines between texts and pictures with those of transformers' `CLIPModel`."""

import numpy as np
import pytest

from sega_jax.nn.clip import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from sega_jax.weights.pull import fill
from sega_jax.weights.tensors import Tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TEXT = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 12, "bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 57}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"image_size": 16, "patch_size": 4}


def test_cosines(tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for weights in theirs.parameters():
            weights += 0.3 * torch.randn_like(weights)
    theirs.save_pretrained(tmp_path)
    text = CLIPTextConfig.from_dict(TEXT | {"projection_dim": 20})
    with Tensors(tmp_path, "model", None, CLIPModel.rename) as weights:
        ours = fill(CLIPModel(text, CLIPVisionConfig.from_dict(VISION)), weights, np.float32)
    rng = np.random.default_rng(0)
    ids = np.stack([[56, *rng.integers(0, 56, n), *[57] * (11 - n)] for n in (2, 5, 10)]).astype(np.int32)
    pixels = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        outputs = theirs(torch.from_numpy(ids).long(), torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        expected = (outputs.logits_per_image / theirs.logit_scale.exp()).diagonal().numpy()
    np.testing.assert_allclose(ours(ids, pixels), expected, atol=2e-6)
    assert np.ptp(expected) > 0.1
