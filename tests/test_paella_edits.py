"""Paella's sampler, prior and pipeline: against the public samplers and a plain loop, rows, padding, what is refused."""

import json
import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image
from reference import oracle
from reference import paella as cases

from convert import convert
from sega_jax import CheckpointError, Edit, Edits, PaellaPipeline, SemanticPaellaPipeline, load
from sega_jax.cli import main
from sega_jax.nn.paella import Paella, PaellaConfig
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.parallel import Devices
from sega_jax.schedules.tokens import renoising
from sega_jax.solvers import Chances
from sega_jax.systems import paella, prior
from sega_jax.text import ByteTokenizer

# Without optimisation, which takes longer than to run.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
EDITS = [Edit("hat", warmup=1, threshold=0.5), Edit("dog", scale=-4, warmup=0, cooldown=3, threshold=0.3)]
TOKENS = {"output": "tokens", "steps": 4}


# Against the public samplers


def denoiser():
    """With the codebook of its VQGAN."""
    net = tiny.filled(Paella(PaellaConfig.from_dict(tiny.PAELLA_PARTS["denoiser"])), np.float64)
    vqgan = tiny.filled(VQModel(VQConfig.from_dict(tiny.PAELLA_PARTS["vqgan"])), np.float64)
    return paella.Predictor(net, vqgan.vquantizer.codebook.embedding)


def told(branches):
    """The recorded texts, padded to one length, of a batch of two."""
    texts = [cases.BRANCHES[name] for name in branches]
    byt5, mask = np.full((2, len(texts), 9, 18), 3.0), np.zeros((2, len(texts), 9), bool)
    for i, text in enumerate(texts):
        byt5[:, i, : text["byt5"].shape[1]], mask[:, i, : text["byt5"].shape[1]] = text["byt5"], True
    clip = np.stack([np.repeat(text["clip"], 2, 0) for text in texts], 1).astype(np.float64)
    image = np.repeat(cases.BRANCHES["cond"]["clip_image"], 2, 0).astype(np.float64)
    return paella.Text(byt5, mask, clip, np.ones(mask.shape[:2], bool), image)


def grids(name):
    """Every grid from the first to the last, of our system with the noise that was injected there."""
    edits = {"edited": [Edit("", scale=-7, warmup=2, threshold=0, momentum_scale=0)]}.get(name, [])
    settings = paella.Settings(
        jax.random.split(jax.random.key(0)),  # of no effect
        np.full(2, cases.CFG),
        np.tile((1.0, 1.0) if name == "published" else cases.INFLUENCE, (2, 1)),
        Edits.stack([edits] * 2) if edits else None,
    )
    method = paella.Method("nearest" if name == "quantised" else "sample")
    run = cases.SAMPLERS[name]
    table = renoising(run["steps"], renoise_steps=run["renoise_steps"], temperature=cases.TEMPERATURE)
    text, predictor = told(["uncond", "cond", "edit"][: 2 + len(edits)]), denoiser()
    carry = paella.start(settings, cases.START.astype(np.int32), 1, shape=(4, 8, 20), method=method, dtype=np.float64)
    call, found = compiled(partial(paella.advance, method=method)), [carry.x]
    for i in range(run["steps"]):
        row = jax.tree.map(lambda column, i=i: column[i : i + 1], table)
        carry, _ = call(predictor, text, carry, row, settings)
        found.append(carry.x)
    return np.stack(found)


