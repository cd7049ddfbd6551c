"""Stable Diffusion XL: tensor names at full size, loading, errors, and edits on several devices."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from reference import cases
from safetensors.numpy import load_file, save_file
from support import names, published, tiny
from support.checkpoints import edit_json, files, same
from support.recorded import REFERENCE

import convert
import sega_jax
from sega_jax import CheckpointError, ClipText, Edit, SDXLText
from sega_jax.systems import sdxl, sdxl_text
from sega_jax.text.tokenizers import T5Tokenizer
from sega_jax.weights.layout import leaves

CALL = {"prompt": "a cat", "edits": [Edit("hat", warmup=1)], "steps": 3, "output": "float"}
COUNTS = {
    "text_encoder": (196, 123_060_480),
    "text_encoder_2": (517, 694_659_840),
    "unet": (1680, 2_567_463_684),
    "vae": (248, 83_653_863),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.xl(tmp_path_factory.mktemp("xl") / "xl", **cases.XL)


@pytest.fixture(scope="module")
def pipe(folder, one_device):
    return sega_jax.load(folder, devices=one_device)


@pytest.fixture
def copy(folder, tmp_path):
    """Returns a copy of the checkpoint for tests to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


# Names


@pytest.mark.parametrize("part", COUNTS)
def test_names_at_full_size(part):
    """The names and shapes of the published layout correspond one to one to those of this library."""
    module = getattr(sdxl.Models.build(**published.XL), part)
    expected, actual = names.read(REFERENCE / f"xl_{part}.txt"), leaves(module)
    assert {module.rename(name): shape for name, shape in expected.items()} == actual
    assert (len(expected), sum(map(math.prod, expected.values()))) == (len(actual), COUNTS[part][1]) == COUNTS[part]


def test_published_configs_give_the_published_sizes():
    models = sdxl.Models.build(**published.XL)
    assert sdxl.SYSTEM.sampler.sizes(models).default == (1024, 1024)
    negative = sdxl_text.negative(models, None, sdxl.Extras(zero_negative=True))
    assert (negative.states.shape, negative.pooled.shape) == ((1, 77, 2048), (1, 1280))
    assert models.unet.config.pooled_dim == 1280
    assert models.vae.config.force_upcast
    assert models.vae.config.scaling_factor == 0.13025


def test_lists_of_names_survive_writing_and_reading(tmp_path):
    shapes = {f"a.{i}.b.{j}.c": (i,) for i in range(3) for j in range(12)} | {"a.4.b.0.c": (), "a.b": (2, 3)}
    (tmp_path / "names.txt").write_text(names.as_text(shapes))
    assert names.read(tmp_path / "names.txt") == shapes


# Loading


@pytest.mark.slow
def test_both_formats_make_the_same_picture(folder, pipe, tmp_path):
    orbax = convert.convert(folder, tmp_path / "orbax")
    back = convert.convert(orbax, tmp_path / "back", to="diffusers")
    assert files(back) == files(folder)
    expected = pipe(**CALL).images
    for source in (orbax, back):
        loaded = sega_jax.load(source, devices=pipe.devices)
        assert same(loaded, pipe)
        np.testing.assert_array_equal(loaded(**CALL).images, expected)


def test_names_of_the_text_encoders(copy, pipe):
    """Names with and without the prefix are read, and the position ids in old files are ignored."""
    first, second = (copy / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2"))
    arrays = {key.removeprefix("text_model."): array for key, array in load_file(first).items()}
    assert arrays.keys() != load_file(first).keys()
    save_file(arrays, first)
    position_ids = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    save_file(load_file(second) | position_ids, second)
    assert same(sega_jax.load(copy, devices=pipe.devices), pipe)


def refiner(copy):
    edit_json(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])


def other_projection(copy):
    edit_json(copy / "unet/config.json", projection_class_embeddings_input_dim=58)


def inpainting(copy):
    edit_json(copy / "unet/config.json", in_channels=9)


def no_sizes(copy):
    edit_json(copy / "unet/config.json", addition_embed_type=None)


def no_wave(copy):
    edit_json(copy / "unet/config.json", addition_time_embed_dim=10)


def other_lengths(copy):
    edit_json(copy / "tokenizer_2/tokenizer_config.json", model_max_length=10)


def other_positions(copy):
    edit_json(copy / "text_encoder/config.json", max_position_embeddings=11)


def other_width(copy):
    edit_json(copy / "text_encoder/config.json", hidden_size=24)


