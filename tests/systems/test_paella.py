"""Paella's sampler, prior and pipeline: comparisons with the public samplers and a plain loop, rows, padding, and
errors."""

import json
import operator
import shutil
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from reference import oracle
from reference import paella as cases
from support import tiny

from convert import convert
from sega_jax import CheckpointError, Edit, Edits, PaellaText, Pipeline, SemanticPaellaPipeline, load
from sega_jax.cli.main import main
from sega_jax.method.schedules.tokens import renoising
from sega_jax.method.solvers import Chances
from sega_jax.nn.paella import Paella, PaellaConfig
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import paella, paella_prior, programs
from sega_jax.systems.base import Settings, Static
from sega_jax.text.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_by_default")

# Optimisation would take longer than running the program.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
EDITS = [Edit("hat", warmup=1, threshold=0.5), Edit("dog", scale=-4, warmup=0, cooldown=3, threshold=0.3)]
TOKENS = {"output": "tokens", "steps": 4}
GATE = pytest.mark.filterwarnings("ignore:the edit .* begins at")


# Against the public samplers


def denoiser():
    """Returns a tiny predictor in float64 with the codebook of its VQGAN."""
    net = tiny.filled(Paella(PaellaConfig.from_dict(tiny.PAELLA_PARTS["denoiser"])), np.float64)
    vqgan = tiny.filled(VQModel(VQConfig.from_dict(tiny.PAELLA_PARTS["vqgan"])), np.float64)
    return paella.Predictor(net, vqgan.vquantizer.codebook.embedding)


def recorded_text(branches):
    """Returns the recorded texts for a batch of two, padded to the same length."""
    texts = [cases.BRANCHES[name] for name in branches]
    byt5, mask = np.full((2, len(texts), 9, 18), 3.0), np.zeros((2, len(texts), 9), bool)
    for i, text in enumerate(texts):
        byt5[:, i, : text["byt5"].shape[1]], mask[:, i, : text["byt5"].shape[1]] = text["byt5"], True
    clip = np.stack([np.repeat(text["clip"], 2, 0) for text in texts], 1).astype(np.float64)
    image = np.broadcast_to(cases.BRANCHES["cond"]["clip_image"].astype(np.float64), clip.shape)
    return PaellaText(byt5, mask, clip, np.ones(mask.shape[:2], bool), image)


def grids(name):
    """Returns all token grids of this library's sampler, given the noise that was injected into the public samplers."""
    edits = {"edited": [Edit("", scale=-7, warmup=2, threshold=0, momentum_scale=0)]}.get(name, [])
    settings = Settings(
        jax.random.split(jax.random.key(0)),  # has no effect
        np.full(2, cases.CFG),
        Edits.stack([edits] * 2) if edits else None,
        own=paella.PaellaSettings(np.tile((1.0, 1.0) if name == "published" else cases.INFLUENCE, (2, 1))),
    )
    program = {"sampler": paella.SYSTEM.sampler}
    program["static"] = Static(own=paella.PaellaStatic("nearest" if name == "quantised" else "sample"))
    run = cases.SAMPLERS[name]
    table = renoising(run["steps"], renoise_steps=run["renoise_steps"], temperature=cases.TEMPERATURE)
    text, predictor = recorded_text(["uncond", "cond", "edit"][: 2 + len(edits)]), denoiser()
    begin = partial(programs.start, **program, shape=(4, 8, 20), dtype=np.float64)
    carry = begin(settings, cases.START.astype(np.int32), 1)
    call, states = compiled(partial(programs.advance, **program)), [carry.x]
    for i in range(run["steps"]):
        row = jax.tree.map(lambda column, i=i: column[i : i + 1], table)
        carry, _ = call(predictor, text, carry, row, settings)
        states.append(carry.x)
    return np.stack(states)


def picture_embeddings():
    return paella_prior.sample_prior(
        tiny.filled(PriorModel(PriorConfig.from_dict(tiny.PRIOR)), np.float64),
        *(jnp.asarray(array, np.float64) for array in cases.IMAGINED),
    )


