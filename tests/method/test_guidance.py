"""Compares semantic guidance with a float64 NumPy oracle, and tests invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import oracle
from support.guidance_cases import SEMANTICS, SPACE, close, edits, expected, predictions, row, run

from sega_jax import Edit, Edits, Predictions, cfg, replay, rescale, sega
from sega_jax.method.guidance import NEVER, quantile


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_equals_the_oracle(n, batch, semantics):
    rng = np.random.default_rng(100 * n + batch)
    for case in range(20):
        rows = [row(rng, n, momentum=case % 2) for _ in range(batch)]
        if semantics == "per_concept":
            for settings in rows:
                settings["momentum_scale"] = rng.uniform(0, 1, n)
        preds = predictions(rng, batch, n)
        added = run(preds, edits(rows), semantics)
        assert added.dtype == np.float64
        close(added, expected(preds, rows, semantics))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(9, 3), (3, 2, 4, 3), (6, 50)], ids=["1d", "3d", "tokens"])
def test_equals_the_oracle_for_other_shapes(shape):
    rng = np.random.default_rng(0)
    rows = [row(rng, 2, momentum=1) for _ in range(2)]
    preds = predictions(rng, 2, 2, shape)
    close(run(preds, edits(rows)), expected(preds, rows))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("support", ["channel", "latent", "pixel"])
def test_supports_share_the_right_quantiles(support, threshold):
    preds = predictions(np.random.default_rng(1), 1, 1, calls=1)
    psi = 3.0 * (preds.edits[0, 0, 0] - preds.uncond[0, 0])
    if support == "pixel":
        gamma = oracle.above(psi, threshold, None, np.abs(psi).sum(-1, keepdims=True))
    else:
        gamma = oracle.above(psi, threshold, (0, 1) if support == "channel" else None)
    settings = Edits.stack([[Edit("a", scale=3, threshold=threshold, warmup=0)]])
    close(run(preds, settings, support=support)[0, 0], gamma)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counting_equals_sorting(dtype, monkeypatch):
    """Counting and sorting agree to the last bit at every rank, even among equal entries, zeros, infinities and NaN."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        values = np.abs(rng.standard_normal((6, 11, 5)) * 10.0 ** rng.integers(-30, 30, (6, 11, 5))).astype(dtype)
        values[1, 3:] = values[1, 3]
        values[2, ::2], values[3, :4], values[4, 7] = 0, np.inf, np.nan
        for share in (0, 0.1, 0.55, 0.9, 1):
            shares = jnp.full(6, share, dtype)
            by_sorting = quantile.quantile(values, shares)
            with monkeypatch.context() as patch:
                patch.setattr(quantile, "_SORTED", 0)
                np.testing.assert_array_equal(quantile.quantile(values, shares), by_sorting)
        for place in range(10):
            found, wanted = (f(values, jnp.full((6, 1), place)) for f in (quantile._by_counting, quantile._by_sorting))
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("platform", "sorts"), [("tpu", False), ("cpu", True), ("cuda", True)])
def test_tpus_compute_quantiles_without_a_sort(platform, sorts):
    mask = jax.jit(lambda *of: quantile.threshold_mask(*of, "channel"))
    traced = mask.trace(jax.ShapeDtypeStruct((2, 3, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert ("sort" in traced.lower(lowering_platforms=(platform,)).as_text()) == sorts


@pytest.mark.parametrize("support", ["channel", "latent", "pixel"])
def test_equal_magnitudes_all_reach_their_quantile(support):
    """The quantile of equal values is their common value: the interpolation must not round up."""
    values = np.random.default_rng(2).uniform(0, 1, (1, 2000, 1, 1, 1, 1)).astype(np.float32)
    psi = np.broadcast_to(values, (1, 2000, 1, 3, 3, 2))
    rows = [[Edit("a", scale=1, threshold=t, warmup=0)] for t in np.random.default_rng(3).uniform(0, 1, 2000)]
    zero = np.zeros_like(psi[:, :, 0])
    assert np.array_equal(run(Predictions(zero, zero, psi), Edits.stack(rows), support=support), psi[:, :, 0])


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_zero_scales_equal_cfg(semantics):
    preds = jax.tree.map(np.float32, predictions(np.random.default_rng(3), 2, 2, calls=1))
    preds = jax.tree.map(lambda p: jnp.asarray(p[0]), preds)
    plain = cfg(7.5)
    edited = optax.chain(cfg(7.5), sega(Edits.stack([[Edit("a", scale=0, warmup=0)] * 2] * 2), semantics=semantics))
    results = [g.update(preds.uncond, g.init(preds), preds)[0] for g in (plain, edited)]
    assert np.array_equal(*results)


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.3, -2.0, [0.3, 7.5]])
def test_cfg_is_its_formula(scale):
    uncond, cond = np.random.default_rng(4).standard_normal((2, 2, *SPACE), np.float32)
    preds = Predictions(uncond, cond, uncond[:, None])
    scale = np.asarray(scale)
    estimate = cfg(scale).update(jnp.asarray(uncond), optax.EmptyState(), preds)[0]
    column = scale.reshape(*scale.shape, *(1,) * (uncond.ndim - scale.ndim)).astype(np.float32)
    close(estimate, uncond + column * (cond - uncond), 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_order_of_concepts_does_not_matter(semantics):
    rng = np.random.default_rng(5)
    settings, preds, order = row(rng, 4, momentum=1), predictions(rng, 1, 4), [2, 0, 3, 1]
    permuted = {name: [values[k] for k in order] for name, values in settings.items()}
    added = run(preds._replace(edits=preds.edits[:, :, order]), edits([permuted]), semantics)
    close(added, run(preds, edits([settings]), semantics))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_padding_changes_nothing(n, semantics):
    rng = np.random.default_rng(6)
    rows, preds = [row(rng, n, momentum=1), row(rng, 3, momentum=1)], predictions(rng, 2, 3)
    alone = jax.tree.map(lambda p: p[:, :1], preds)
    alone = alone._replace(edits=alone.edits[:, :, :n])
    close(run(preds, edits(rows), semantics)[:, :1], run(alone, edits(rows[:1]), semantics))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "first",
    [{"cooldown": 1}, {"weight": 0}],
    ids=["the only warm concept has cooled down", "the only warm concept has weight 0"],
)
def test_nothing_is_added_while_no_warm_concept_has_weight(first):
    """Covers row 1 of the table of differences: diffusers divides 0 by 0 until the second concept is warm."""
    settings = Edits.stack([[Edit("a", warmup=0, **first), Edit("b", warmup=5)]])
    added = run(predictions(np.random.default_rng(7), 1, 2), settings)
    start = first.get("cooldown", 0)
    assert not added[start:5].any()
    assert np.isfinite(added).all()
    assert added[5:].any((1, 2, 3, 4)).all()


@pytest.mark.usefixtures("x64")
def test_momentum_acts_after_the_cooldown_only_with_diffusers_semantics():
    settings = Edits.stack([[Edit("a", warmup=0, cooldown=3, momentum_scale=0.5)]])
    preds = predictions(np.random.default_rng(8), 1, 1)
    tail, silence = (run(preds, settings, semantics)[3:] for semantics in SEMANTICS)
    assert tail.any((1, 2, 3, 4)).all()
    assert not silence.any()


def test_nan_predictions_stay_visible():
    """A broken prediction must not look like a call without an edit."""
    preds = jax.tree.map(np.float32, predictions(np.random.default_rng(14), 1, 2))
    preds.edits[2, 0, 1, 0, 0, 0] = np.nan
    added = run(preds, Edits.stack([[Edit("a", warmup=0), Edit("b", warmup=0)]]))
    assert np.isfinite(added[:2]).all()
    assert np.isnan(added[2]).any()


def test_guidance_of_half_precision_predictions_is_float32():
    half = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.bfloat16), predictions(np.random.default_rng(9), 2, 1))
    guidance = optax.chain(cfg(7.5), sega(Edits.stack([[Edit("a", warmup=0)]] * 2)))
    state = guidance.init(half)
    for _ in range(2):
        estimate, state = guidance.update(half.uncond, state, half)
    assert estimate.dtype == state[1].momentum.dtype == jnp.float32
    assert state[1].step.tolist() == [2, 2]
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    from_wide, _ = guidance.update(wide.uncond, guidance.init(wide), wide)
    from_half, _ = guidance.update(half.uncond, guidance.init(half), half)
    assert np.array_equal(from_wide, from_half)