def no_second_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer_2")


def no_second_encoder(copy):
    shutil.rmtree(copy / "text_encoder_2")


def no_projection(copy):
    index = json.loads((copy / "model_index.json").read_text())
    edit_json(copy / "model_index.json", text_encoder_2=index["text_encoder"])


REFUSED = {
    refiner: "is the Stable Diffusion XL refiner, which is not supported",
    other_projection: "pooled text of 10 channels .* projection_dim is 12: .* not the refiner's",
    inpainting: "has 9 input and 4 output channels, and the VAE has 4 .* expected 4 input and 4 output",
    no_sizes: "addition_embed_type None .* but Stable Diffusion XL's UNet has addition_embed_type text_time",
    no_wave: "projection_class_embeddings_input_dim=60 should be the number of pooled text channels plus six",
    other_lengths: "the tokenizers have lengths 12 and 10; check that they belong together",
    other_positions: "read 11 and 12 tokens; take both from one checkpoint",
    other_width: "cross_attention_dim 36 is not the sum of the text encoders' hidden sizes, 24 . 20",
    no_second_tokenizer: "tokenizer_2/merges.txt missing",
    no_second_encoder: "no folder text_encoder_2; give a complete checkpoint",
    no_projection: "whose text_encoder_2 is CLIPTextModel; expected Stable Diffusion XL, with CLIPTextModelWithProj",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_rejected_checkpoints(change, copy, one_device):
    change(copy)
    with pytest.raises(CheckpointError, match=REFUSED[change]):
        sega_jax.load(copy, devices=one_device)


def test_rejected_parts(folder, pipe, small_folder):
    with pytest.raises(TypeError, match="tokenizer=T5Tokenizer should be a CLIP tokenizer"):
        sega_jax.load(folder, tokenizer=object.__new__(T5Tokenizer), devices=pipe.devices)
    with pytest.raises(
        ValueError, match=r"text_encoder_2 is given, but Stable Diffusion 1.x or 2.x has no such network"
    ):
        sega_jax.load(small_folder, text_encoder_2=pipe.models.text_encoder_2, devices=pipe.devices)
    with pytest.raises(TypeError, match="text_encoder_2=CLIPTextModel should be a CLIPTextModelWithProjection"):
        sega_jax.load(folder, text_encoder_2=pipe.models.text_encoder, devices=pipe.devices)


# Calls


@pytest.mark.parametrize("name", ["original_size", "crops_top_left", "target_size"])
def test_invalid_size_conditioning(name, pipe, small):
    for value in (3, (3, 4, 5), [(3, 4), 5], "34", {"height": 3}):
        with pytest.raises(TypeError, match=f"{name}=.* should be two whole numbers, or two for each picture"):
            pipe("a cat", **{name: value})
    for value in ((3.5, 4), (True, 4), [(3, "4")]):
        with pytest.raises(TypeError, match=f"{name}=.* should be a whole number, from"):
            pipe("a cat", **{name: value})
    with pytest.raises(ValueError, match=f"{name}=-1 should be from"):
        pipe("a cat", **{name: (3, -1)})
    with pytest.raises(ValueError, match=f"{name} has 2 entries, expected 3, one for each prompt"):
        pipe(["a", "b", "c"], **{name: [(3, 4), (5, 6)]})
    with pytest.raises(TypeError, match=f"{name} is not an argument of a call of Stable Diffusion 1.x or 2.x"):
        small("a cat", **{name: (3, 4)})


@pytest.mark.slow
def test_default_size_conditioning(pipe):
    """The default sizes are the picture's (height, width), and the default is no crop. Each size matters, and so does
    the order of height and width."""
    call = CALL | {"height": 24, "width": 16}
    plain = pipe(**call).images
    sizes = {"original_size": (24, 16), "crops_top_left": (0, 0), "target_size": (24, 16)}
    np.testing.assert_array_equal(pipe(**call, **sizes).images, plain)
    np.testing.assert_array_equal(pipe(**call, target_size=np.array([[24, 16]])).images, plain)
    others = [{"original_size": (16, 24)}, {"target_size": (16, 24)}, {"crops_top_left": (2, 0)}]
    pictures = [plain, *(pipe(**call, **other).images for other in others)]
    assert len({picture.tobytes() for picture in pictures}) == 4


def text(states, pooled):
    """Returns a text of zeros with the given shapes."""
    return SDXLText(np.zeros((1, *states), np.float32), np.zeros((1, *pooled), np.float32))


def test_missing_negative_prompt(pipe):
    """A missing negative prompt means zeros, unless the checkpoint selects ""."""
    zeros = text((12, 36), (12,))
    plain, with_zeros = (pipe(**CALL, negative_prompt=negative).images for negative in (None, zeros))
    np.testing.assert_array_equal(plain, with_zeros)
    other = sega_jax.Pipeline(**pipe.components | {"extras": pipe.extras._replace(zero_negative=False)})
    np.testing.assert_array_equal(other(**CALL).images, pipe(**CALL, negative_prompt="").images)
    assert not np.array_equal(other(**CALL).images, plain)


@pytest.mark.parametrize("force", [True, False, None])
def test_dtype_of_the_autoencoder(force, pipe):
    """The published autoencoder overflows in float16, but not in bfloat16."""
    config = {} if force is None else {"force_upcast": force}
    vae = sdxl.Models.build(tiny.TEXT, tiny.TEXT_XL_2, cases.XL["unet"], tiny.VAE | config).vae
    for dtype, upcast in ((np.float16, force is not False), (jax.numpy.bfloat16, False), (np.float32, False)):
        cast = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), vae)
        result = jax.eval_shape(sdxl._upcast, cast)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {np.dtype(np.float32 if upcast else dtype)}


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (text((11, 36), (12,)), ValueError, r"an embedding's states have shape \(11, 36\), expected \(12, 36\)"),
        (text((12, 20), (12,)), ValueError, r"an embedding's states have shape \(12, 20\), expected \(12, 36\)"),
        (text((1, 36), (12,)), ValueError, r"an embedding's states have shape \(1, 36\), expected \(12, 36\)"),
        (text((12, 36), (16,)), ValueError, r"an embedding's pooled text has shape \(16,\), expected \(12,\)"),
        (ClipText(np.zeros((1, 12, 36), np.float32)), TypeError, "belongs to another family, expected SDXLText"),
        (
            np.zeros((12, 36), np.float32),
            TypeError,
            "should be an SDXLText with the fields states and pooled, .* not ndarray",
        ),
    ],
)
def test_texts_of_other_shapes_and_families_are_rejected(wrong, error, words, pipe):
    for call in ({"prompt": wrong}, {"prompt": "a", "edits": [Edit(wrong)]}, {"prompt": "a", "negative_prompt": wrong}):
        with pytest.raises(error, match=words):
            pipe(**call)