@pytest.fixture
def injected(monkeypatch):
    def chances(key, call, shape, dtype):
        assert shape == (4, 8, 20)
        return Chances(jnp.asarray(cases.GUMBEL, dtype)[call], jnp.asarray(cases.UNIFORM, dtype)[call])

    monkeypatch.setattr(paella, "chances", chances)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_grids_equal_those_of_the_public_samplers(name, injected):
    """All tokens are equal. The authors' rule for Paella is equivalent to edits with no threshold or momentum; their
    sampler also re-weights attention."""
    recorded = cases.recorded("float64")[f"grids {name}"]
    np.testing.assert_array_equal(grids(name), recorded)
    assert len({grid.tobytes() for grid in recorded}) == len(recorded)


def test_prior_embeddings_equal_the_published_code(injected):
    recorded = cases.recorded("float64")["imagined"]
    assert np.linalg.norm(picture_embeddings() - recorded) < 1e-9 * np.linalg.norm(recorded)


# Calls


@pytest.fixture(scope="module")
def pipe(paella):
    return paella


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"support": "latent", "centred": True}, marks=pytest.mark.slow),
        pytest.param({"semantics": "per_concept"}, marks=pytest.mark.slow),
    ],
)
def test_edits_equal_a_plain_loop(pipe, options):
    """A plain loop gives the same guidance for the logits and the same tokens."""
    calls = []
    call = {
        "steps": 6,
        "choice": "argmax",
        "seed": 3,
        "guidance_scale": 2.0,
        "callback": lambda *values: calls.append(values),
    }
    out = pipe("a cat", EDITS, record=True, output="tokens", **call, **options)
    record = jax.tree.map(lambda array: array[0].astype(np.float64), out.record)
    if options.get("centred"):
        np.testing.assert_allclose(record.edits.mean(-1), 0, atol=1e-6)
    settings = {name: [getattr(edit, name) for edit in EDITS] for name in vars(EDITS[0]) if name != "concept"}
    settings |= {"momentum_scale": [0.1] * 2, "momentum_beta": [0.4] * 2, "reverse": [False] * 2}
    if "support" not in options:
        semantics = options.get("semantics", "diffusers")
        added = oracle.guidance(record.uncond, record.edits, **settings, semantics=semantics)
        np.testing.assert_allclose(record.sem_guidance, added, rtol=1e-5, atol=1e-5)
    logits = record.uncond + 2.0 * (record.cond - record.uncond) + record.sem_guidance
    drawn = logits.argmax(-1)
    for i, (index, level, grid) in enumerate(calls):
        assert (index, level) == (i, pytest.approx(1 - i / 6))
        renoised = grid[0] != drawn[i]
        assert renoised.any() == (i < 4)  # int(13 / 16 * 6) is 4
        initial = np.where(renoised, grid[0], -1)
        calls[i] = initial
    start_grids = np.broadcast_to(start(pipe, 3), (6, 4, 4))
    renoised_grids = np.stack(calls)
    np.testing.assert_array_equal(renoised_grids[renoised_grids >= 0], start_grids[renoised_grids >= 0])
    np.testing.assert_array_equal(out.images[0], drawn[-1])


