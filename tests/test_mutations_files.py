"""Faults made on purpose in the reader of pickles, the names of single files, LoRAs and textual inversion: each breaks
a test."""

import numpy as np
import pytest
import test_files_xl
import test_inversion
import test_pickled
import tiny
from safetensors.numpy import save_file
from test_convert import same
from test_inversion import vectors as vectors
from test_mutations import damage
from test_pickled import tensors as tensors

from sega_jax import CheckpointError, load
from sega_jax.text.tokenizers import Tokenizer
from sega_jax.weights import lora, original_names, single_file, textual_inversion, torch_pickle

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    save_file(tiny.original(unet=tiny.UNET_XL, text_2=tiny.TEXT_XL_2), folder / "a.safetensors")
    return tiny.xl(folder / "xl")


@pytest.fixture
def parts(tmp_path, tensors, vectors, xl, small, small_folder):
    return tmp_path, tensors, vectors, xl, small, small_folder


def read(tmp_path, tensors, *_):
    for i, (legacy, wrapped) in enumerate(((False, True), (True, False))):
        folder = tmp_path / str(i)
        folder.mkdir()
        test_pickled.test_tensors_to_the_bit(folder, tensors, legacy, wrapped)
    test_pickled.test_many_names_of_the_same_entries(tmp_path)
    (tmp_path / "shards").mkdir()
    test_pickled.test_shards(tmp_path / "shards", tensors)


def refused(tmp_path, tensors, *_):
    for i, name in enumerate(test_pickled.CALLS):
        (tmp_path / str(i)).mkdir()
        test_pickled.test_nothing_is_run(tmp_path / str(i), tensors, False, name, "value")
    for name in test_pickled.ODD.keys() - {"a key of tuples"}:  # which would never end
        test_pickled.test_odd_tensors(tmp_path, tensors, name)
    test_pickled.test_what_is_compressed_is_not_unpacked(tmp_path)


def named(_tmp_path, _tensors, _vectors, xl, small, _):
    ours = load(xl.parent / "a.safetensors", config=xl, devices=small.devices)
    assert same(ours, load(xl, devices=small.devices))


def worded(tmp_path, _tensors, vectors, _xl, small, small_folder):
    for form in ("web_ui", "diffusers"):
        test_inversion.test_every_form(small, small_folder, tmp_path, vectors, form)
    test_inversion.test_a_word_of_one_token(small, tmp_path, vectors, (16,))
    test_inversion.test_several_words(small, tmp_path, vectors)
    for name in test_inversion.BROKEN:
        test_inversion.test_broken_files(small, tmp_path, name)


def paired(tmp_path, _tensors, _vectors, xl, small, _):
    pipe = load(xl, devices=small.devices)
    pair = pipe.tokenizer.first.pair()
    np.testing.assert_array_equal(pair(["a b", "c"]), pipe.tokenizer(["a b", "c"]))
    test_files_xl.test_textual_inversion(tmp_path, pipe, xl)


def lora_of_two(tmp_path, _tensors, _vectors, xl, small, _):
    names = lora._names(load(xl, devices=small.devices).models.text_encoder_2)
    for start in ("", "text_model_"):
        key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
        assert names.get(f"{start}encoder_layers_0_self_attn_q_proj") == key


# The test that must show it, the function, a piece of its source and what takes its place.
FAULTS = {
    "a call that passes": (refused, torch_pickle._Machine.call, "raise self.refused(name)", "return Name(name)"),
    "an opcode that passes": (refused, torch_pickle._Machine.step, "raise self.refused(name)", "pass"),
    "views of more than there is": (refused, torch_pickle.Tensor.fits, "self.start + self.span <=", "0 <="),
    "entries more than once": (read, torch_pickle.PickledTensors._open, "if left < 0:", "if False:"),
    "no end of a pickle": (refused, torch_pickle._Machine.run, "self.left -= 1", "self.left -= 0"),
    "what is compressed": (refused, torch_pickle._members, "if method:", "if False:"),
    "storages that are not all there": (refused, torch_pickle._read_zip, "if not 0 <= count <=", "if not 0 <= 0 <="),
    "views from the start": (read, torch_pickle.Tensor.read, "self.start * dtype.itemsize", "0 * dtype.itemsize"),
    "strides of rows": (read, torch_pickle.Tensor.read, "self.shape, strides)", "self.shape)"),
    "storages in another order": (read, torch_pickle._read_legacy, "at + 8, at + 8 + size", "at, at + 8 + size"),
    "what training left": (read, torch_pickle.CkptTensors._within, 'return found["state_dict"] if', "return found if"),
    "the projection as it is": (named, single_file._pieces, 'name.endswith(".text_projection")', "False"),
    "linear layers of the sizes swapped": (
        named,
        original_names._unet_name,
        "layer, _, kind =",
        'place = {"add_embedding.linear_1": "add_embedding.linear_2"}.get(place, place); layer, _, kind =',
    ),
    "one text encoder for both": (
        named,
        original_names.original_names,
        "start in (OPENCLIP, OPENCLIP_XL)",
        "start in (OPENCLIP,)",
    ),
    "vectors backwards": (worded, textual_inversion._with_vectors, "rows[ids] = vectors", "rows[ids] = vectors[::-1]"),
    "no more rows": (worded, textual_inversion._with_vectors, "max(0, max(ids) + 1 - len(rows))", "0"),
    "the file's word for the given one": (worded, textual_inversion._word, "own if name is None else name", "own"),
    "other widths": (worded, textual_inversion._word, "if array.shape[-1] != width:", "if False:"),
    "vectors that are not finite": (worded, textual_inversion._word, "if not is_finite(array):", "if False:"),
    "words written once": (worded, Tokenizer._written_out, "self._spelt[match[0]]", "match[0]"),
    "words that are there": (paired, Tokenizer.having, "if len(made._tokenizer.tokenize(name)) != 1:", "if False:"),
    "one padding for both": (paired, Tokenizer.pair, "TokenizerPair(self, second)", "TokenizerPair(self, self)"),
    "no prefix of the second": (lora_of_two, lora._names, 'path.removeprefix("text_model."): key', "path: key"),
}


@pytest.mark.parametrize("check", [read, refused, named, worded, paired, lora_of_two])
def test_nothing_is_broken(check, parts):
    check(*parts)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, parts, monkeypatch):
    check, *fault = FAULTS[name]
    damage(monkeypatch, *fault)
    with pytest.raises((AssertionError, CheckpointError, ValueError, TypeError, IndexError, pytest.fail.Exception)):
        check(*parts)
