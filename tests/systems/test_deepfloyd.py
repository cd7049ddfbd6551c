"""DeepFloyd-IF's stages and the x4 upscaler: predictions, low-resolution pictures, noise levels and invalid inputs."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import tiny

from sega_jax import CheckpointError, Edit, Pipeline, load
from sega_jax.method.schedules import Row, from_config
from sega_jax.method.solvers import SOLVERS
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import deepfloyd, diffusion, low_res, programs
from sega_jax.systems.base import Settings, Static
from sega_jax.text.tokenizers import T5Tokenizer

EDITS = [Edit("glasses", warmup=1, threshold=0.5), Edit("hat", scale=-4, warmup=0, cooldown=4)]
BYTES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
LATENT = {"output": "latent", "steps": 3}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Pure functions


def test_solver_takes_the_prompts_variance():
    """If the network predicts the variance, guidance is applied only to the three channels of the estimate."""
    values = np.arange(2 * 4 * 6, dtype=np.float32).reshape(8, 1, 1, 6)
    row = Row(*[np.float32(1)] * 8)
    text = np.zeros((2, 4, 1, 1), np.float32)
    preds = diffusion.predict(lambda x, *_: jnp.asarray(values), text, jnp.zeros((2, 1, 1, 3)), row)
    branches = values.reshape(2, 4, 1, 1, 6)
    for actual, expected in (
        (preds.uncond, branches[:, 0]),
        (preds.cond, branches[:, 1]),
        (preds.edits, branches[:, 2:]),
    ):
        np.testing.assert_array_equal(actual, expected[..., :3])
    np.testing.assert_array_equal(preds.aux, branches[:, 1, ..., 3:])


def test_last_step_adds_no_noise():
    """The predicted variance is ignored, even if it is far outside [-1, 1]."""
    table = from_config(tiny.IF_SCHEDULER).table(3)
    last = jax.tree.map(lambda column: column[-1], table)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    solver = SOLVERS["multistep"](0.0)

    def step(variance):
        return solver.update(x, solver.init(x), jnp.asarray(x), variance, last, partial(jnp.ones, dtype=x.dtype))[0]

    np.testing.assert_array_equal(step(np.full_like(x, 99)), step(None))


def test_inputs_of_an_upscaler():
    """The solver scales only the state. The network gets each row's low-resolution picture and noise level once, and
    repeats them for the branches."""
    inputs = []

    def unet(x, timestep, text, level):
        inputs.append((x, level))
        return jnp.repeat(x[..., :3], 3, 0)

    row = Row(*[np.float32(2)] * 8)
    x, small = jnp.ones((2, 1, 1, 3)), jnp.arange(6.0).reshape(2, 1, 1, 3)
    preds = diffusion.predict(unet, np.zeros((2, 3, 1, 1), np.float32), x, row, (small, np.array([5, 9])))
    (x, level), *_ = inputs
    np.testing.assert_array_equal(x[:, 0, 0], [[2, 2, 2, 0, 1, 2], [2, 2, 2, 3, 4, 5]])
    assert level.tolist() == [5, 9]
    assert preds.aux is None


def test_text_is_projected_once_for_all_calls():
    shapes = []

    class Network:
        def project(self, text):
            shapes.append(text.shape)
            return text.mean(1)

        def __call__(self, x, timestep, text):
            shapes.append(text.shape)
            return jnp.zeros((len(text), *x.shape[1:]))

    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    settings = Settings(keys, np.ones(2), own=diffusion.DiffusionSettings(np.zeros(2)))
    program = {"sampler": deepfloyd.STAGE_1.sampler, "static": Static(own=diffusion.DiffusionStatic())}
    table = from_config(tiny.DDIM).table(3)

    def run(states):
        carry = programs.start(settings, None, 1.0, **program, shape=(2, 2, 3), dtype=np.float32)
        return programs.advance(Network(), deepfloyd.T5Text(states), carry, table, settings, **program)

    jax.eval_shape(run, jnp.zeros((2, 2, 7, 5)))
    assert shapes.count((4, 7, 5)) == 1
    assert set(shapes) == {(4, 7, 5), (4, 5)}


@pytest.mark.parametrize("size", [(4, 4), (7, 13), (1, 8), (2, 3)])
def test_resized_interpolates_linearly(size):
    rng = np.random.default_rng(0)
    picture = rng.standard_normal((2, 4, 5, 3)).astype(np.float32)
    expected = picture
    for axis, count in enumerate(size, 1):
        new = np.linspace(0, picture.shape[axis] - 1, count)
        old = np.arange(picture.shape[axis])
        expected = np.apply_along_axis(lambda line, new=new, old=old: np.interp(new, old, line), axis, expected)
    np.testing.assert_allclose(low_res.resized(jnp.asarray(picture), size), expected, atol=1e-5)


def noised(fresh, call, level=0.6):
    picture, signal, noise = jnp.zeros((2, 4, 4, 3)), np.full(2, 0.8), np.full(2, level)
    condition = low_res.LowResCondition(picture, np.int32([3, 3]), signal, noise, np.full(2, fresh))
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    return low_res.noised(keys, condition, Row(np.int32(call), *[None] * 7))


def test_low_resolution_noise_is_drawn_once_or_at_every_call():
    np.testing.assert_array_equal(noised(False, 0), noised(False, 7))
    assert not np.allclose(noised(True, 1), noised(True, 7))
    np.testing.assert_array_equal(noised(True, 0), noised(False, 0))
    assert not np.allclose(*noised(False, 0))
    assert not noised(False, 0, level=0).any()


# Calls


def test_edits_change_the_first_stage(first):
    plain, edited, neutral = (
        first("a cat", edits, steps=6, output="float", record=True)
        for edits in ([], EDITS, [Edit("glasses", scale=0, warmup=0)])
    )
    assert plain.images.shape == (1, 8, 8, 3)
    assert (plain.images.min(), plain.images.max()) >= (0.0, 0.5)
    assert np.abs(plain.images - edited.images).max() > 1e-3
    np.testing.assert_allclose(neutral.images, plain.images, atol=1e-4)
    assert edited.record.edits.shape == (1, 6, 2, 8, 8, 3)


def test_rows_are_independent(first):
    """The same rows in a different order give the same pictures, with the same program."""
    edits = [EDITS, EDITS[:1]]
    a = first(["cat", "a dog"], edits, seed=[3, 4], guidance_scale=[7, 3], **LATENT).images
    b = first(["a dog", "cat"], edits[::-1], seed=[4, 3], guidance_scale=[3, 7], **LATENT).images
    np.testing.assert_array_equal(a, b[::-1])


@pytest.mark.slow
def test_types_of_low_resolution_pictures(second):
    """Pictures may be PIL images, uint8 arrays or float arrays. Covers one picture for all rows and one per row."""
    call = partial(second, ["cat", "dog"], seed=[1, 2], **LATENT)
    expected = call(image=BYTES).images
    for image in (list(BYTES), [Image.fromarray(one) for one in BYTES], tuple(Image.fromarray(one) for one in BYTES)):
        np.testing.assert_array_equal(call(image=image).images, expected)
    for image in (BYTES / 255, (BYTES / 255).astype(np.float32), jnp.asarray(BYTES / 255)):
        np.testing.assert_allclose(call(image=image).images, expected, atol=1e-3)
    np.testing.assert_array_equal(call(image=BYTES[0]).images, call(image=BYTES[[0, 0]]).images)
    assert not np.allclose(call(image=BYTES[0]).images[1], expected[1], atol=1e-3)
    pairs = second(["cat", "dog"], images_per_prompt=2, image=BYTES, **LATENT).images
    assert pairs.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(
        pairs, second(["cat", "dog"], images_per_prompt=2, image=BYTES.repeat(2, 0), **LATENT).images
    )


@pytest.mark.slow
def test_noise_levels_do_not_recompile(second, compilations):
    """Each row may have its own level, and new levels compile nothing."""
    call = partial(second, ["cat", "cat"], seed=[1, 1], image=BYTES[0], **LATENT)
    call()
    compilations.clear()
    low, mixed, high = (call(noise_level=level).images for level in (10, [10, 900], np.array([900, 900])))
    np.testing.assert_array_equal(mixed, [low[0], high[1]])
    assert np.abs(low - high).max() > 1e-3
    assert np.abs(call(noise_level=900, noise_anew=True).images - high).max() > 1e-3
    np.testing.assert_array_equal(call().images, call(noise_level=250).images)
    assert not compilations


@pytest.mark.slow
def test_sizes(first, second, upscaler):
    assert first.latent_shape() == (8, 8, 3)
    assert first("cat", height=12, width=6, **LATENT).images.shape == (1, 12, 6, 3)
    wide = np.zeros((4, 6, 3), np.uint8)
    assert second("cat", image=wide, height=16, width=24, **LATENT).images.shape == (1, 16, 24, 3)
    assert upscaler("cat", image=wide, **LATENT).images.shape == (1, 4, 6, 4)
    assert upscaler("cat", image=wide, steps=1).images[0].size == (24, 16)


@pytest.mark.slow
def test_several_devices_give_the_same_pictures(stages, first):
    text = {"text_encoder": first.models.text_encoder, "tokenizer": first.tokenizer}
    several = load(stages["stage2"], devices=jax.local_devices()[:2], **text)
    one = load(stages["stage2"], devices=first.devices, **text)
    call = {"image": BYTES[[0, 1, 0]], "noise_level": [9, 99, 999], "edits": EDITS, "noise_anew": True} | LATENT
    a, b = several(["a", "b", "c"], **call), one(["a", "b", "c"], **call)
    np.testing.assert_allclose(a.images, b.images, atol=2e-4)


def test_other_schedulers(first):
    """Schedulers that ignore the predicted variance are supported, as are DeepFloyd-IF's lists of timesteps."""
    pipe = Pipeline(**first.components)
    pipe.scheduler = first.scheduler.config | {"variance_type": "fixed_small"}
    fixed = pipe("cat", **LATENT).images
    assert np.abs(fixed - first("cat", **LATENT).images).max() > 1e-3
    pipe.scheduler = "DPMSolverMultistepScheduler"
    assert np.isfinite(pipe("cat", **LATENT).images).all()
    assert first("cat", steps="super27", output="float", record=True).record.cond.shape[1] == 27