def test_settings_broadcast_to_all_rows_and_concepts():
    preds = jax.tree.map(np.float32, predictions(np.random.default_rng(15), 2, 3))
    numbers = Edits(5.0, 0.9, 1, NEVER, np.ones((1, 3)), np.full((2, 1), 0.1), 0.4)
    assert np.array_equal(run(preds, numbers), run(preds, Edits.stack([[Edit("a", warmup=1)] * 3] * 2)))


@pytest.mark.usefixtures("x64")
def test_the_order_of_cfg_and_sega_does_not_matter():
    rng = np.random.default_rng(10)
    preds = jax.tree.map(lambda p: jnp.asarray(p[0]), predictions(rng, 2, 3))
    links = cfg(7.5), sega(edits([row(rng, 3, momentum=1) for _ in range(2)]))
    results = []
    for chain in (optax.chain(*links), optax.chain(*links[::-1])):
        results.append(chain.update(preds.uncond, chain.init(preds), preds)[0])
    close(*results)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_jit_and_vmap_equal_the_plain_function():
    rng = np.random.default_rng(11)
    batches = [predictions(rng, 2, 3) for _ in range(2)]
    settings = [edits([row(rng, 3, momentum=1) for _ in range(2)]) for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *zip(batches, settings, strict=True))
    with jax.disable_jit():
        plain = [run(*pair) for pair in zip(batches, settings, strict=True)]
    close(jax.vmap(run)(*stacked), plain)
    close([run(*pair) for pair in zip(batches, settings, strict=True)], plain)


