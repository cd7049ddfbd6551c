"""Faults made on purpose in sweeps: each breaks a promise that the tests hold them to."""

import time

import numpy as np
import pytest
import test_sweep_plan
import test_sweep_results
import test_sweep_shared
import test_sweep_sharing
from test_mutations import damage
from test_sweep_results import folder as folder

from sega_jax import Edit, sweep
from sega_jax.sweep.description import points
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.reporting import metrics, plots
from sega_jax.sweep.reporting.sheets import _values, sheets
from sega_jax.sweep.running import store
from sega_jax.sweep.running.leases import Leases
from sega_jax.sweep.running.prefixes import SharedPipeline, _submit

pytestmark = pytest.mark.fault


def shared(_):
    group = test_sweep_sharing.points("diffusers")
    apart = [test_sweep_sharing.one_by_one(made) for made in group]
    test_sweep_sharing.test_shared_work_makes_the_same_pictures(group, apart)


def planned(_):
    """As many concepts are predicted as some row needs, and no more."""
    facts, trunk = test_sweep_sharing.FACTS, test_sweep_sharing.points("diffusers")[0]
    group = [
        trunk._replace(edits={"a": Edit("a", warmup=2, cooldown=5)}),
        trunk._replace(edits={"a": Edit("a", scale=0)}),
    ]
    first, last = sharing.schedule(group, 12, 2).branches
    assert (first.start, first.concepts) == (2, (1,) * 3 + (0,) * 7)
    assert (last.start, last.concepts) == (12, ())
    assert facts.calls(trunk) == 12


def named(_):
    test_sweep_plan.test_names_are_of_what_decides_a_picture()
    test_sweep_plan.test_names_do_not_depend_on_how_a_picture_is_said()


def written(tmp_path):
    """A file is whole or not there, and made once."""
    where = store.store(tmp_path)
    where.create("a", b"1")
    with pytest.raises(FileExistsError):
        where.create("a", b"2")
    assert where.read("a") == b"1"
    where.write("a", b"3")
    assert where.read("a") == b"3"
    assert where.names("") == {"a"}


def leased(tmp_path):
    """A share is waited for as long as its worker lives, then taken."""
    where = store.store(tmp_path)
    where.begin(("leases",))
    with Leases(where, 1, 2, patience=0.2) as theirs, Leases(where, 0, 2, patience=0.2) as mine:
        held, taken = theirs.shares(lambda: {1}), mine.shares(lambda: {1})
        next(held)
        time.sleep(0.3)
        assert not mine._stale(1)
        time.sleep(0.3)
        assert not mine._stale(1)
        theirs._ended.set()
        time.sleep(0.3)
        mine._stale(1)
        time.sleep(0.25)
        assert mine._stale(1)
        assert theirs.holds()
        next(taken)
        assert not theirs.holds()


@pytest.fixture(scope="module")
def both(least, least_folder):
    """What a plan makes one by one, the plan that shares, and a pipeline."""
    apart, together = (test_sweep_shared.planned(least_folder, share, eta=0.5) for share in (False, True))
    return test_sweep_shared.made(apart, least)[0], together, least


def branched(both):
    apart, together, pipe = both
    found, _ = test_sweep_shared.made(together, pipe)
    for name, image in apart.items():
        assert (abs(image.astype(int) - found[name].astype(int)) > 1).mean() < 1e-3


def threaded(_):
    test_sweep_shared.test_threads_are_set_as_the_sweep_is()


def shown(where):
    test_sweep_results.test_a_sheet_has_each_picture_at_its_place(sweep.Results(where))


def drawn(where):
    test_sweep_results.test_a_plot_is_of_means(where, None)


def apart(where):
    results = sweep.Results(where)
    rows = results.where({"prompt": "a cat", "seed": 1, "hat.warmup": 2})
    images = np.stack([np.asarray(results.picture(row)) for row in rows])
    found = dict(zip([row["hat.scale"] for row in rows], sweep.distance(results)(images, rows), strict=True))
    assert found[0.0] <= found[4.0] < 1
    assert found[-2.0] > 0.1


# The promise, the function, a piece of its source and what takes its place.
FAULTS = {
    "names of any seed": (named, points.name, "made._asdict() |", "made._replace(seed=0)._asdict() |"),
    "names that forget the model": (named, points.name, '"model": dict(facts.model)', '"model": {}'),
    "a departure too late": (shared, sharing.departure, "edit.warmup for", "edit.warmup + 1 for"),
    "a concept left out too early": (
        shared,
        sharing.asked,
        "min(edit.cooldown, calls)",
        "min(edit.cooldown, calls) - 1",
    ),
    "a concept left out a call too late": (planned, sharing.schedule, "calls)[start:]", "calls)[start - 1 :]"),
    "all branches from one trunk": (branched, SharedPipeline._depart, "trunk.row_of[i]", "0"),
    "concepts in the trunk's order": (
        branched,
        SharedPipeline._depart,
        "trunk.concepts[row].index(edit.concept) for edit in edits",
        "k for k, _ in enumerate(edits)",
    ),
    "momentum of a call fewer": (branched, SharedPipeline._depart, "branch.start, split", "branch.start - 1, split"),
    "pictures in rising order": (branched, SharedPipeline._place, "list(branch.members)", "sorted(branch.members)"),
    "threads of their own mind": (threaded, _submit, "in here.items()", "in ()"),
    "a file over another": (written, store._Local._link, "os.link", "os.replace"),
    "a file left beside": (written, store._Local._place, "temporary.unlink(missing_ok=True)", "pass"),
    "no sign of life": (leased, Leases._beat, "self._write()", "pass"),
    "a lease that never ends": (leased, Leases._stale, ">= self._patience", ">= 1e9"),
    "a lease of anybody": (leased, Leases.holds, 'lease["token"] == self._me["token"]', "True"),
    "axes the other way": (
        shown,
        sheets,
        "(across, columns), (down, lines)",
        "(down, lines), (across, columns)",
    ),
    "values as they come": (shown, _values, "return sorted(values) if", "return values if True or"),
    "means over all": (drawn, plots._means, "row.get(x) == value for", "True for"),
    "the distance to an edited one": (apart, metrics.distance, "and not edited(row)", "and edited(row)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, folder, both, tmp_path, monkeypatch):
    promise, *fault = FAULTS[name]
    where = both if promise is branched else folder if promise in (shown, drawn, apart) else tmp_path
    promise(where)
    damage(monkeypatch, *fault)
    (again := tmp_path / "again").mkdir()
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        promise(again if where == tmp_path else where)