def test_embeddings_replace_words(pipe):
    cat, hat = pipe.encode(["a cat", "hat"])
    assert (cat.states.shape, cat.pooled.shape) == ((1, 12, 36), (1, 12))
    call = CALL | {"prompt": cat, "edits": [Edit(hat, warmup=1)]}
    for words in (pipe, sega_jax.Pipeline(**pipe.components | {"tokenizer": None})):
        np.testing.assert_array_equal(words(**call).images, pipe(**CALL).images)


# Rows and branches


@pytest.mark.slow
def test_several_devices(folder, pipe):
    """Rows with different texts, sizes and edits give bit-identical pictures on one device and on two devices."""
    both = sega_jax.load(folder, devices=jax.local_devices()[:2])
    rows = {
        "prompt": ["a cat", "dog"],
        "edits": [[Edit("hat", warmup=1)], [Edit("snow", scale=-4, warmup=0)]],
        "seed": [3, 8],
        "original_size": [(20, 34), (64, 48)],
    }
    together = both(**CALL | rows).images
    alone = [pipe(**CALL | {name: values[row : row + 1] for name, values in rows.items()}).images[0] for row in (0, 1)]
    assert np.array_equal(together, alone)
    assert not np.array_equal(*together)


@pytest.mark.slow
def test_concepts_that_have_cooled_down(pipe, compilations):
    """Programs that were compiled ahead of time predict fewer concepts; the pictures are the same except for
    rounding."""
    call = CALL | {"edits": [Edit("hat", warmup=0, cooldown=1)], "steps": 12}
    expected = pipe(**call).images
    other = sega_jax.Pipeline(**pipe.components)
    report = other.compile(**call)
    assert [program.concepts for program in report.programs if program.name == "advance"] == [1, 0]
    compilations.clear()
    actual = other(**call).images
    assert not compilations
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)
    assert not np.array_equal(expected, pipe(**call | {"edits": [Edit("hat", warmup=0, cooldown=9)]}).images)