@pytest.mark.usefixtures("x64")
def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(12)
    preds = predictions(rng, 1, 2)
    settings = Edits.stack([[Edit("a", warmup=0, cooldown=4), Edit("b", warmup=2, threshold=0.5)]], momentum_scale=0.5)

    def loss(scale):
        return jnp.square(run(preds, settings._replace(scale=scale))).sum()

    scale, step = jnp.asarray([[4.0, -3.0]]), 1e-6
    slopes = [(loss(scale + step * e) - loss(scale - step * e)) / (2 * step) for e in jnp.eye(2)[:, None]]
    gradient = jax.grad(loss)(scale)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[0], slopes, rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_gradients_hold_the_mask_fixed():
    """No gradient reaches the threshold. The scale has a gradient where the mask is open; at scale 0, the mask is open
    everywhere."""
    preds = jax.tree.map(lambda p: jnp.asarray(p[0]), predictions(np.random.default_rng(16), 1, 1))
    settings = Edits.stack([[Edit("a", warmup=0)]])

    def added(scale, threshold):
        guidance = sega(settings._replace(scale=scale[None, None], threshold=threshold[None, None]))
        return guidance.update(jnp.zeros_like(preds.uncond), guidance.init(preds), preds)[0]

    at, direction = (jnp.asarray(3.0), jnp.asarray(0.5)), preds.edits[:, 0] - preds.uncond
    by_scale, by_threshold = jax.jacobian(added, (0, 1))(*at)
    close(by_scale, jnp.where(added(*at) != 0, direction, 0))
    assert not by_threshold.any()
    assert (added(at[0], jnp.asarray(0.6)) != added(*at)).any()
    close(jax.jacobian(added)(jnp.asarray(0.0), at[1]), direction)


