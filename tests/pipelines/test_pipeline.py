"""Pipeline calls: independent rows, seeds, outputs, records, warnings, and the diffusers interface."""

import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import oracle
from support import tiny

import sega_jax
from sega_jax import Edit, Pipeline, Recommended, SemanticStableDiffusionPipeline
from sega_jax.method.schedules import from_config

PROMPTS = ["cat", "dog"]
STEPS = 5
EDITS = [
    [Edit("a", scale=4, warmup=0, cooldown=3, weight=2), Edit("b", scale=-3, warmup=2, threshold=0.5)],
    [Edit("c", warmup=1, momentum_scale=0.5, momentum_beta=0.7)],
]
# EDITS[0] for both rows, written as diffusers' arguments.
WORDS = {
    "editing_prompt": ["a", "b"],
    "reverse_editing_direction": [False, True],
    "edit_guidance_scale": [4, 3],
    "edit_warmup_steps": [0, 2],
    "edit_cooldown_steps": [3, None],
    "edit_threshold": [0.9, 0.5],
    "edit_weights": [2, 1],
}
LATENTS = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def run(small):
    """Returns a function for calls with two rows and at most two concepts; most of these calls share a program."""
    defaults = {"edits": EDITS, "steps": STEPS, "latents": LATENTS, "output": "latent", "record": True}
    return lambda prompt=PROMPTS, **options: small(prompt, **defaults | options)


@pytest.fixture(scope="module")
def face(small):
    defaults = WORDS | {"num_inference_steps": STEPS, "latents": LATENTS, "output_type": "latent"}
    call = SemanticStableDiffusionPipeline.from_pipe(small)
    return lambda prompt=PROMPTS, **options: call(prompt, **defaults | {"return_guidance": True} | options)


def added(record, row, edits, momentum_scale=0.1, momentum_beta=0.4):
    """Computes the oracle's guidance for a row from the recorded predictions."""
    edits = [Recommended().edit(edit, STEPS) for edit in edits]
    settings = {name: [getattr(edit, name) for edit in edits] for name in vars(edits[0]) if name != "concept"}
    for name, default in (("momentum_scale", momentum_scale), ("momentum_beta", momentum_beta)):
        settings[name] = [default if value is None else value for value in settings[name]]
    predictions = record.uncond[row].astype(float), record.edits[row, :, : len(edits)].astype(float)
    return oracle.guidance(*predictions, **settings, reverse=[False] * len(edits), semantics="diffusers")


def by_hand(x, guided, steps=STEPS):
    """Runs DDIM by hand with the given noise estimates [calls, ...]."""
    betas = np.linspace(tiny.DDIM["beta_start"] ** 0.5, tiny.DDIM["beta_end"] ** 0.5, 1000) ** 2
    bars, stride = np.cumprod(1 - betas), 1000 // steps
    for i, estimate in enumerate(guided):
        t = (steps - 1 - i) * stride + 1
        now, before = bars[t], bars[max(t - stride, 0)]
        x0 = (x - np.sqrt(1 - now) * estimate) / np.sqrt(now)
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * estimate
    return x


def close(found, wanted, tolerance=1e-5):
    assert np.linalg.norm(np.asarray(found) - wanted) <= tolerance * np.linalg.norm(wanted)


# The complete loop


def test_guidance_and_steps_follow_the_formulas(run):
    """Covers row 8 of the table of differences: each row has its own concepts and settings."""
    out = run(guidance_scale=[7.5, 1.5])
    assert out.record.edits.shape == (2, STEPS, 2, 8, 8, 4)
    for row, scale in enumerate((7.5, 1.5)):
        sem = added(out.record, row, EDITS[row])
        close(out.record.sem_guidance[row], sem)
        uncond, cond = out.record.uncond[row], out.record.cond[row]
        close(out.images[row], by_hand(LATENTS[row], uncond + scale * (cond - uncond) + sem))


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
def test_edits_act_without_classifier_free_guidance(face, scale):
    """Covers row 2 of the table of differences: diffusers drops the edits and keeps only the conditional estimate."""
    out = face(guidance_scale=scale)
    assert np.abs(out.sem_guidance).max() > 0.1
    for row in range(2):
        close(
            out.images[row], by_hand(LATENTS[row], out.text_estimates[:, row].astype(float) + out.sem_guidance[:, row])
        )