def test_centring_is_exact_in_half_precision():
    """Rounding the difference in half precision would change the drawn tokens."""
    rng, grid = np.random.default_rng(0), np.zeros((1, 2, 2), np.int32)
    logits = jnp.asarray(rng.standard_normal((3, 2, 2, 16)) * 4 + 3, jnp.bfloat16)
    row = SimpleNamespace(timestep=np.float32(0.5))
    preds = paella.predict(lambda *_: logits, (), grid, row, branches=3, centred=True)
    exact = np.asarray(logits, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    for branch, expected in zip((preds.uncond, preds.cond, preds.edits[:, 0]), exact, strict=True):
        np.testing.assert_allclose(branch[0], expected, atol=1e-5)


@pytest.mark.slow
@GATE
def test_edits_change_the_picture(pipe):
    plain, edited, neutral = (
        pipe("a cat", edits, steps=4, output="float")
        for edits in ([], EDITS, [Edit("hat", scale=0, warmup=0), Edit("b", scale=0)])
    )
    assert plain.images.shape == (1, 16, 16, 3)
    assert np.abs(plain.images - edited.images).max() > 1e-3
    np.testing.assert_array_equal(plain.images, neutral.images)
    assert plain.images.min() >= 0
    assert plain.images.max() <= 1
    assert isinstance(pipe("a cat", steps=2).images[0], Image.Image)


@pytest.mark.slow
def test_rows_are_independent(pipe):
    """The same rows in a different order give the same tokens, with the same program."""
    edits = [EDITS, EDITS[:1]]
    a = pipe(["cat", "a dog"], edits, seed=[3, 4], guidance_scale=[7, 3], **TOKENS).images
    b = pipe(["a dog", "cat"], edits[::-1], seed=[4, 3], guidance_scale=[3, 7], **TOKENS).images
    np.testing.assert_array_equal(a, b[::-1])
    assert (a[0] != a[1]).any()


@pytest.mark.slow
def test_finished_concepts_are_not_predicted(pipe, compilations):
    """Programs that were compiled ahead of time omit concepts that have cooled down; the tokens stay the same."""
    prepared, call = Pipeline(**pipe.components), {"edits": EDITS[1:] * 2, "seed": 3} | TOKENS
    report = prepared.compile("dog", [Edit("", warmup=0, cooldown=2)] * 2, **TOKENS)
    assert [program.concepts for program in report.programs if program.name == "advance"] == [2, 0]
    compilations.clear()
    with pipe.devices.watch() as used:
        actual = prepared("a cat", **call).images
    assert [program.concepts for program in used if program.name == "advance"][-1] == 0
    np.testing.assert_array_equal(actual, pipe("a cat", **call).images)
    assert not compilations


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the text encoder reads 12 tokens")  # CLIP's
def test_texts_of_different_lengths_in_one_batch(pipe):
    """Texts give the same tokens in one batch and in separate calls, even if their padded lengths differ."""
    prompts, edits = ["cat", "x" * 90], [EDITS, [Edit("y" * 70, warmup=0)]]
    together = pipe(prompts, edits, seed=[1, 2], record=True, **TOKENS)
    for i, (prompt, edit) in enumerate(zip(prompts, edits, strict=True)):
        alone = pipe(prompt, edit, seed=i + 1, record=True, **TOKENS)
        np.testing.assert_array_equal(alone.images[0], together.images[i])
        for name in ("sem_guidance", "uncond", "cond", "edits"):
            expected, actual = getattr(alone.record, name), getattr(together.record, name)[i]
            actual = actual[:, : len(edit)] if name == "edits" else actual
            np.testing.assert_allclose(expected[0], actual, rtol=1e-4, atol=1e-4)


def without_words(pipe):
    """Returns the pipeline without its text encoders and prior."""
    models = pipe.models._replace(byt5=None, clip=None, prior=None)
    return Pipeline(**pipe.components | {"models": models, "tokenizer": None})


@GATE
@pytest.mark.slow
def test_conditioning_of_the_branches(pipe):
    """Only the prompt's branch has a picture embedding and an influence. A prompt given as ByT5 states has no CLIP
    embedding."""
    rows, records = {"steps": 2, "record": True, "output": "tokens", "seed": 5}, {}
    for name, value in (("plain", (1, 1)), ("influenced", (1.2, 0.4))):
        records[name] = pipe("a cat", ["hat"], influence=value, **rows).record
    for branch in ("uncond", "edits"):
        np.testing.assert_array_equal(
            getattr(records["plain"], branch)[:, 0], getattr(records["influenced"], branch)[:, 0]
        )
    assert np.abs(records["plain"].cond[:, 0] - records["influenced"].cond[:, 0]).max() > 1e-4
    other = pipe("a cat", ["hat"], **rows | {"seed": [6]}, tokens=start(pipe, 5)).record
    same = pipe("a cat", ["hat"], **rows, tokens=start(pipe, 5)).record
    np.testing.assert_array_equal(other.uncond[:, 0], same.uncond[:, 0])
    assert np.abs(other.cond[:, 0] - same.cond[:, 0]).max() > 1e-5, "the prior ignores the seed"
    states = np.random.default_rng(0).standard_normal((5, 18)).astype(np.float32)
    bare = without_words(pipe)
    expected = bare(states, Edit(states[:2], warmup=0), negative_prompt=states[:1], **rows).record
    actual = pipe(states, Edit(states[:2], warmup=0), negative_prompt=states[:1], **rows).record
    np.testing.assert_allclose(actual.cond, expected.cond, atol=1e-5)


def start(pipe, seed):
    """Returns the initial grid for a seed."""
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), programs.INITIAL)
    return np.asarray(jax.random.randint(key, (1, *pipe.latent_shape()[:2]), 0, 20, np.int32))


