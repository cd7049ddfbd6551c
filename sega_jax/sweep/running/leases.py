"""Leases: files that show which worker is making which share of a plan's batches.

A worker renews its lease while it makes a share. It first takes its own share, even if another worker holds the lease.
Then it takes other unfinished shares whose leases are stale. A lease is stale if it has not changed for `patience`
seconds, or if the process that wrote it ran on this machine and has ended. Each worker measures these seconds with its
own clock, so that the clocks of different machines are never compared. If two workers take a share at the same time,
the last writer holds the lease, and the other worker leaves the share after its current batch.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sega_jax.pipelines.messages import warn
from sega_jax.sweep.running.folder import LEASES
from sega_jax.sweep.running.store import Store, host, runs

PATIENCE = 60.0


class Leases:
    """The leases of one worker, which holds at most one lease at a time. This is a context manager that releases the
    lease on exit.

    Args:
        where: the store of the sweep's folder.
        worker: the worker's number, counted from 0.
        workers: the number of workers; each has one share.
        patience: how long, in seconds, a lease may stay unchanged before it is considered stale. All workers must use
            the same value.
    """

    def __init__(self, where: Store, worker: int, workers: int, patience: float = PATIENCE):
        self._where, self._worker, self._workers, self._patience = where, worker, workers, patience
        self._me = {"host": host(), "process": os.getpid(), "token": os.urandom(8).hex()}
        self._held: int | None = None
        self._seen: dict[int, tuple[bytes | None, float]] = {}
        self._beats, self._lock, self._ended = 0, threading.Lock(), threading.Event()

    def __enter__(self) -> "Leases":
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._release()

    def shares(self, unfinished: Callable[[], set[int]]) -> Iterator[int]:
        """Yields one share after another, starting with this worker's own, until all are finished. Waits while other
        workers are busy.

        Args:
            unfinished: a function that returns the indices of the unfinished shares.
        """
        mine = self._worker
        if mine in unfinished():
            lease = self._read(self._where.read(self._file(mine)))
            if lease is not None and not self._has_ended(lease):
                warn(
                    f"process {lease['process']} on {lease['host']} may be making the same pictures in {self._where};"
                    " if so, it leaves them to this process after its current batch. To share a sweep among"
                    " processes, give each a different worker number"
                )
            yield from self._taken(mine)
        while left := unfinished():
            # Each worker starts with the share after its own, so that waiting workers do not all take the same share.
            order = sorted(left, key=lambda share: (share - mine) % self._workers)
            stale = [share for share in order if self._stale(share)]
            if stale:
                yield from self._taken(stale[0])
            elif self._ended.wait(self._patience / 12):
                return

    def holds(self) -> bool:
        """Returns whether this worker still holds the lease of the share that it took last."""
        lease = self._read(self._where.read(self._file(self._held)))
        return lease is not None and lease["token"] == self._me["token"]

    def _taken(self, share: int) -> Iterator[int]:
        with self._lock:
            self._held = share
            self._write()
        try:
            yield share
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            if self._held is not None and self.holds():
                self._where.remove(self._file(self._held))
            self._held = None

    def _stale(self, share: int) -> bool:
        data, now = self._where.read(self._file(share)), time.monotonic()
        lease = self._read(data)
        if lease is not None and self._has_ended(lease):
            return True
        if share not in self._seen or self._seen[share][0] != data:
            self._seen[share] = data, now
        return now - self._seen[share][1] >= self._patience

    def _has_ended(self, lease: dict[str, Any]) -> bool:
        """Returns whether a lease belongs to a process on this machine that has ended."""
        return lease["host"] == self._me["host"] and not runs(lease["process"])

    def _beat(self) -> None:
        while not self._ended.wait(self._patience / 4):
            with self._lock:
                try:
                    if self._held is not None and self.holds():
                        self._write()
                except OSError:
                    # A shared folder may be unreachable for a while. If it stays unreachable, writing a picture will
                    # fail.
                    continue

    def _write(self) -> None:
        self._beats += 1
        self._where.write(self._file(self._held), json.dumps(self._me | {"beat": self._beats}).encode())

    @staticmethod
    def _read(data: bytes | None) -> dict[str, Any] | None:
        try:
            lease = json.loads(data) if data else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(lease, dict) or not all(isinstance(lease.get(name), str) for name in ("host", "token")):
            return None
        process = lease.get("process")
        # Larger numbers are not processes.
        return lease if isinstance(process, int) and 0 < process < 2**31 else None

    def _file(self, share: int | None) -> str:
        return f"{LEASES}/share-{(share or 0) + 1}-of-{self._workers}.json"