def imagined():
    return prior.imagine(
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
def test_grids_are_those_of_the_public_samplers(name, injected):
    """To the last token. The rule of the authors' code for Paella is that of edits without a threshold and without
    momentum, and their attention is re-weighted."""
    recorded = cases.recorded("float64")[f"grids {name}"]
    np.testing.assert_array_equal(grids(name), recorded)
    assert len({grid.tobytes() for grid in recorded}) == len(recorded)


def test_the_priors_embeddings(injected):
    recorded = cases.recorded("float64")["imagined"]
    assert np.linalg.norm(imagined() - recorded) < 1e-9 * np.linalg.norm(recorded)


# Calls


@pytest.fixture(scope="module")
def paella_folder(tmp_path_factory):
    return tiny.paella(tmp_path_factory.mktemp("checkpoints") / "paella")


@pytest.fixture(scope="module")
def pipe(paella_folder, one_device):
    return load(paella_folder, devices=one_device)


@pytest.mark.parametrize("options", [{}, {"support": "latent", "centred": True}, {"semantics": "per_concept"}])
def test_edits_against_a_plain_loop(pipe, options):
    """What is added to the logits, and which tokens follow from it."""
    seen = []
    call = {"steps": 6, "choice": "argmax", "seed": 3, "guidance_scale": 2.0, "callback": lambda *now: seen.append(now)}
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
    start = pipe("a cat", steps=1, renoise_steps=1, seed=3, output="tokens", choice="argmax").images[0]
    drawn = logits.argmax(-1)
    for i, (done, level, grid) in enumerate(seen):
        assert (done, level) == (i, pytest.approx(1 - i / 6))
        back = grid[0] != drawn[i]
        assert not back.any() if i >= 4 else True  # 13 of 16 of 6 are 4
        first = np.where(back, grid[0], -1)
        seen[i] = first
    starts = np.stack(seen)
    assert all(len(set(column[column >= 0])) <= 1 for column in starts.reshape(6, -1).T), "another grid than the first"
    assert start.shape == (4, 4)
    np.testing.assert_array_equal(out.images[0], drawn[-1])


def test_edits_change_the_picture(pipe):
    plain, edited, neutral = (
        pipe("a cat", edits, steps=4, output="float") for edits in ([], EDITS, [Edit("hat", scale=0, warmup=0)])
    )
    assert plain.images.shape == (1, 16, 16, 3)
    assert np.abs(plain.images - edited.images).max() > 1e-3
    np.testing.assert_array_equal(plain.images, neutral.images)
    assert plain.images.min() >= 0
    assert plain.images.max() <= 1
    assert isinstance(pipe("a cat", steps=2).images[0], Image.Image)


def test_rows_are_their_own(pipe):
    """The same program and batch: only the order differs."""
    edits = [EDITS, EDITS[:1]]
    a = pipe(["cat", "a dog"], edits, seed=[3, 4], guidance_scale=[7, 3], **TOKENS).images
    b = pipe(["a dog", "cat"], edits[::-1], seed=[4, 3], guidance_scale=[3, 7], **TOKENS).images
    np.testing.assert_array_equal(a, b[::-1])
    assert (a[0] != a[1]).any()


def test_texts_of_other_lengths(pipe):
    """In one batch as each by itself, over a length that is padded to."""
    prompts, edits = ["cat", "x" * 90, ""], [EDITS[:1], [Edit("y" * 70, warmup=0)], [Edit("", warmup=0)]]
    call = {"record": True, **TOKENS}
    with pytest.warns(UserWarning, match="reads 12 tokens"):  # CLIP's
        together = pipe(prompts, edits, seed=[1, 2, 3], **call)
        for i, (prompt, edit) in enumerate(zip(prompts, edits, strict=True)):
            alone = pipe(prompt, edit, seed=i + 1, **call)
            np.testing.assert_array_equal(alone.images[0], together.images[i])
            for ours, all_of_them in zip(alone.record, together.record, strict=True):
                np.testing.assert_allclose(ours[0], all_of_them[i], rtol=1e-4, atol=1e-4)


def test_what_branches_are_told(pipe):
    """The prompt alone has a picture, whose influence is its own, too; states of ByT5 come without CLIP."""
    rows, seen = {"steps": 2, "record": True, "output": "tokens", "seed": 5}, {}
    for name, value in (("plain", (1, 1)), ("influenced", (1.2, 0.4))):
        seen[name] = pipe("a cat", ["hat"], influence=value, **rows).record
    for branch in ("uncond", "edits"):
        np.testing.assert_array_equal(getattr(seen["plain"], branch)[:, 0], getattr(seen["influenced"], branch)[:, 0])
    assert np.abs(seen["plain"].cond[:, 0] - seen["influenced"].cond[:, 0]).max() > 1e-4
    other = pipe("a cat", ["hat"], **rows | {"seed": [6]}, tokens=start(pipe, 5)).record
    same = pipe("a cat", ["hat"], **rows, tokens=start(pipe, 5)).record
    np.testing.assert_array_equal(other.uncond[:, 0], same.uncond[:, 0])
    assert np.abs(other.cond[:, 0] - same.cond[:, 0]).max() > 1e-5, "the prior draws the same picture of any seed"
    states = np.random.default_rng(0).standard_normal((5, 18)).astype(np.float32)
    bare = PaellaPipeline(pipe.models._replace(byt5=None, clip=None, prior=None), None, pipe.devices)
    wanted = bare(states, Edit(states[:2], warmup=0), negative_prompt=states[:1], **rows).record
    mixed = pipe(states, Edit(states[:2], warmup=0), negative_prompt=states[:1], **rows).record
    np.testing.assert_allclose(mixed.cond, wanted.cond, atol=1e-5)


def start(pipe, seed):
    """The grid that a seed starts from."""
    settings = paella.Settings(jax.random.key(np.uint32(seed))[None], None, None, None)
    return np.asarray(
        jax.random.randint(
            jax.random.fold_in(settings.key[0], paella.INITIAL), (1, *pipe.latent_shape()), 0, 20, np.int32
        )
    )


def test_tokens_to_start_from(pipe):
    given = np.arange(16).reshape(1, 4, 4)
    back = pipe("cat", tokens=given, steps=1, renoise_steps=1, output="tokens", seed=1).images
    assert back.dtype == np.int32
    np.testing.assert_array_equal(
        pipe("cat", seed=5, **TOKENS).images, pipe("cat", seed=5, tokens=start(pipe, 5), **TOKENS).images
    )


def test_numbers_do_not_compile(pipe, compilations):
    call = partial(pipe, ["a", "b"], EDITS, **TOKENS)
    call()
    compilations.clear()
    call(seed=4, guidance_scale=[1, 2], temperature=(1, 0.5), renoise_steps=1, influence=(1.1, 0.5), momentum_beta=0.1)
    pipe(["c", "d"], [Edit("e", scale=2), Edit("f", warmup=2)], output="tokens", steps=9)
    assert not compilations


def test_devices_change_nothing(paella_folder, pipe):
    several = load(paella_folder, devices=jax.local_devices()[:2])
    a, b = (p(["a", "b", "c"], EDITS, **TOKENS) for p in (several, pipe))
    assert (a.images == b.images).mean() > 0.9  # a near tie may fall the other way


def test_choices_and_sizes(pipe):
    made = {choice: pipe("cat", choice=choice, seed=1, **TOKENS).images for choice in ("sample", "argmax", "nearest")}
    assert len({grid.tobytes() for grid in made.values()}) == 3
    assert pipe("cat", height=32, width=16, **TOKENS).images.shape == (1, 8, 4)
    assert pipe.latent_shape(32, 16) == (8, 4)


def test_logits_that_are_not_finite(pipe):
    """They stay visible, though tokens have no NaN."""
    broken = jax.tree.map(lambda leaf: leaf, pipe.models.denoiser)
    broken.out_mapper[1].kernel = jax.tree.map(lambda k: k.at[..., 3].set(jnp.nan), broken.out_mapper[1].kernel)
    other = PaellaPipeline(pipe.models._replace(denoiser=broken), pipe.tokenizer, pipe.devices)
    with pytest.warns(RuntimeWarning, match=r"pictures \[0\] came out as NaN"):
        out = other("cat", **TOKENS)
    assert not out.finite.any()
    assert (out.images == -1).all()
    with pytest.warns(RuntimeWarning, match="came out as NaN"):
        assert other("cat", steps=2).images == [None]


@cache
def temporary(n):
    """Bytes that a program of a full-sized grid and vocabulary takes beside its arguments, of a small network."""
    config = tiny.PAELLA_PARTS["denoiser"] | {"num_labels": 8192}
    net, one = Paella(PaellaConfig.from_dict(config)), partial(jax.ShapeDtypeStruct, dtype=np.float32)
    method, shape = paella.Method(), (64, 64, 8192)
    edits = Edits.stack([[Edit("a")] * n])
    settings = paella.Settings(jax.random.split(jax.random.key(0), 1), np.ones(1), np.ones((1, 2)), edits)
    text = paella.Text(
        one((1, 2 + n, 64, 18)), np.ones((1, 2 + n, 64), bool), one((1, 2 + n, 12)), np.ones((1, 2 + n), bool)
    )
    carry = jax.eval_shape(
        partial(paella.start, tokens=None, scale=1, shape=shape, method=method, dtype=np.float32), settings
    )
    table = jax.tree.map(lambda column: column.astype(np.float32) if column.dtype == float else column, renoising(4))
    program = jax.jit(partial(paella.advance, method=method))
    lowered = program.lower(paella.Predictor(net, one((8192, 3))), text, carry, table, settings)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_of_guided_logits():
    """Two concepts of 64x64 tokens in float32."""
    assert temporary(2) < 3 * 2**30