@pytest.mark.slow
def test_initial_tokens(pipe):
    tokens = np.arange(16).reshape(1, 4, 4)
    grids = []
    call = {"steps": 6, "renoise_steps": 6, "choice": "argmax", "output": "tokens", "seed": 1}
    drawn = pipe("cat", tokens=tokens, **call, callback=lambda _, __, grid: grids.append(grid)).images
    assert drawn.dtype == np.int32
    # After the first call, a sixth of the tokens have been drawn, and the others are initial tokens again.
    assert (grids[0] == tokens).sum() > 8
    np.testing.assert_array_equal(
        pipe("cat", seed=5, **TOKENS).images, pipe("cat", seed=5, tokens=start(pipe, 5), **TOKENS).images
    )


@GATE
def test_numbers_do_not_recompile(pipe, compilations):
    call = partial(pipe, ["a", "b"], EDITS, **TOKENS)
    call()
    compilations.clear()
    call(seed=4, guidance_scale=[1, 2], temperature=(1, 0.5), renoise_steps=1, influence=(1.1, 0.5), momentum_beta=0.1)
    pipe(["c", "d"], [Edit("e", scale=2), Edit("f", warmup=2)], output="tokens", steps=9)
    assert not compilations


def test_several_devices_give_the_same_tokens(paella_folder, pipe):
    several = load(paella_folder, devices=jax.local_devices()[:2])
    a, b = (p(["a", "b"], EDITS, **TOKENS) for p in (several, pipe))
    assert (a.images == b.images).mean() > 0.9  # a near tie may be resolved differently


def test_choices_and_sizes(pipe):
    images = {choice: pipe("cat", choice=choice, seed=1, **TOKENS).images for choice in ("sample", "nearest")}
    assert (images["sample"] != images["nearest"]).any()
    assert pipe("cat", height=32, width=16, **TOKENS).images.shape == (1, 8, 4)
    assert pipe.latent_shape(32, 16) == (8, 4, 20)


def test_non_finite_logits_mark_the_row(pipe):
    """Broken rows stay visible, although integer tokens cannot be NaN."""
    broken = jax.tree.map(lambda leaf: leaf, pipe.models.denoiser)
    broken.out_mapper[1].kernel = jax.tree.map(lambda k: k.at[..., 3].set(jnp.nan), broken.out_mapper[1].kernel)
    other = Pipeline(**pipe.components)
    other.models = pipe.models._replace(denoiser=broken)
    with pytest.warns(RuntimeWarning, match=r"pictures \[0\] contain NaN"):
        out = other("cat", **TOKENS)
    assert not out.finite.any()
    assert (out.images == -1).all()
    with pytest.warns(RuntimeWarning, match="contain NaN"):
        assert other("cat", steps=2).images == [None]


