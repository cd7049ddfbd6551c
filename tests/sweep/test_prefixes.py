"""Tests that sharing prefixes does not change a sweep's pictures, and that exactly the planned evaluations run."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import jax
import numpy as np
import pytest
from support import tiny
from support.sweeping import Pictures, make_pictures, run_and_crash, saved

import sega_jax
from sega_jax import sweep
from sega_jax.pipelines import run as running
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.running.prefixes import _SETTINGS, _Shared, _submit
from sega_jax.sweep.running.run import _Run
from sega_jax.systems import programs

MOMENTUM = {"momentum_scale": 1.0, "momentum_beta": 0.3}  # large, so that mixing up pictures' momenta would be noticed
EDITS = {"hat": {"threshold": 0.5}, "bow": {"concept": "apple", "warmup": 3, "threshold": 0.3}}
EDITS = {name: edit | MOMENTUM for name, edit in EDITS.items()}
GRID = {"seed": range(3), "hat.warmup": [1, 4]}


def planned(folder, share, scales=(0, 3, -5), cooldown=5, **call):
    ablation = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat", "steps": 7} | call,
        edits=EDITS | {"bow": EDITS["bow"] | {"cooldown": cooldown}},
        grid=GRID | {"hat.scale": list(scales)},
    )
    return sweep.plan(ablation, sweep.Facts.of(ablation), rows=2, share=share)


def check(plans, pipe, share=0.8):
    (separate, evaluations), (shared, fewer_evaluations) = (make_pictures(plan, pipe) for plan in plans)
    assert separate.keys() == shared.keys()
    assert len({image.tobytes() for image in separate.values()}) >= 12
    for name, image in separate.items():
        difference = abs(image.astype(int) - shared[name].astype(int))
        assert (difference > 1).mean() < 1e-3
    assert [plan.counts.evaluations for plan in plans] == [evaluations, fewer_evaluations]
    assert plans[1].counts.shared <= fewer_evaluations < share * evaluations


def test_sharing_makes_the_same_pictures(least, least_folder):
    check([planned(least_folder, share, eta=0.5) for share in (False, True)], least)


@pytest.mark.slow
def test_multistep_solver_and_per_concept_warmup_on_two_devices(least_folder):
    pipe = sega_jax.load(least_folder, devices=jax.local_devices()[:2])
    call = {"semantics": "per_concept", "scheduler": "DPMSolverMultistepScheduler", "scales": (3, -5), "cooldown": None}
    check([planned(least_folder, share, **call) for share in (False, True)], pipe, 0.9)


def test_a_late_departure_changes_pictures(least, least_folder, monkeypatch):
    expected, _ = make_pictures(planned(least_folder, True), least)
    departure = sharing.departure
    monkeypatch.setattr(sharing, "departure", lambda point, calls: min(departure(point, calls) + 1, calls))
    late, _ = make_pictures(planned(least_folder, True), least)
    assert sum(not np.array_equal(expected[name], late[name]) for name in expected) > 6


def test_resuming_after_a_crash(least, least_folder, tmp_path):
    """If a run crashes between two pictures and is resumed, the pictures are bit-identical."""
    plan = planned(least_folder, True)
    expected, _ = make_pictures(plan, least)
    run_and_crash(plan, tmp_path, least, 15)
    assert 0 < sweep.status(tmp_path).done < 18
    sweep.run(plan, tmp_path, least)
    resumed = saved(plan, tmp_path)
    assert resumed.keys() == expected.keys()
    for name, image in resumed.items():
        np.testing.assert_array_equal(image, expected[name])


def test_finished_forks_survive_an_interruption(least, least_folder, tmp_path, monkeypatch):
    """If Ctrl-C interrupts a batch, the pictures of all finished forks are kept. The next run computes the trunks and
    the other forks, writes no picture twice, and gives no warnings."""
    plan, finish = planned(least_folder, True), _Shared._finish
    expected, _ = make_pictures(plan, least)
    forks = plan.schedules[0].forks
    assert len(forks) > 3
    finished = []

    def interrupted(batch, begun, fork):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(fork)
        return finish(batch, begun, fork)

    with monkeypatch.context() as patched:
        patched.setattr(_Shared, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(plan, tmp_path, least)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    # The pictures of the second fork may not have been fetched yet.
    assert len(forks[0].members) <= len(kept) <= sum(len(fork.members) for fork in forks[:2])
    status = sweep.status(tmp_path)
    assert (status.done, status.batches_done) == (len(kept), 0)
    finished.clear()
    with monkeypatch.context() as patched:
        patched.setattr(_Shared, "_finish", lambda *args: (finished.append(args[2]), finish(*args))[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sweep.run(plan, tmp_path, least)
    names = {path.name for path in kept}
    written = [fork for fork in forks if {plan.files[plan.batches[0].names[i]] for i in fork.members} <= names]
    assert written
    assert finished[: len(forks) - len(written)] == [fork for fork in forks if fork not in written]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name, image in saved(plan, tmp_path).items():
        np.testing.assert_array_equal(image, expected[name])


def test_forks_are_prepared_and_fetched_in_parallel(least, least_folder, monkeypatch):
    """Each fork waits until the next fork has begun and the previous one has been fetched. A sequential run would
    time out."""
    plan = planned(least_folder, True)
    expected, _ = make_pictures(plan, least)
    begin, finish, place = (getattr(_Shared, name) for name in ("_begin", "_finish", "_place"))
    counts, changed, before = {"begun": 0, "placed": 0}, threading.Condition(), [0]

    def count(name):
        with changed:
            counts[name] += 1
            changed.notify_all()

    def beginning(batch, *args):
        out = begin(batch, *args)
        count("begun")
        return out

    def placing(batch, *args):
        place(batch, *args)
        count("placed")

    def finishing(batch, begun, fork):
        at, total = batch.schedule.forks.index(fork), len(batch.schedule.forks)
        with changed:
            before[0] = counts["placed"] if at == 0 else before[0]
            begun_by_now, placed_by_now = before[0] + min(at + 2, total), before[0] + at
            assert changed.wait_for(
                lambda: counts["begun"] >= begun_by_now and counts["placed"] >= placed_by_now, timeout=60
            )
        return finish(batch, begun, fork)

    for name, patched in (("_begin", beginning), ("_finish", finishing), ("_place", placing)):
        monkeypatch.setattr(_Shared, name, patched)
    images, _ = make_pictures(plan, least)
    assert all(np.array_equal(image, expected[name]) for name, image in images.items())


def test_threads_have_the_callers_jax_settings():
    def settings():
        return jax.device_put(np.zeros(1)).dtype, *(getattr(jax.config, name) for name in _SETTINGS)

    changes = (
        jax.enable_x64(True),
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("warn"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    )
    assert len(changes) == len(_SETTINGS)
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        before = settings()
        assert _submit(pool, settings).result() == before
        for change in changes:
            stack.enter_context(change)
        assert all(a != b for a, b in zip(settings(), before, strict=True))
        assert _submit(pool, settings).result() == settings()
        assert pool.submit(settings).result() == before


def test_a_failed_fetch_stops_the_sweep(least, least_folder, tmp_path, monkeypatch):
    """The sweep stops after at most one more fork."""
    plan, finish, count = planned(least_folder, True), _Shared._finish, []
    assert len(plan.schedules[0].forks) > 3

    def finishing(*args):
        count.append(1)
        return finish(*args)

    def fetching(*_):
        raise OSError("no more")

    monkeypatch.setattr(_Shared, "_finish", finishing)
    monkeypatch.setattr(running, "fetch", fetching)
    with pytest.raises(OSError, match="no more"):
        sweep.run(plan, tmp_path, least)
    assert len(count) == 2


@pytest.mark.slow
def test_running_out_of_memory_at_a_departure(least, least_folder, tmp_path, monkeypatch):
    """The test raises the error that XLA raises when it runs out of memory."""
    real = Devices.map

    def full(devices, function, *args, **static):
        program = real(devices, function, *args, **static)

        def run(*given):
            if len(given[1]) > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return program(*given)

        return run if function is programs.fork else program

    monkeypatch.setattr(Devices, "map", full)
    with pytest.warns(UserWarning, match="2 rows of .* do not fit into memory"):
        sweep.run(planned(least_folder, True), tmp_path, least)
    assert {row["rows"] for row in sweep.Results(tmp_path).rows} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_begin", "_finish", "_place"])
def test_interruption_and_lack_of_memory(least, least_folder, tmp_path, monkeypatch, where):
    """An interrupted sweep is resumed, and runs out of memory in the method where it was interrupted. It continues with
    half as many rows and makes the same pictures."""
    plan = planned(least_folder, True)
    expected, _ = make_pictures(plan, least)
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
    with pytest.warns(UserWarning, match="2 rows of .* do not fit into memory"):
        assert sweep.run(plan, tmp_path, least).batches_done == len(plan.batches)
    # The pictures from before the interruption are kept. They were made with two rows.
    assert {row["rows"] for row in sweep.Results(tmp_path).rows} in ({1}, {1, 2})
    for name, image in saved(plan, tmp_path).items():
        difference = abs(image.astype(int) - expected[name].astype(int))
        assert (difference > 1).mean() < 1e-3


@pytest.mark.slow
def test_nothing_compiles_after_the_first_batch(tmp_path, one_device, compilations, monkeypatch):
    """Only the first batch of each program is compiled, regardless of departures, cool-downs, steps and seeds. Covers a
    safety checker, padded forks, and runs with and without sharing."""
    text = tiny.TEXT | {"num_hidden_layers": 1}
    folder = tiny.checkpoint(tmp_path / "a", unet=tiny.UNET_0, vae=tiny.VAE_1, text=text, safety=tiny.SAFETY)
    ablation = sweep.Sweep(
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
    plan = sweep.plan(ablation, sweep.Facts.of(ablation), rows=2)
    assert {len(fork.members) for one in plan.schedules.values() for fork in one.forks} == {1, 2}
    pipe = sega_jax.load(folder, devices=one_device)
    assert pipe.safety is not None
    check, checked_rows = running.check_pictures, set()

    def looking(safety, devices, images, finite):
        checked_rows.add(len(images))
        return check(safety, devices, images, finite)

    monkeypatch.setattr(running, "check_pictures", looking)
    sweeping = _Run(plan, None, sega_jax.Pipeline(**pipe.components))
    seen, after = set(), []
    for batch in plan.batches:
        compilations.clear()
        sweeping._make(batch, sweeping._points(batch), Pictures(batch.names, {}))
        after += [len(compilations)] if batch.compiled in seen else []
        assert (batch.compiled in seen) or compilations
        seen.add(batch.compiled)
    assert len(after) >= 4
    assert not any(after)
    assert checked_rows == {2}
    assert sweeping.shared.evaluations == plan.counts.evaluations


def test_plan_with_sharing_json_round_trip(least_folder):
    plan = planned(least_folder, True)
    assert sweep.Plan.from_json(plan.to_json()) == plan
    assert plan != planned(least_folder, False)