@pytest.mark.slow
def test_pipeline_without_a_text_encoder(stages, first, second, one_device):
    bare = load(stages["stage2"], devices=first.devices)
    assert bare.models.text_encoder is bare.tokenizer is None
    embeddings = first.encode(["cat", "", "hat"])
    expected = second("cat", Edit("hat", warmup=0), image=BYTES[0], **LATENT).images
    call = partial(bare, embeddings[0], negative_prompt=embeddings[1], image=BYTES[0], **LATENT)
    np.testing.assert_array_equal(call(Edit(embeddings[2], warmup=0)).images, expected)
    for words in (partial(bare, "cat", image=BYTES[0]), partial(bare, embeddings[0], image=BYTES[0]), bare.encode):
        with pytest.raises(
            ValueError, match="this pipeline has no text encoder; load it with its text encoder, or pass embeddings"
        ):
            words(*(["cat"] if words == bare.encode else []))
    with pytest.raises(ValueError, match=r"shape \(77, 9\), expected \(77, 24\)"):
        bare(np.zeros((77, 9), np.float32), negative_prompt=embeddings[1], image=BYTES[0])


# Errors


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("first", {"image": BYTES[0]}, TypeError, "image is not an argument of a call of DeepFloyd-IF's first stage"),
        ("first", {"noise_level": 3}, TypeError, "noise_level is not an argument of a call of DeepFloyd-IF's first"),
        ("first", {"height": 7}, ValueError, "height=7 is not a multiple of 2"),
        ("second", {"image": None}, ValueError, "give the low-resolution picture as image"),
        ("second", {"image": "cat.png"}, FileNotFoundError, "image='cat.png' does not exist"),
        ("second", {"image": []}, ValueError, r"image=\[\] should be a picture or a non-empty list"),
        ("second", {"image": BYTES[0, :, :, 0]}, ValueError, r"image has shape \(8, 8\), expected"),
        ("second", {"image": BYTES[0].transpose(2, 0, 1)}, ValueError, "move the channels to the last axis"),
        ("second", {"image": BYTES[0].astype(int)}, TypeError, "array .height, width, 3. of uint8"),
        ("second", {"image": BYTES[0] * 1.0}, ValueError, r"floats from .* to 2.., expected \[0, 1\]; scale them"),
        ("second", {"image": np.full((8, 8, 3), np.nan)}, ValueError, "image has NaN"),
        ("second", {"image": [BYTES[0], BYTES[0, :4]]}, ValueError, "pictures of 4x8 and 8x8 pixels"),
        ("second", {"image": BYTES}, ValueError, "image has 2 entries, expected 1, one for each prompt"),
        (
            "second",
            {"image": BYTES[0, :4, :4]},
            ValueError,
            "image has 4x4 pixels .*, expected 8x8 for a result of 32x32, 4 t",
        ),
        ("second", {"height": 16}, ValueError, "image has 8x8 pixels .*, expected 4x8 for a result of 16x32"),
        ("second", {"noise_level": 1000}, ValueError, "noise_level=1000 should be from 0 to 999"),
        ("second", {"noise_level": -1}, ValueError, "noise_level=-1 should be at least 0"),
        ("second", {"noise_level": 0.25}, TypeError, "noise_level=0.25 should be a whole number"),
        ("second", {"noise_level": [1, 2]}, ValueError, "noise_level has 2 entries, expected 1"),
        ("second", {"noise_anew": 1}, TypeError, "noise_anew=1 should be True or False"),
        ("upscaler", {"noise_level": 351}, ValueError, "noise_level=351 should be from 0 to 350"),
        ("upscaler", {"width": 64}, ValueError, "image has 8x8 pixels .*, expected 8x16 for a result of 32x64"),
    ],
)
def test_invalid_arguments(request, monkeypatch, name, options, error, words):
    pipe = request.getfixturevalue(name)
    monkeypatch.setattr(Devices, "map", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(error, match=f"(?s){words}"):
        pipe("cat", **({} if name == "first" else {"image": BYTES[0]}) | options)


@pytest.fixture
def copy(stages, tmp_path):
    """Returns a function that copies a stage's folder, for tests to damage."""

    def copied(name):
        return shutil.copytree(stages[name], tmp_path / name)

    return copied


@pytest.mark.parametrize(
    ("name", "part", "changes", "words"),
    [
        ("stage1", "unet", {"in_channels": 6, "class_embed_type": "timestep"}, "but .* first stage takes none"),
        ("stage1", "unet", {"in_channels": 6}, "6 input and 6 output channels does not belong to DeepFloyd-IF"),
        ("stage1", "unet", {"encoder_hid_dim": 30}, "encoder_hid_dim 30 is not the text encoder's d_model 24"),
        ("stage2", "unet", {"class_embed_type": None, "in_channels": 3}, "but .* second stage takes one"),
        ("stage1", "text_encoder", {"vocab_size": 30}, "ids up to 33, but the text encoder has 30"),
        ("upscaler", "unet", {"in_channels": 4, "num_class_embeds": None}, "takes no low-resolution picture"),
        ("stage1", "scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("stage2", "image_noising_scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
    ],
)
def test_networks_and_configs_that_do_not_fit(copy, name, part, changes, words):
    folder = copy(name)
    edit_json(next((folder / part).glob("*config.json")), **changes)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load(folder)


def test_missing_parts(copy):
    folder = copy("stage2")
    shutil.rmtree(folder / "image_noising_scheduler")
    with pytest.raises(CheckpointError, match=r"image_noising_scheduler.*is missing"):
        load(folder)
    folder = copy("stage1")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor spiece.model"):
        load(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(CheckpointError, match="no folder text_encoder"):
        load(folder)
    assert load(folder, text_encoder=False).models.text_encoder is None


def test_networks_of_another_type(stages, first, pipe):
    with pytest.raises(ValueError, match="vae is given, but DeepFloyd-IF's first stage has no such network"):
        load(stages["stage1"], vae=pipe.models.vae)
    with pytest.raises(TypeError, match="text_encoder=CLIPTextModel should be a T5EncoderModel"):
        load(stages["stage1"], text_encoder=pipe.models.text_encoder)
    with pytest.raises(TypeError, match="text_encoder=bool should be a CLIPTextModel"):
        load(stages["upscaler"], text_encoder=False)


def test_components_of_another_stage_are_rejected(first, second):
    """Covers networks, and the settings for low-resolution pictures."""
    other = first.models._replace(unet=second.models.unet)
    with pytest.raises(ValueError, match="takes a low-resolution picture, but DeepFloyd-IF's first stage takes none"):
        Pipeline(**first.components | {"models": other})
    with pytest.raises(TypeError, match="extras=None should be another pipeline's"):
        Pipeline(**second.components | {"extras": None})
    with pytest.raises(TypeError, match=r"extras=Upscaling.* should be None"):
        Pipeline(**first.components | {"extras": second.extras})


def test_network_of_another_stage_is_rejected(first, second):
    pipe = Pipeline(**first.components)
    with pytest.raises(ValueError, match="takes a low-resolution picture, but DeepFloyd-IF's first stage takes none"):
        pipe.models = pipe.models._replace(unet=second.models.unet)
    assert pipe.models.unet is first.models.unet


def test_unsupported_safety_checker_warns(tmp_path, one_device):
    folder = tiny.stage(tmp_path / "1", safety=True)
    with pytest.warns(UserWarning, match="DeepFloyd-IF's safety checker, which is not supported: pictures are neit"):
        pipe = load(folder, devices=one_device)
    assert pipe.safety is None


# Words


@pytest.mark.parametrize("extra", [0, 100])
def test_sentencepiece_model(tmp_path, extra):
    """DeepFloyd-IF's repositories have spiece.model instead of tokenizer.json."""
    pytest.importorskip("google.protobuf")
    pytest.importorskip("sentencepiece")
    for name in "ab":
        tiny.t5_tokenizer(tmp_path / name)
    tiny.spiece(tmp_path / "b", extra)
    texts = ["a cat at", "", "Dog, "]
    np.testing.assert_array_equal(*(T5Tokenizer(tmp_path / name, 160)(texts) for name in "ab"))


def test_sentencepiece_model_without_its_libraries(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").touch()
    monkeypatch.setattr("sega_jax.text.tokenizers.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs google.protobuf and sentencepiece; run pip install"):
        T5Tokenizer(tmp_path, 60)


def test_words_are_read_as_in_training(first):
    tokens = first.tokenizer(["  A Cat AT ", "a cat at", ""])
    assert tokens.shape == (3, 2, 77)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert tokens[0, 1].sum() > tokens[2, 1].sum() == 1
    with pytest.warns(UserWarning, match=r"reads 77 tokens; cut from the end of 'x+…': 'x+'"):
        assert first.tokenizer(["x" * 90])[0, 0, -1] == 1


def test_padding_is_masked_in_the_text_encoder(first):
    """A token in the padding changes only the states of the padding."""
    tokens = first.tokenizer(["a cat"])
    other = tokens.copy()
    other[:, 0, 60:] = 9
    a, b = (np.asarray(deepfloyd.encode(first.models.text_encoder, t).states) for t in (tokens, other))
    np.testing.assert_allclose(a[:, :60], b[:, :60], atol=1e-6)
    assert not np.allclose(a[:, 60:], b[:, 60:])