@cache
def temporary(n):
    """Returns the temporary memory, in bytes, of a small network's program with a full-size grid and vocabulary."""
    config = tiny.PAELLA_PARTS["denoiser"] | {"num_labels": 8192}
    net, one = Paella(PaellaConfig.from_dict(config)), partial(jax.ShapeDtypeStruct, dtype=np.float32)
    program = {"sampler": paella.SYSTEM.sampler, "static": Static(own=paella.PaellaStatic())}
    edits, own = Edits.stack([[Edit("a")] * n]), paella.PaellaSettings(np.ones((1, 2)))
    settings = Settings(jax.random.split(jax.random.key(0), 1), np.ones(1), edits, own=own)
    text = PaellaText(
        one((1, 2 + n, 64, 18)), np.ones((1, 2 + n, 64), bool), one((1, 2 + n, 12)), np.ones((1, 2 + n), bool)
    )
    start = partial(programs.start, x=None, scale=1, **program, shape=(64, 64, 8192), dtype=np.float32)
    carry = jax.eval_shape(start, settings)
    table = jax.tree.map(lambda column: column.astype(np.float32) if column.dtype == float else column, renoising(4))
    lowered = jax.jit(partial(programs.advance, **program)).lower(
        paella.Predictor(net, one((8192, 3))), text, carry, table, settings
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_of_guided_logits():
    """The program with two concepts and 64x64 tokens in float32 needs less than 3 GiB."""
    assert temporary(2) < 3 * 2**30


# Errors

# Recorded guidance for 1024x1024 tokens.
LARGE = np.broadcast_to(np.float32(0), (1, 1, 1024, 1024, 20))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"height": 24}, ValueError, "height=24 is not a multiple of 16, this checkpoint's factor; try 16"),
        ({"temperature": 0}, ValueError, "temperature=0 should be above 0"),
        ({"temperature": (1, 0.5, 0.2)}, ValueError, r"temperature=\(1, 0.5, 0.2\) should be a number, or two"),
        ({"temperature": "hot"}, TypeError, "temperature='hot' should be a finite number"),
        ({"temperature": (1, np.nan)}, ValueError, "temperature=nan should be a finite number"),
        ({"influence": (1, -1)}, ValueError, "influence=-1 should be at least 0"),
        ({"renoise_steps": 33}, ValueError, "renoise_steps=33 should be from 0 to 32"),
        ({"renoise_steps": 1.5}, TypeError, "renoise_steps=1.5 should be a whole number"),
        ({"steps": 0}, ValueError, "steps=0 should be from 1 to 1048576"),
        ({"steps": "fast27"}, TypeError, "steps='fast27' should be a whole number"),
        ({"choice": "quant"}, ValueError, "choice='quant' should be one of sample, argmax, nearest"),
        ({"output": "latent"}, ValueError, "output='latent' should be one of pil, uint8, float, tokens"),
        ({"centred": 1}, TypeError, "centred=1 should be True or False"),
        ({"support": "token"}, ValueError, "support='token' should be one of channel"),
        (
            {"tokens": np.zeros((1, 4, 4))},
            ValueError,
            r"tokens have dtype float64 .*, expected integers",
        ),
        ({"tokens": np.full((1, 4, 4), 20)}, ValueError, "tokens range from 20 to 20, expected 0 to 19"),
        ({"tokens": np.zeros((2, 4, 4), int)}, ValueError, r"expected integers of shape \(1, 4, 4\)"),
        ({"height": 8192, "width": 8192, "record": True}, ValueError, "record=True would hold 60 GiB of logits"),
        (
            {"height": 4096, "width": 4096, "replay": LARGE},
            ValueError,
            "replay would hold 5 GiB of logits, but the limit",
        ),
        ({"replay": LARGE[:, :, :3]}, ValueError, r"replay has shape \(1, 1, 3, .*\), expected \(1, calls, 4, 4, 20\)"),
        ({"callback": 1}, TypeError, "callback=1 should be a function"),
        ({"negative_prompt": np.zeros((0, 18), np.float32)}, ValueError, r"shape \(0, 18\), expected \(bytes, 18\)"),
        ({"temperature": np.array(0.0)}, TypeError, "should be a finite number"),
        ({"influence": (1.2, 0.4)}, ValueError, "a prior draws for a prompt in words"),
        ({"negative_prompt": np.zeros((3, 9), np.float32)}, ValueError, r"shape \(3, 9\), expected \(bytes, 18\)"),
    ],
)
def test_invalid_arguments(pipe, monkeypatch, options, error, words):
    monkeypatch.setattr(Devices, "map", lambda *_, **__: pytest.fail("a program ran"))
    states = np.zeros((3, 18), np.float32)
    with pytest.raises(error, match=words):
        pipe(states, **{"negative_prompt": states} | options)


