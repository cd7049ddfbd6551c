"""Who is at what: shares of a plan's batches, each with a lease, a file that its worker writes anew again and again.

A worker takes its own share whoever has it. When that is done, it takes those of others that are unfinished and whose
lease is stale: it stayed the same for as long as the patience is, by the clock of the one who looks, so that no clocks
are compared; or its process was of this machine and is no more. Two may take a share at the same time: the lease is
the last one's, and the other leaves after the batch that it is at.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sega_jax.sweep.running.folder import LEASES
from sega_jax.sweep.running.store import Store, host, runs

PATIENCE = 60.0


class Leases:
    """Of one worker, which holds one at a time; a context, out of which it holds none.

    Args:
        worker: from 0.
        workers: how many there are, with a share each.
        patience: seconds after which a lease that stays the same is stale, the same for all.
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
        """Takes a share after another, its own first, until none is unfinished; waits while others are at theirs."""
        mine = self._worker
        if mine in unfinished():
            yield from self._taken(mine)
        while left := unfinished():
            # From its own on, lest all that wait take the same one.
            order = sorted(left, key=lambda share: (share - mine) % self._workers)
            stale = [share for share in order if self._stale(share)]
            if stale:
                yield from self._taken(stale[0])
            elif self._ended.wait(self._patience / 12):
                return

    def holds(self) -> bool:
        """Whether the share that was taken last is still this worker's."""
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
        if lease is not None and lease["host"] == self._me["host"] and not runs(lease["process"]):
            return True
        if share not in self._seen or self._seen[share][0] != data:
            self._seen[share] = data, now
        return now - self._seen[share][1] >= self._patience

    def _beat(self) -> None:
        while not self._ended.wait(self._patience / 4):
            with self._lock:
                try:
                    if self._held is not None and self.holds():
                        self._write()
                except OSError:
                    # A shared folder may be away for a while; if it stays so, the pictures' writer says so.
                    continue

    def _write(self) -> None:
        self._beats += 1
        self._where.write(self._file(self._held), json.dumps(self._me | {"beat": self._beats}).encode())

    @staticmethod
    def _read(data: bytes | None) -> dict[str, Any] | None:
        try:
            lease = json.loads(data) if data else None
            return lease if lease is None or lease.keys() >= {"host", "process", "token"} else None
        except ValueError:
            return None

    def _file(self, share: int | None) -> str:
        return f"{LEASES}/share-{(share or 0) + 1}-of-{self._workers}.json"
