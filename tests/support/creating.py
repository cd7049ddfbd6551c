"""Creates files while other threads and processes try to create files with the same names.

`python creating.py FOLDER WHO` prints "ready", waits for the file FOLDER/go, and then prints {file: thread} for the
files that its threads created.
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from sega_jax.sweep.running.store import Store

NAMES = [f"{i}.json" for i in range(200)]
THREADS = 6


def content(thread):
    return thread.encode() * 1000


def create(folder, who):
    """Returns {file: thread} for the files that the threads of this process created."""
    store, created, together = Store(folder), [], threading.Barrier(THREADS)

    def attempt(thread):
        while not store.has("go"):
            time.sleep(0.001)
        for name in NAMES:
            together.wait()
            try:
                store.create(name, content(thread))
            except FileExistsError:
                continue
            created.append((name, thread))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # makes threads collide
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(attempt, [f"{who}{i}" for i in range(THREADS)]))
    finally:
        sys.setswitchinterval(interval)
    assert len(dict(created)) == len(created), "two threads created the same file"
    return dict(created)


if __name__ == "__main__":
    print("ready", flush=True)
    print(json.dumps(create(*sys.argv[1:])))