def test_rows_are_independent(run):
    mixed, alike = run(), run(["cat", "cat"], edits=[EDITS[0], EDITS[0]])
    assert np.array_equal(mixed.images[0], alike.images[0])
    assert not np.array_equal(mixed.images[1], alike.images[1])


def test_fewer_concepts_are_padded_without_effect(run):
    padded = run(edits=[EDITS[0], [EDITS[0][1]]])
    sem = added(padded.record, 1, [EDITS[0][1]])
    close(padded.record.sem_guidance[1], sem)
    explicit = run(edits=[EDITS[0], [EDITS[0][1], Edit("", weight=0, warmup=0)]])
    assert np.array_equal(padded.images, explicit.images)


def test_plms_makes_one_more_call_and_warmups_count_calls(small):
    """Covers row 7 of the table of differences, for a picture that is not square."""
    plms = Pipeline(**small.components | {"scheduler": from_config(tiny.PNDM)})
    edits = [Edit("a", warmup=STEPS), Edit("b", warmup=2, cooldown=4)]
    out = plms("cat", edits, steps=STEPS, record=True, output="latent", height=20, width=12)
    assert out.record.cond.shape == (1, STEPS + 1, 10, 6, 4)
    assert out.record.sem_guidance[0].any((1, 2, 3)).tolist() == [False, False, True, True, False, True]
    close(out.record.sem_guidance[0], added(out.record, 0, edits))


# Texts


def test_negative_prompts(run):
    for_all, each = run(negative_prompt="b"), run(negative_prompt=["b", ""])
    assert np.array_equal(for_all.images[0], each.images[0])
    assert np.array_equal(each.images[1], run().images[1])
    assert not np.array_equal(for_all.images[1], each.images[1])


def test_edits_may_be_words_or_one_list_for_all(run):
    options = {"steps": 12}
    explicit = run(edits=[[Edit("a"), Edit("b")]] * 2, **options)
    assert np.array_equal(run(edits=["a", "b"], **options).images, explicit.images)
    assert np.array_equal(run(edits=[("a", "b"), [Edit("a"), "b"]], **options).images, explicit.images)


def test_embeddings_replace_words(run, small):
    a, b = small.encode(["a", "b"])
    edits = [Edit(a, warmup=0), Edit(b.states[0].tolist(), warmup=1)]
    assert np.array_equal(run(edits=edits).images, run(edits=[Edit("a", warmup=0), Edit("b", warmup=1)]).images)


LONG = "a b c d e f g h i j k l m n"


def test_truncated_texts_keep_the_end_token_and_warn(small, run):
    """Covers row 5 of the table of differences: in diffusers, truncated texts lose the end token, and one long prompt
    breaks a batch."""
    with pytest.warns(UserWarning, match="reads 12 tokens; cut from the end of 'a b c .*: 'k l m n") as caught:
        long = run([LONG, "dog"])
    assert caught[0].filename == __file__
    ids = small.tokenizer(["a b c d e f g h i j", "a"])
    assert (ids[0, -1], ids[1, 2]) == (57, 57)
    assert np.array_equal(long.images, run(["a b c d e f g h i j", "dog"]).images)


@pytest.mark.parametrize("text", ["éééééééé", "日本語日本"])
def test_truncated_texts_with_several_tokens_per_letter_warn(small, text):
    with pytest.warns(UserWarning, match="reads 12 tokens; cut from the end of"):
        small.tokenizer([text])