def test_new_settings_do_not_recompile_if_they_are_arguments():
    preds = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.float32), predictions(np.random.default_rng(17), 1, 1))
    settings = Edits.stack([[Edit("a", scale=5.25)]])

    def guided(preds, edits):
        return sega(edits).update(preds.uncond, sega(edits).init(preds), preds)[0]

    by_argument = jax.jit(guided)
    for scale in (5.25, -2.0):
        by_argument(preds, settings._replace(scale=np.full((1, 1), scale)))
    assert by_argument._cache_size() == 1
    assert "5.25" not in by_argument.lower(preds, settings).as_text()
    assert "5.25" in jax.jit(lambda preds: guided(preds, settings)).lower(preds).as_text()


RULES = {
    "cfg": lambda: cfg(7.5),
    "rescale": lambda: rescale(0.7),
    "replay": lambda: replay(np.ones((2, 1, *SPACE), np.float32)),
    "sega": lambda: sega(Edits.stack([[Edit("a", warmup=0)]] * 2)),
}


@pytest.mark.parametrize("name", [*RULES, "chain"])
def test_rules_name_their_arguments_as_optax_does(name):
    rule = optax.chain(*(make() for make in RULES.values())) if name == "chain" else RULES[name]()
    preds = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.float32), predictions(np.random.default_rng(18), 2, 1))
    state = rule.init(params=preds)
    by_name, _ = rule.update(updates=preds.uncond, state=state, params=preds)
    assert np.array_equal(by_name, rule.update(preds.uncond, state, preds)[0])


@pytest.mark.parametrize("name", ["cfg", "rescale", "sega", "chain"])
def test_missing_predictions_are_an_error(name):
    rule = optax.chain(*(make() for make in RULES.values())) if name == "chain" else RULES[name]()
    preds = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.float32), predictions(np.random.default_rng(18), 2, 1))
    with pytest.raises(ValueError, match=r"need the predictions as params; call update\(estimate, state, predictions"):
        rule.update(preds.uncond, rule.init(preds))


def test_rules_without_concepts_need_no_predictions_for_them():
    preds = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.float32), predictions(np.random.default_rng(19), 2, 1))
    alone = Predictions(preds.uncond, preds.cond)
    for name in ("cfg", "rescale", "replay"):
        rule = RULES[name]()
        results = [rule.update(of.uncond, rule.init(of), of)[0] for of in (alone, preds)]
        assert np.array_equal(*results), name
    rule = RULES["sega"]()
    with pytest.raises(ValueError, match="sega needs the predictions for its concepts"):
        rule.init(alone)
    with pytest.raises(ValueError, match="sega needs the predictions for its concepts"):
        rule.update(alone.uncond, rule.init(preds), alone)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_replay_adds_the_record(dtype):
    """Covers row 6 of the table of differences: the record may have any dtype, and calls after its end add nothing."""
    rng = np.random.default_rng(13)
    recorded = rng.standard_normal((2, 2, *SPACE)).astype(dtype)
    preds = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.float32), predictions(rng, 2, 1))
    guidance = replay(recorded)
    state = guidance.init(preds)
    for i in range(3):
        estimate, state = guidance.update(preds.uncond, state, preds)
        added = recorded[:, i].astype(np.float32) if i < 2 else 0
        assert np.array_equal(estimate, np.asarray(preds.uncond) + added)


@pytest.mark.parametrize(("name", "known"), [("semantics", "per_concept"), ("support", "pixel")])
def test_errors_list_the_known_choices(name, known):
    with pytest.raises(ValueError, match=f"{name}='both' should be one of .*{known}"):
        sega(Edits.stack([[Edit("a")]]), **{name: "both"})