def test_clip_without_a_tokenizer(pipe):
    bytes_alone = Pipeline(**pipe.components | {"tokenizer": (pipe.tokenizer[0], None)})
    with pytest.raises(ValueError, match="the models include CLIP, but the pipeline has no CLIP tokenizer"):
        bytes_alone("cat")
    nothing = Pipeline(**pipe.components | {"tokenizer": None})
    with pytest.raises(ValueError, match=r"'cat' cannot be encoded, because this pipeline has no tokenizer"):
        nothing("cat")


def test_words_without_a_text_encoder(pipe):
    bare = without_words(pipe)
    with pytest.raises(ValueError, match=r"'cat' cannot be encoded, because this pipeline has no text encoder"):
        bare("cat", negative_prompt=np.zeros((3, 18), np.float32))
    with pytest.raises(TypeError, match="models=int should be the Models of a Paella pipeline"):
        Pipeline(**pipe.components | {"models": 3})


def test_byte_tokenizer():
    tokens = ByteTokenizer(259)(["a\u00e9", "", "x" * 70])
    assert tokens.shape == (3, 2, 128)
    assert tokens[0, 0, :5].tolist() == [100, 198, 172, 1, 0]
    assert tokens[1, 0, :2].tolist() == [1, 0]
    assert tokens[:, 1].sum(1).tolist() == [4, 1, 71]
    with pytest.warns(UserWarning, match="reads 768 tokens; cut from the end of 'y+…': 'zz'"):
        long = ByteTokenizer(384)(["y" * 767 + "zz"])
    assert long[0, 0, -2:].tolist() == [124, 1]
    with pytest.raises(CheckpointError, match="the text encoder has 200 embeddings, but ByT5 needs at least 259"):
        ByteTokenizer(200)


# Folders


@pytest.fixture
def copy(paella_folder, tmp_path):
    return shutil.copytree(paella_folder, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("denoiser", {"num_labels": 24}, "num_labels 24 is not the VQGAN's codebook_size 20"),
        ("denoiser", {"byt5_embd": 19}, "byt5_embd 19 is not the ByT5's d_model 18"),
        ("clip", {"projection_dim": 13}, "clip_embd 12 is not the CLIP's projection_dim 13"),
        ("prior", {"clip_r": 13}, "clip_embd 12 is not the prior's clip_r 13"),
        ("denoiser", {"kernel_size": 5}, "kernel_size"),
        ("byt5", {"vocab_size": 200}, "the weights do not fit|has 200 embeddings"),
    ],
)
def test_networks_that_do_not_fit(copy, part, changes, words):
    edit_json(copy / part / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        load(copy)


def test_missing_parts(copy):
    shutil.rmtree(copy / "prior")
    with pytest.raises(CheckpointError, match="has no folder prior; give a complete checkpoint"):
        load(copy)
    edit_json(copy / "model_index.json", prior=[None, None])
    assert load(copy).models.prior is None
    edit_json(copy / "model_index.json", clip=[None, None], prior=["sega_jax", "PriorModel"])
    (copy / "prior").mkdir()
    tiny.write_json(copy / "prior" / "config.json", tiny.PRIOR)
    with pytest.raises(CheckpointError, match="the prior needs CLIP's text embeddings, but clip is missing"):
        load(copy)
    edit_json(copy / "model_index.json", vqgan=[None, None])
    with pytest.raises(CheckpointError, match="whose vqgan is missing; expected Paella, with VQModel"):
        load(copy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler": "DDIMScheduler"}, "scheduler=.*: Paella has its own schedule; leave it out"),
        ({"text_encoder": False}, "text_encoder is given, but Paella has no such network"),
    ],
)
def test_options_of_other_families(paella_folder, options, words):
    with pytest.raises(ValueError, match=words):
        load(paella_folder, **options)