def test_short_texts_do_not_warn(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.tokenizer(["", "a b c d e f g h i j", "a" + " " * 100])


def test_cached_encodings_do_not_depend_on_the_batch(small):
    texts = [f"{a} {b}" for a in "abcdefghijklmnopqr" for b in "abcdefghijklmnopqr"]
    all_at_once = small.encode(texts)
    assert len(all_at_once) == len(texts)
    for i in (7, 0, 100, -1):
        close(small.encode([texts[i]]).states, all_at_once[i].states, 1e-6)


def test_equal_texts_are_encoded_once(small):
    """Texts with the same tokens are encoded once, both within a call and across calls."""
    pipe = Pipeline(**small.components)
    with pipe.devices.watch() as programs:
        first = pipe.encode(["a cat", "A  cat"] * 6 + ["a dog"]).states
        pipe(["a cat"] * 2, ["a dog", Edit("a cat", warmup=0)], negative_prompt="a dog", steps=12, output="latent")
    assert [program.name for program in programs].count("encode") == 1
    assert np.array_equal(first[:-1], first[:1].repeat(12, 0))
    assert not np.array_equal(first[0], first[-1])


# Randomness


def test_seeds(run):
    options = {"latents": None, "edits": [Edit("a", warmup=0), Edit("b", warmup=1)], "prompt": ["cat", "cat"]}
    first = run(seed=3, **options)
    assert first.seeds == [3, 4]
    assert np.array_equal(first.images[::-1], run(seed=[4, 3], **options).images)
    assert np.array_equal(first.images, run(seed=np.array([3, 4]), **options).images)
    assert np.array_equal(run(**options).images, run(seed=0, **options).images)
    assert not np.array_equal(*first.images)
    several = run(images_per_prompt=2, seed=3, **options | {"prompt": "cat"})
    assert several.seeds == [3, 4]
    assert np.array_equal(first.images, several.images)


def test_keys(run):
    draw = partial(run, ["cat", "cat"], latents=None, edits=["a", "b"])
    first = draw(key=jax.random.key(5), steps=12)
    assert first.seeds is None
    assert not np.array_equal(*first.images)
    assert np.array_equal(first.images, draw(key=jax.random.PRNGKey(5), steps=12).images)
    assert not np.array_equal(first.images, draw(key=jax.random.key(6), steps=12).images)


def test_with_latents_the_seed_only_draws_fresh_noise(run):
    assert np.array_equal(run(seed=1).images, run(seed=2).images)
    assert not np.array_equal(run(seed=1, eta=1.0).images, run(seed=2, eta=1.0).images)
    share = run(seed=1, eta=[0.0, 1.0]).images
    assert np.array_equal(share[0], run().images[0])
    assert np.array_equal(share[1], run(seed=1, eta=1.0).images[1])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_latents_of_any_floating_type(run, dtype):
    assert np.array_equal(
        run(latents=LATENTS.astype(dtype)).images, run(latents=LATENTS.astype(dtype).astype(np.float32)).images
    )


def test_pictures_of_a_prompt_are_adjacent(run):
    options = {"latents": None, "edits": ["a", "b"], "steps": 12}
    rows = run("cat", images_per_prompt=2, negative_prompt=["b", ""], **options)
    swapped = run(["cat", "cat"], seed=[1, 0], negative_prompt=["", "b"], **options)
    assert np.array_equal(rows.images, swapped.images[::-1])


# Outputs


def test_all_outputs_show_the_same_pictures(run):
    floats, bytes_, pictures = (run(output=output, record=False).images for output in ("float", "uint8", "pil"))
    assert floats.shape == (2, 16, 16, 3)
    assert floats.dtype == np.float32
    assert 0 <= floats.min() < floats.max() <= 1
    assert np.array_equal((floats * 255).round().astype(np.uint8), bytes_)
    assert all(np.array_equal(*pair) for pair in zip(pictures, bytes_, strict=True))


def test_nothing_is_recorded_unless_asked_for(run, face, small):
    """Covers row 9 of the table of differences."""
    before = set(vars(small))
    out = run(record=False)
    assert out.record is None
    assert out.finite.all()
    close(out.images, run().images)
    out = face(return_guidance=False)
    assert [out.sem_guidance, out.uncond_estimates, out.text_estimates, out.edit_estimates] == [None] * 4
    assert set(vars(small)) == before


def test_pictures_that_are_not_finite_are_not_shown(run):
    bad = partial(run, guidance_scale=[7.5, 1e38], record=False)
    shown = {}
    for output in ("pil", "uint8", "float", "latent"):
        with pytest.warns(RuntimeWarning, match=r"pictures \[1\] contain NaN or infinite values.*smaller"):
            out = bad(output=output)
        assert out.finite.tolist() == [True, False]
        shown[output] = out.images
    assert shown["pil"][0] is not None
    assert shown["pil"][1] is None
    assert not shown["uint8"][1].any()
    assert np.isnan(shown["float"][1]).all()
    assert np.isfinite(shown["float"][0]).all()


def test_callback(run):
    calls, last = [], []

    def note(call, timestep, latents):
        calls.append((call, timestep))
        last[:] = [np.array(latents)]

    plain = run(record=False)
    out = run(callback=note, record=False)
    assert calls == [(0, 801), (1, 601), (2, 401), (3, 201), (4, 1)]
    assert np.array_equal(out.images, plain.images)
    assert np.array_equal(out.images, last[0])
    calls.clear()
    assert np.array_equal(run(callback=note, callback_steps=3, record=False).images, plain.images)
    assert calls == [(0, 801), (3, 201)]


def test_an_error_in_a_callback_leaves_the_pipeline_usable(run):
    def stop(call, timestep, latents):
        raise KeyboardInterrupt

    before = run(record=False).images
    with pytest.raises(KeyboardInterrupt):
        run(callback=stop, record=False)
    assert np.array_equal(run(record=False).images, before)


def test_progress(run, capfd, monkeypatch):
    """By default, the bar appears only in terminals and notebooks."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    run(record=False)
    assert "call" not in capfd.readouterr().err
    run(record=False, progress=True)
    assert f"{STEPS}/{STEPS}" in capfd.readouterr().err


def test_a_warmup_beyond_the_last_call_warns(run, face):
    """Covers row 11 of the table of differences."""
    edits = [Edit("a", warmup=0), Edit("b", warmup=STEPS)]
    for call in (partial(run, edits=edits), partial(face, edit_warmup_steps=[0, STEPS])):
        with pytest.warns(UserWarning, match=f"'b' begins at warmup={STEPS}, after the last of {STEPS} model calls"):
            out = call()
    assert not np.array_equal(out.images, run().images)


def test_the_warning_about_late_warmups_names_only_its_consequences(small):
    """Other edits of the same picture lose their momentum; a picture with a single edit has no other edits."""
    late, early = Edit("b", warmup=9), Edit("a", warmup=0)
    for rows, waits in (([[late]], False), ([[late], [early]], False), ([[early, late]], True)):
        with pytest.warns(UserWarning, match="so it has no effect") as caught:
            small.prepare(["a cat"] * len(rows), rows, steps=4)
        assert ("the other edits of the same picture get no momentum" in str(caught[0].message)) is waits
        assert "steps=4 makes" not in str(caught[0].message)


# The diffusers interface


def test_the_diffusers_interface_equals_the_native_call(run, face):
    out, native = face(), run(edits=[EDITS[0]] * 2)
    assert np.array_equal(out.images, native.images)
    assert out.nsfw_content_detected is None
    assert np.array_equal(out.sem_guidance, np.moveaxis(native.record.sem_guidance, 0, 1))
    assert np.array_equal(out.uncond_estimates, np.moveaxis(native.record.uncond, 0, 1))
    assert np.array_equal(out.text_estimates, np.moveaxis(native.record.cond, 0, 1))
    assert np.array_equal(out.edit_estimates, np.moveaxis(native.record.edits, 0, 2))
    images, flags = face(return_dict=False)
    assert np.array_equal(images, out.images)
    assert flags is None


def test_embeddings_of_concepts_are_not_mixed(face, small):
    """Covers row 3 of the table of differences: with more than one prompt, diffusers mixes up the concepts'
    embeddings."""
    words, embeddings = face(), small.encode(["a", "b"])
    options = {"editing_prompt": None}
    assert np.array_equal(face(editing_prompt_embeddings=embeddings, **options).images, words.images)
    assert np.array_equal(face(editing_prompt_embeddings=embeddings.states, **options).images, words.images)
    each = np.stack([embeddings.states, embeddings.states[::-1]])
    swapped = face(editing_prompt=["b", "a"])
    mixed = face(editing_prompt_embeddings=each, **options)
    assert np.array_equal(mixed.images[0], words.images[0])
    assert np.array_equal(mixed.images[1], swapped.images[1])


@pytest.mark.parametrize("kind", [tuple, np.array, jnp.array])
def test_settings_as_tuples_and_arrays(face, kind):
    """Covers row 4 of the table of differences: in diffusers, a tuple of False reverses all edits, and arrays fail."""
    names = [name for name in WORDS if name not in ("editing_prompt", "edit_cooldown_steps")]
    out = face(**{name: kind(WORDS[name]) for name in names}, edit_cooldown_steps=(3, None))
    assert np.array_equal(out.images, face().images)


def test_none_is_the_default(face):
    names = [name for name in WORDS if name != "editing_prompt"]
    options = {"num_inference_steps": 12}
    nothing = face(**dict.fromkeys(names), edit_momentum_scale=None, edit_mom_beta=None, **options)
    entries = face(**{name: [None, None] for name in names}, **options)
    numbers = {"edit_guidance_scale": 5, "edit_warmup_steps": 10, "edit_threshold": 0.9, "edit_weights": [1, 1]}
    stated = face(**numbers, reverse_editing_direction=False, edit_cooldown_steps=None, **options)
    assert np.array_equal(nothing.images, stated.images)
    assert np.array_equal(entries.images, stated.images)


def test_extra_settings_are_ignored_with_a_warning(face):
    with pytest.warns(
        UserWarning, match="edit_weights has 5 entries for 2 concepts; the extra entries are ignored"
    ) as caught:
        out = face(edit_weights=[2, 1, 1, 1, 1])
    assert caught[0].filename == __file__
    assert np.array_equal(out.images, face().images)


def test_a_cooldown_before_the_warmup_warns(face):
    with pytest.warns(UserWarning, match="'b' ends at cooldown=1, before it begins at warmup=2: only its momentum"):
        face(edit_cooldown_steps=[3, 1])


def test_warmups_may_be_fractions(face):
    assert np.array_equal(face(edit_warmup_steps=[0.0, 1.5]).images, face().images)


def test_replayed_guidance_gives_the_same_picture(face):
    """The record ends with zeros, like diffusers' records."""
    first = face()
    record = np.pad(first.sem_guidance, ((0, 1), *[(0, 0)] * 4))
    again = face(sem_guidance=record, edit_guidance_scale=0)
    close(again.images, first.images, 3e-4)
    assert not again.sem_guidance.any()


# Precision


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_guidance_and_latents_in_float32(small_folder, one_device, dtype):
    half = sega_jax.load(small_folder, devices=one_device, dtype=dtype)
    out = half("cat", EDITS[:1], steps=STEPS, output="latent", record=True)
    assert half.encode(["a"]).states.dtype == jnp.dtype(dtype)
    assert out.images.dtype == out.record.sem_guidance.dtype == np.float32
    assert not np.array_equal(out.record.cond, out.record.cond.astype(dtype))
    assert not np.array_equal(out.images, out.images.astype(dtype))
    close(out.record.sem_guidance[0], added(out.record, 0, EDITS[0]))


def test_a_seed_gives_the_same_picture_with_any_default_generator(run):
    expected = run(seed=3, latents=None).images
    assert not np.array_equal(run(seed=4, latents=None).images, expected)
    with jax.default_prng_impl("rbg"):
        assert np.array_equal(run(seed=3, latents=None).images, expected)


def test_keys_of_other_generators_draw_rows_independently(run):
    both, other = (run(p, key=jax.random.key(0, impl="rbg"), latents=None).images for p in (PROMPTS, [PROMPTS[0], "z"]))
    assert np.array_equal(both[0], other[0])
    assert not np.array_equal(both[0], both[1])


def test_rescaling_does_not_change_the_edits(run, compilations):
    """Guidance is rescaled before the edits are added, so entries that no edit changes are the same as in an unedited
    call."""
    default = run()
    compilations.clear()
    assert np.array_equal(run(guidance_rescale=0.0).images, default.images)
    assert not compilations
    out = run(guidance_rescale=[0.7, 0.0])
    close(out.images[1], default.images[1])
    uncond, cond = (part[0].astype(float) for part in (out.record.uncond, out.record.cond))
    plain = uncond + 7.5 * (cond - uncond)
    ratio = [np.std(c, ddof=1) / np.std(p, ddof=1) for c, p in zip(cond, plain, strict=True)]
    rescaled = plain * (0.7 * np.array(ratio)[:, None, None, None] + 0.3)
    sem = added(out.record, 0, EDITS[0])
    close(out.record.sem_guidance[0], sem)
    close(out.images[0], by_hand(LATENTS[0], rescaled + sem))