@pytest.mark.parametrize(
    ("field", "values", "remedy"),
    [
        ("scale", [np.nan, np.inf], "a negative scale removes"),
        ("threshold", [-0.1, 1.1, np.nan], r"in \[0, 1\]"),
        ("warmup", [-1, 2**31], f"from 0 to {NEVER}"),
        ("cooldown", [-1, 2**31], f"from 0 to {NEVER}"),
        ("weight", [-1, np.nan, np.inf], "negative scale"),
        ("momentum_scale", [-0.1, 1.1, np.nan], r"in \[0, 1\]; leave it out to use the call's value"),
        ("momentum_beta", [-0.1, 1.1, np.nan], r"in \[0, 1\]; leave it out to use the call's value"),
    ],
)
def test_edit_rejects_values_out_of_range(field, values, remedy):
    for value in values:
        with pytest.raises(ValueError, match=f"'glasses': {field}=.*{remedy}"):
            Edit("glasses", **{field: value})


@pytest.mark.parametrize("field", Edit.__dataclass_fields__)
def test_edit_rejects_values_of_the_wrong_type(field):
    optional = {"threshold", "warmup", "cooldown", "momentum_scale", "momentum_beta"}
    integer = {"warmup", "cooldown"}
    wrong = [{1.0}, True, 1j, {}, *([] if field in optional else [None]), *([1.5] if field in integer else [])]
    wrong += [] if field == "concept" else ["1"]
    for value in wrong:
        with pytest.raises(TypeError, match=f"{field}=.* should be "):
            Edit(**{"concept": "glasses"} | {field: value})


@pytest.mark.parametrize("concept", [np.zeros(3), np.zeros((1, 2, 3)), [[1.0], [1.0, 2.0]]], ids=["1d", "3d", "ragged"])
def test_edit_rejects_embeddings_that_are_not_matrices(concept):
    with pytest.raises((TypeError, ValueError), match=r"Edit: concept.*\(tokens, channels\)"):
        Edit(concept)


def test_edit_rejects_embeddings_that_are_not_finite():
    with pytest.raises(ValueError, match="concept has NaN or infinite entries"):
        Edit(np.array([[1.0, np.nan]]))


def test_edit_accepts_numpy_numbers():
    edit = Edit("a", scale=np.float32(2), warmup=np.int64(3), threshold=0, weight=1)
    assert (edit.scale, edit.warmup, edit.threshold, edit.weight) == (2.0, 3, 0.0, 1.0)
    assert type(edit.warmup) is int


def test_rescale_is_its_formula():
    """Each row has its own rescale factor, and a factor of 0 leaves the estimate exactly as it was."""
    preds = jax.tree.map(lambda p: np.float32(p[0]), predictions(np.random.default_rng(0), 3, 1))
    shares = np.float32([0, 0.7, 1])
    plain, state = cfg(7.5).update(preds.uncond, optax.EmptyState(), preds)
    guided, _ = rescale(shares).update(plain, state, preds)
    assert np.array_equal(guided[0], plain[0])
    for i in (1, 2):
        ratio = np.std(preds.cond[i], ddof=1) / np.std(plain[i], ddof=1)
        expected_row = shares[i] * plain[i] * ratio + (1 - shares[i]) * plain[i]
        np.testing.assert_allclose(guided[i], expected_row, rtol=1e-5)
    np.testing.assert_allclose(np.std(guided[2]), np.std(preds.cond[2]), rtol=1e-5)


def test_rescale_has_a_finite_gradient_where_a_row_is_constant():
    """Such a row has a standard deviation of 0, and the square root has an infinite derivative at 0."""

    def total(cond, scale):
        preds = Predictions(jnp.zeros_like(cond), cond, jnp.zeros((1, 0, 2, 2, 1)))
        guidance = optax.chain(cfg(scale), rescale(0.7))
        return guidance.update(preds.uncond, guidance.init(preds), preds)[0].sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.ones((1, 2, 2, 1)), 7.5):
        assert np.isfinite(gradient).all()


def test_rescale_keeps_zeros():
    zeros = Predictions(*[jnp.zeros((1, 2, 2, 1))] * 2, jnp.zeros((1, 0, 2, 2, 1)))
    assert not np.any(rescale(1.0).update(zeros.uncond, optax.EmptyState(), zeros)[0])