def test_conversion_to_orbax(paella_folder, pipe, one_device, tmp_path):
    """A converted checkpoint has the same weights."""
    converted = load(convert(paella_folder, tmp_path / "orbax"), devices=one_device)
    for actual, expected in zip(jax.tree.leaves(converted.models), jax.tree.leaves(pipe.models), strict=True):
        np.testing.assert_array_equal(actual, expected)


# Other interfaces


def test_the_diffusers_api(paella_folder, pipe, one_device):
    face = SemanticPaellaPipeline.from_pretrained(paella_folder, devices=one_device)
    shared = SemanticPaellaPipeline.from_pipe(face).pipeline.models
    assert all(map(operator.is_, jax.tree.leaves(shared), jax.tree.leaves(face.pipeline.models)))
    actual = face(
        "a cat",
        num_inference_steps=4,
        guidance_scale=3,
        seed=2,
        renoise_steps=2,
        temperature=(1, 0.5),
        editing_prompt=["hat", "dog"],
        reverse_editing_direction=[False, True],
        edit_guidance_scale=[5, 4],
        edit_warmup_steps=[1, 0],
        edit_cooldown_steps=[None, 3],
        edit_threshold=[0.5, 0.3],
        output_type="latent",
        return_guidance=True,
    )
    call = {"guidance_scale": 3, "seed": 2, "renoise_steps": 2, "temperature": (1, 0.5), "record": True}
    expected = pipe("a cat", EDITS, **call, **TOKENS)
    np.testing.assert_array_equal(actual.images, expected.images)
    np.testing.assert_array_equal(actual.edit_estimates, np.moveaxis(expected.record.edits, 0, 2))
    assert actual.sem_guidance.shape == (4, 1, 4, 4, 20)
    with pytest.raises(ValueError, match="mode='gumbel' should be one of multinomial, argmax, quant"):
        face("a cat", mode="gumbel")
    with pytest.raises(TypeError, match=r"should be a pipeline from sega_jax\.load"):
        SemanticPaellaPipeline.from_pipe(3)


def test_the_command_line(paella_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = CliRunner().invoke
    words = ["edit", "--model", str(paella_folder), "--prompt", "a cat", "--edit", "hat:warmup=1", "--steps", "3"]
    words += ["--temperature", "1,0.5", "--out", str(tmp_path / "out")]
    result = run(main, words)
    assert result.exit_code == 0, result.output
    assert "Paella's sampler, float32" in result.output
    assert Image.open(tmp_path / "out/0001-edited.png").size == (16, 16)
    info = run(main, ["info", str(tmp_path / "out/0001-edited.png")]).output
    assert "guidance_scale 8.0" in " ".join(info.split())
    assert "--temperature 1.0,0.5" in info.splitlines()[-1]
    for more, message in (
        (["--temperature", "warm"], "--temperature warm should be a number"),
        (["--temperature", "1,0"], "--temperature 0 should be above 0"),
        (["--temperature", "1,1,1"], "--temperature 1,1,1 should be a number, or two, such as 1.2,0.2"),
        (["--renoise-steps", "-1"], "--renoise-steps -1 should be at least 0"),
        (["--eta", "0.5"], f"but {paella_folder} is Paella; leave it out"),
        (["--stage2", str(paella_folder)], "--stage2 applies only to DeepFloyd-IF's cascade, but"),
    ):
        assert message in run(main, words + more).output
    other = run(main, ["edit", "--prompt", "a", "--edit", "b", "--renoise-steps", "3", "--out", str(tmp_path / "out")])
    assert "--renoise-steps applies to Paella, but the demo model is Stable Diffusion" in other.output
