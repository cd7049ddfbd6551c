"""Faults in weights: reading, checking, transposing and writing tensors, and single-file formats."""

import jax
import numpy as np
import pytest
from reference import cases
from safetensors.numpy import save_file
from support import tiny

from faults.damage import argument, instead, override, replaced
from faults.views import Fault, View, Views, outcome, recorded
from sega_jax.method import numerics
from sega_jax.nn.clip import CLIPTextModel
from sega_jax.systems import original_files, sdxl
from sega_jax.weights import fused, layout, pull, single_file, torch_pickle
from sega_jax.weights.tensors import Tensors

pytestmark = pytest.mark.fault


def pulled(folder, dtype=np.float32):
    """Fills a text encoder with the tensors of a folder."""
    module = tiny.networks().text_encoder
    with Tensors(folder, "model", None, CLIPTextModel.rename) as tensors:
        return pull.fill(module, tensors, dtype)


def wrong_tensors():
    """Returns the tensors of several text encoders, with one wrong tensor in each, and the dtype in which to load
    them."""
    sound, name = tiny.tensors(tiny.networks().text_encoder), "encoder.layers.0.mlp.fc1.weight"
    changed = {
        "missing": {},
        "misshapen": {name: sound[name][:, :3]},
        "not finite": {name: np.full_like(sound[name], np.nan)},
        "too large": {name: np.full_like(sound[name], 1e6)},
    }
    rest = {key: array for key, array in sound.items() if key != name}
    return {
        kind: (rest | tensors, np.float16 if kind == "too large" else np.float32) for kind, tensors in changed.items()
    }


def written():
    """Converts a small UNet back to tensors with torch's names and axis order."""
    net = tiny.networks(unet=tiny.UNET_1).unet
    paths = jax.tree_util.tree_leaves_with_path(tiny.filled(net))
    return {layout.torch_name(path): layout.to_torch(layout.flax_name(path), np.asarray(leaf)) for path, leaf in paths}


def read(path, file, module, part):
    """Fills a network from a single file."""
    weights = single_file.OriginalWeights(path, torch_pickle.opened(path), file.networks[part], part, module)
    with weights:
        return pull.fill(module, weights, np.float32)


def networks_of(kind):
    """Builds networks without values. Returns the networks, and the options with which `tiny.original` writes their
    single file."""
    if kind == "2":
        models = tiny.networks(unet=tiny.UNET_2, text=tiny.TEXT_2)
        return models, {"unet": tiny.UNET_2, "text": tiny.TEXT_2, "openclip": True, "ema": True}
    models = sdxl.Models.build(tiny.TEXT, tiny.TEXT_XL_2, tiny.UNET_XL, tiny.VAE)
    return models, {"unet": tiny.UNET_XL, "text_2": tiny.TEXT_XL_2}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folders = {"sound": tmp_path_factory.mktemp("sound")}
    save_file(tiny.tensors(tiny.networks().text_encoder), folders["sound"] / "model.safetensors")
    dtypes = {}
    for kind, (tensors, dtype) in wrong_tensors().items():
        folders[kind], dtypes[kind] = tmp_path_factory.mktemp("wrong"), dtype
        save_file(tensors, folders[kind] / "model.safetensors")
    files = {kind: tmp_path_factory.mktemp("single") / f"{kind}.safetensors" for kind in ("2", "xl")}
    for kind, path in files.items():
        save_file(tiny.original(**networks_of(kind)[1]), path)

    def refused():
        """Returns the names of the exceptions that are raised for invalid tensors."""
        outcomes = [outcome(pulled, folders[kind], dtype) for kind, dtype in dtypes.items()]
        return [one if isinstance(one, str) else "no error" for one in outcomes]

    def single(kind):
        parts = networks_of(kind)[0]._asdict()
        file = original_files.SDXL_FILE if kind == "xl" else original_files.STABLE_DIFFUSION_FILE
        return [outcome(read, files[kind], file, module, part) for part, module in parts.items()]

    def sound(kind):
        return list(map(tiny.filled, networks_of(kind)[0]))

    return Views(
        {
            "pulled": View(
                lambda: pulled(folders["sound"])(cases.INPUTS["ids"]),
                lambda: recorded("networks_sd1_ddim")["text"],
                1e-5,
            ),
            "refused": View(refused, lambda: ["CheckpointError"] * 4),
            "written": View(written, lambda: tiny.tensors(tiny.networks(unet=tiny.UNET_1).unet)),
            "single file": View(lambda: single("2"), lambda: sound("2")),
            "single file of XL": View(lambda: single("xl"), lambda: sound("xl")),
        }
    )


def of_unequal_sides(from_torch):
    """Transposes only matrices that are not square."""
    return lambda path, array: array if len(set(array.shape)) == 1 else from_torch(path, array)


def exchanged(forms):
    """Swaps the queries and keys in fused matrices."""
    return replaced(
        forms,
        fused=lambda fused: {pattern: (second, first, *rest) for pattern, (first, second, *rest) in fused.items()},
    )


FAULTS = {
    "square matrices are not transposed": Fault(
        "pulled", Tensors, "layout", lambda layout: layout._replace(ours=of_unequal_sides(layout.ours))
    ),
    "the names and shapes of tensors are not checked": Fault(
        "refused", pull, "check", instead(lambda module, weights, warn: None)
    ),
    "tensors with NaN or infinite entries are accepted": Fault(
        "refused", numerics, "is_finite", instead(lambda array: True)
    ),
    "kernels are written without transposing them": Fault(
        "written", layout, "to_torch", instead(lambda name, array: array)
    ),
    "fused queries and keys are exchanged": Fault("single file", fused, "parameters", argument(2, exchanged)),
    "the moving average is loaded instead of the last weights": Fault(
        "single file", single_file.OriginalWeights, "__init__", override(ema=True)
    ),
    "the text projection of a single file is not transposed": Fault(
        "single file of XL", fused, "_transposed", instead(lambda read: read())
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
