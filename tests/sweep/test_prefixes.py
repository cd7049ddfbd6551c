"""Sweeps that compute once what pictures have in common: the same pictures, with as many evaluations as planned."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.sweeping import make_pictures, run_and_crash

import sega_jax
from sega_jax import sweep
from sega_jax.pipelines import run as running
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.running.prefixes import _SETTINGS, _Shared, _submit
from sega_jax.sweep.running.run import _Run
from sega_jax.systems import programs

MOMENTUM = {"momentum_scale": 1.0, "momentum_beta": 0.3}  # so much that it shows whose it is
EDITS = {"hat": {"threshold": 0.5}, "bow": {"concept": "apple", "warmup": 3, "threshold": 0.3}}
EDITS = {name: edit | MOMENTUM for name, edit in EDITS.items()}
GRID = {"seed": range(3), "hat.warmup": [1, 4]}


def planned(folder, share, scales=(0, 3, -5), cooldown=5, **call):
    said = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat", "steps": 7} | call,
        edits=EDITS | {"bow": EDITS["bow"] | {"cooldown": cooldown}},
        grid=GRID | {"hat.scale": list(scales)},
    )
    return sweep.plan(said, sweep.Facts.of(said), rows=2, share=share)


def check(plans, pipe, share=0.8):
    (apart, all_of_them), (together, some) = (make_pictures(plan, pipe) for plan in plans)
    assert apart.keys() == together.keys()
    assert len({image.tobytes() for image in apart.values()}) >= 12
    for name, image in apart.items():
        off = abs(image.astype(int) - together[name].astype(int))
        assert (off > 1).mean() < 1e-3
    assert [plan.counts.evaluations for plan in plans] == [all_of_them, some]
    assert plans[1].counts.shared <= some < share * all_of_them


def test_pictures_are_the_same(least, least_folder):
    check([planned(least_folder, share, eta=0.5) for share in (False, True)], least)


@pytest.mark.slow
def test_with_a_solver_that_remembers_and_clocks_of_their_own_on_two_devices(least_folder):
    pipe = sega_jax.load(least_folder, devices=jax.local_devices()[:2])
    call = {"semantics": "per_concept", "scheduler": "DPMSolverMultistepScheduler", "scales": (3, -5), "cooldown": None}
    check([planned(least_folder, share, **call) for share in (False, True)], pipe, 0.9)


def test_a_late_departure_is_seen(least, least_folder, monkeypatch):
    usual, _ = make_pictures(planned(least_folder, True), least)
    departure = sharing.departure
    monkeypatch.setattr(sharing, "departure", lambda point, calls: min(departure(point, calls) + 1, calls))
    late, _ = make_pictures(planned(least_folder, True), least)
    assert sum(not np.array_equal(usual[name], late[name]) for name in usual) > 6


def test_resumed_after_a_crash(least, least_folder, tmp_path):
    """In the second of two batches, to the same bits."""
    plan = planned(least_folder, True)
    usual, _ = make_pictures(plan, least)
    run_and_crash(plan, tmp_path, least, 15)
    assert sweep.status(tmp_path).batches_done == 1
    sweep.run(plan, tmp_path, least)
    found = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "pictures").iterdir()}
    assert found.keys() == usual.keys()
    for name, image in found.items():
        np.testing.assert_array_equal(image, usual[name])


def test_the_next_branch_begins_and_the_last_is_fetched_meanwhile(least, least_folder, monkeypatch):
    """Each waits here for what a way of one after another would do only later."""
    plan = planned(least_folder, True)
    usual, _ = make_pictures(plan, least)
    fork, branch, place = (getattr(_Shared, name) for name in ("_fork", "_branch", "_place"))
    counts, changed, before = {"begun": 0, "placed": 0}, threading.Condition(), [0]

    def count(name):
        with changed:
            counts[name] += 1
            changed.notify_all()

    def forking(batch, *args):
        out = fork(batch, *args)
        count("begun")
        return out

    def placing(batch, *args):
        place(batch, *args)
        count("placed")

    def making(batch, begun, one):
        at, total = batch.schedule.branches.index(one), len(batch.schedule.branches)
        with changed:
            before[0] = counts["placed"] if at == 0 else before[0]
            begun_by_now, placed_by_now = before[0] + min(at + 2, total), before[0] + at
            assert changed.wait_for(
                lambda: counts["begun"] >= begun_by_now and counts["placed"] >= placed_by_now, timeout=60
            )
        return branch(batch, begun, one)

    for name, patched in (("_fork", forking), ("_branch", making), ("_place", placing)):
        monkeypatch.setattr(_Shared, name, patched)
    found, _ = make_pictures(plan, least)
    assert all(np.array_equal(image, usual[name]) for name, image in found.items())


def test_threads_are_set_as_the_sweep_is():
    def found():
        return jax.device_put(np.zeros(1)).dtype, *(getattr(jax.config, name) for name in _SETTINGS)

    others = (
        jax.enable_x64(True),
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("warn"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    )
    assert len(others) == len(_SETTINGS)
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        before = found()
        assert _submit(pool, found).result() == before
        for other in others:
            stack.enter_context(other)
        assert all(a != b for a, b in zip(found(), before, strict=True))
        assert _submit(pool, found).result() == found()
        assert pool.submit(found).result() == before


def test_a_failed_fetch_stops_the_sweep(least, least_folder, tmp_path, monkeypatch):
    """Before the branch after the next is made."""
    plan, branch, count = planned(least_folder, True), _Shared._branch, []
    assert len(plan.schedules[0].branches) > 3

    def making(*args):
        count.append(1)
        return branch(*args)

    def fetching(*_):
        raise OSError("no more")

    monkeypatch.setattr(_Shared, "_branch", making)
    monkeypatch.setattr(running, "fetch", fetching)
    with pytest.raises(OSError, match="no more"):
        sweep.run(plan, tmp_path, least)
    assert len(count) == 2


@pytest.mark.slow
def test_rows_that_the_memory_does_not_hold_at_their_departure(least, least_folder, tmp_path, monkeypatch):
    """As XLA says it."""
    real = Devices.map

    def full(devices, function, *args, **static):
        program = real(devices, function, *args, **static)

        def run(*given):
            if len(given[1]) > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return program(*given)

        return run if function is programs.fork else program

    monkeypatch.setattr(Devices, "map", full)
    with pytest.warns(UserWarning, match="the memory does not hold 2 rows"):
        sweep.run(planned(least_folder, True), tmp_path, least)
    assert {row["rows"] for row in sweep.Results(tmp_path).rows} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_fork", "_branch", "_place"])
def test_interrupted_or_out_of_memory(least, least_folder, tmp_path, monkeypatch, where):
    """In a thread or between them: the sweep stops, goes on with half of the rows, and has the same pictures."""
    plan = planned(least_folder, True)
    usual, _ = make_pictures(plan, least)
    real = getattr(_Shared, where)

    def stopped(error):
        left = iter(range(2))

        def stop(*args):
            if next(left, None) is None:
                monkeypatch.setattr(_Shared, where, real)
                raise error
            return real(*args)

        monkeypatch.setattr(_Shared, where, stop)

    stopped(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sweep.run(plan, tmp_path, least)
    stopped(MemoryError())
    with pytest.warns(UserWarning, match="the memory does not hold 2 rows"):
        assert sweep.run(plan, tmp_path, least).batches_done == len(plan.batches)
    assert {row["rows"] for row in sweep.Results(tmp_path).rows} == {1}
    for path in (tmp_path / "pictures").iterdir():
        off = abs(np.asarray(Image.open(path)).astype(int) - usual[path.stem].astype(int))
        assert (off > 1).mean() < 1e-3


@pytest.mark.slow
def test_nothing_compiles_after_the_first_batch(tmp_path, one_device, compilations, monkeypatch):
    """Of each program: with other departures, cool-downs, steps, seeds and words, with a safety checker and branches
    that are not full, and sharing or not."""
    text = tiny.TEXT | {"num_hidden_layers": 1}
    folder = tiny.checkpoint(tmp_path / "a", unet=tiny.UNET_0, vae=tiny.VAE_1, text=text, safety=tiny.SAFETY)
    said = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat"},
        edits=EDITS,
        grid={"steps": [5, 7], "seed": range(3)},
        zip={
            "hat.scale": [0, 3, 4, 3, 3],
            "hat.warmup": [1, 2, 3, 1, 1],
            "bow.cooldown": [None, 4, None, 5, None],
            "guidance_scale": [3.0, 3.0, 3.0, 3.0, 4.0],
        },
    )
    plan = sweep.plan(said, sweep.Facts.of(said), rows=2)
    assert {len(branch.members) for one in plan.schedules.values() for branch in one.branches} == {1, 2}
    pipe = sega_jax.load(folder, devices=one_device)
    assert pipe.safety is not None
    check, looked = running.check_pictures, set()

    def looking(safety, devices, images, finite):
        looked.add(len(images))
        return check(safety, devices, images, finite)

    monkeypatch.setattr(running, "check_pictures", looking)
    sweeping = _Run(plan, None, sega_jax.Pipeline(**pipe.components))
    seen, after = set(), []
    for batch in plan.batches:
        compilations.clear()
        sweeping._make(batch, sweeping._points(batch), lambda *picture: None)
        after += [len(compilations)] if batch.compiled in seen else []
        assert (batch.compiled in seen) or compilations
        seen.add(batch.compiled)
    assert len(after) >= 4
    assert not any(after)
    assert looked == {2}
    assert sweeping.shared.evaluations == plan.counts.evaluations


def test_a_plan_that_shares_is_read_back(least_folder):
    plan = planned(least_folder, True)
    assert sweep.Plan.from_json(plan.to_json()) == plan
    assert plan != planned(least_folder, False)
