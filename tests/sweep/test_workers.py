"""Tests that several workers share a sweep: they make all pictures and record each picture once, even if some workers
die early."""

import json
import os
import socket
import threading
import time

import pytest
from support import sweeping
from support.sweeping import hat_plan, same

from sega_jax import sweep
from sega_jax.sweep.running import leases, store
from sega_jax.sweep.running.leases import Leases
from sega_jax.sweep.running.store import Store, host


@pytest.fixture(scope="module")
def plan(least_folder):
    return hat_plan(least_folder, 4, [-4, 2, 3], share=False)


@pytest.fixture(scope="module")
def done(plan, least, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    sweep.run(plan, folder, least)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("workers", [2, 3])
def test_other_workers_finish_a_killed_workers_share(plan, done, tmp_path, workers):
    """The processes communicate only through the folder."""
    sweep.keep(plan, tmp_path)
    processes = [sweeping.start(tmp_path, 1, workers, 4)]
    processes += [sweeping.start(tmp_path, worker, workers) for worker in range(2, workers + 1)]
    output = [process.communicate()[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [-9] + [0] * (workers - 1), output
    # The files that the killed worker was writing stay until the next run.
    left = [path for folder in ("pictures", "records") for path in (tmp_path / folder).glob(".*")]
    assert left
    assert sweep.run(plan, tmp_path).done == 12
    assert not any(path.exists() for path in left)
    same(tmp_path, done)


def test_a_folder_that_another_process_removes_is_created_again(plan, tmp_path, monkeypatch):
    """The other process cannot write its plan, and removes the folder while it is empty."""
    write, removals = store.write_file, iter(range(2))

    def late(path, *arguments, **options):
        if next(removals, None) is not None:
            path.parent.rmdir()
            path.parent.parent.rmdir()
        write(path, *arguments, **options)

    monkeypatch.setattr(store, "write_file", late)
    sweep.keep(plan, tmp_path / "new" / "folder")
    assert next(removals, None) is None
    assert sweep.kept(tmp_path / "new" / "folder") == plan


def test_shares_cover_all_batches(plan):
    for workers in (1, 2, 3, 6, 7, 40):
        shares = plan.shares(workers)
        assert len(shares) == workers
        assert [number for share in shares for number in share] == list(range(6))
        assert max(map(len, shares)) <= -(-6 // workers)


@pytest.mark.slow
def test_the_share_of_an_absent_worker_is_taken(plan, done, least, tmp_path):
    """The share is taken after `patience` seconds, and not earlier."""
    began = time.monotonic()
    assert sweep.run(plan, tmp_path, least, worker=(2, 2), patience=0.5).done == 12
    assert time.monotonic() - began >= 0.5
    same(tmp_path, done)


def test_a_sweep_at_an_address(plan, done, least):
    import fsspec

    files = fsspec.filesystem("memory")
    address = "memory://bucket/sweep"
    assert sweep.run(plan, address, least).done == 12
    assert sweep.status(address) == (12, 12, 6, 6, 0)
    theirs = {path.name: path.read_bytes() for path in (done / "pictures").iterdir()}
    assert {
        path.rpartition("/")[2]: files.cat_file(path) for path in files.ls("/bucket/sweep/pictures", False)
    } == theirs
    gone = files.ls("/bucket/sweep/pictures", False)[0]
    files.rm_file(gone)
    assert sweep.status(address).done == 11
    with pytest.warns(UserWarning, match="is missing"):
        assert sweep.run(plan, address, least).done == 12
    assert files.cat_file(gone) == theirs[gone.rpartition("/")[2]]
    with pytest.raises(ValueError, match="contains a different sweep"):
        sweep.run(sweep.plan(plan.sweep, plan.facts, rows=3), address, least)
    with pytest.raises(ValueError, match="nowhere://a cannot be reached"):
        sweep.status("nowhere://a")


class Alive:
    """The lease of another worker, by default on another machine. Calling it renews the lease."""

    def __init__(self, where, share, host="elsewhere", process=1):
        self.where, self.name, self.beat = where, f"leases/share-{share + 1}-of-3.json", 0
        self.lease = {"host": host, "process": process, "token": "theirs"}
        self()

    def __call__(self):
        self.beat += 1
        self.where.write(self.name, json.dumps(self.lease | {"beat": self.beat}).encode())


@pytest.fixture
def where(tmp_path):
    store = Store(tmp_path)
    store.begin(("leases",))
    return store


@pytest.mark.slow
def test_shares_of_live_workers_are_not_taken(where):
    """A share is taken only when its worker no longer renews the lease."""
    other, unfinished = Alive(where, 2), {2}
    taken = []
    with Leases(where, 0, 3, patience=1) as mine:
        thread = threading.Thread(target=lambda: taken.extend(mine.shares(lambda: set(unfinished) - set(taken))))
        thread.start()
        for _ in range(6):
            time.sleep(0.25)
            other()
        assert thread.is_alive()
        assert not taken
        thread.join(20)
    assert taken == [2]


def test_leases_of_ended_local_processes_are_stale(where, monkeypatch):
    """Other workers do not wait for the lease of a process that ran on this machine and has ended."""
    Alive(where, 1, host=leases.host(), process=2**22 + 1)
    unfinished = {1}
    with Leases(where, 0, 3, patience=100) as mine:
        assert next(mine.shares(lambda: unfinished)) == 1


def test_a_second_run_of_the_same_share_is_announced(where):
    Alive(where, 0, process=7)
    with (
        Leases(where, 0, 3) as mine,
        pytest.warns(UserWarning, match="process 7 on elsewhere may be making the same pictures in"),
    ):
        assert next(mine.shares(lambda: {0})) == 0


def test_containers_with_the_same_name_are_different_hosts(monkeypatch):
    """A container cannot see another container's processes, so it must not assume that they have ended."""
    monkeypatch.setattr(socket, "gethostname", lambda: "job.local")
    names = set()
    for namespace in ("pid:[1]", "pid:[2]"):
        monkeypatch.setattr(os, "readlink", lambda path, namespace=namespace: namespace)
        names.add(host.__wrapped__())
    assert len(names) == 2
    assert all(name.startswith("job_local-") for name in names)


def test_the_last_worker_to_take_a_share_holds_it(where):
    with Leases(where, 0, 3) as first, Leases(where, 0, 3) as last:
        shares, others = (one.shares(lambda: {0}) for one in (first, last))
        assert next(shares) == 0
        assert first.holds()
        assert next(others) == 0
        assert last.holds()
        assert not first.holds()
        shares.close()
        assert last.holds()
        others.close()
    assert not where.names("leases")


def test_a_lease_is_renewed_until_it_is_lost(where):
    with Leases(where, 1, 3, patience=0.2) as mine:
        shares = mine.shares(lambda: {1})
        next(shares)
        before = where.read("leases/share-2-of-3.json")
        end = time.monotonic() + 20
        while where.read("leases/share-2-of-3.json") == before:
            assert time.monotonic() < end
        assert mine.holds()
        other = Alive(where, 1)
        time.sleep(0.2)
        assert not mine.holds()
        shares.close()
    assert json.loads(where.read(other.name))["token"] == "theirs"


def test_a_lost_share_is_left_after_the_batch(plan, done, least, tmp_path, monkeypatch):
    """Batches that the other worker finishes are not made again."""
    made, shares = [], Leases.shares
    monkeypatch.setattr(Leases, "holds", lambda _: bool(made) or sweep.status(tmp_path).batches_done < 2)

    def other(self, unfinished):
        yield 0
        made.append(sweep.status(tmp_path).batches_done)
        for path in (done / "records").iterdir():
            (tmp_path / "records" / path.name).write_bytes(path.read_bytes())
        for path in (done / "pictures").iterdir():
            (tmp_path / "pictures" / path.name).write_bytes(path.read_bytes())
        yield from shares(self, unfinished)

    monkeypatch.setattr(Leases, "shares", other)
    sweep.run(plan, tmp_path, least)
    assert made == [2]
    same(tmp_path, done)


@pytest.mark.parametrize("worker", [(0, 2), (3, 2), (1, 0), (1.0, 2), "1/2", (1,)])
def test_invalid_workers_are_refused(plan, least, tmp_path, worker):
    with pytest.raises((TypeError, ValueError), match="worker"):
        sweep.run(plan, tmp_path, least, worker=worker)


def test_workers_default_to_jax_processes(plan, least, tmp_path, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    asked = []
    monkeypatch.setattr(Leases, "shares", lambda self, _: asked.append((self._worker, self._workers)) or [])
    sweep.run(plan, tmp_path, least)
    assert asked == [(1, 3)]
