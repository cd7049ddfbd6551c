"""Faults in sweeps: picture names, shared work, files, leases, contact sheets, plots and distances."""

import dataclasses
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import tiny

from faults.damage import argument, instead, result
from faults.views import Fault, View, Views
from sega_jax import sweep
from sega_jax.sweep.description import points
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.reporting import metrics, plots
from sega_jax.sweep.running import leases, prefixes, records, store
from sega_jax.sweep.running.leases import Leases
from sega_jax.systems.base import Sizes

pytestmark = pytest.mark.fault

DDIM = {"_class_name": "DDIMScheduler", **tiny.SD_BETAS}
FACTS = sweep.Facts({"source": "x"}, "stable_diffusion", DDIM, Sizes(4, 2, 2, (16, 16)))
# These values are large enough for another concept's momentum to change the picture.
MOMENTUM = {"momentum_scale": 1.0, "momentum_beta": 0.3}
EDITS = {"hat": {"threshold": 0.5}, "bow": {"concept": "apple", "warmup": 3, "threshold": 0.3, "cooldown": 5}}


def named(call, model="x"):
    """Returns the name of a picture."""
    description = sweep.Sweep(edits={"hat": {}}, call={"prompt": "a cat"} | call)
    facts = dataclasses.replace(FACTS, model={"source": model})
    return points.name(points.point(description[0], description, facts), facts)


def names():
    """Counts the distinct names of seven pictures, two of which are identical."""
    calls = [{}, {"steps": 50}, {"seed": 1}, {"steps": 49}, {"prompt": "a dog"}, {"edits": []}]
    return len({*map(named, calls), named({}, "y")})


def planned(folder, share):
    description = sweep.Sweep(
        model={"source": str(folder)},
        call={"prompt": "a cat", "steps": 7, "eta": 0.5},
        edits={name: edit | MOMENTUM for name, edit in EDITS.items()},
        grid={"seed": range(3), "hat.warmup": [1, 4]},
        zip={"hat.scale": [3, 0, -5], "bow.scale": [5, 0, 5]},
    )
    return sweep.plan(description, sweep.Facts.of(description), rows=2, share=share)


def pictures(folder):
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted((folder / "pictures").iterdir())}


def brightness(images, rows):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def views(least, least_folder, tmp_path_factory):
    done = tmp_path_factory.mktemp("sweep")
    sweep.run(planned(least_folder, False), done, least)
    sweep.measure(done, {"bright": brightness})
    results, unshared = sweep.Results(done), pictures(done)

    def together():
        """Runs a sweep with shared work; returns {name: whether the picture is nearly the same as without it}."""
        folder = tmp_path_factory.mktemp("shared")
        sweep.run(planned(least_folder, True), folder, least)
        return {name: (abs(image - unshared[name]) > 1).mean() < 1e-3 for name, image in pictures(folder).items()}

    def files():
        """Tries to create the same file twice. Returns the outcome of the second attempt, the file's content, and the
        names of all files."""
        where = store.Store(tmp_path_factory.mktemp("store"))
        where.create("a", b"1")
        try:
            where.create("a", b"2")
            second = "written"
        except FileExistsError:
            second = "refused"
        return second, where.read("a"), where.names("")

    def leased():
        """Returns whether another worker considers a new, a renewed and an old lease stale.

        It also returns the number of leases that remain after a successor has taken over the share and the first worker
        has left.
        """
        where, now = store.Store(tmp_path_factory.mktemp("leases")), [0.0]
        where.begin(("leases",))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now[0]))
            theirs, mine, again = (Leases(where, worker, 2, patience=1.0) for worker in (1, 0, 1))
            shares = theirs.shares(lambda: {1}), again.shares(lambda: {1})
            next(shares[0])
            stale = [mine._stale(1)]
            now[0] += 1.5
            theirs._write()
            stale.append(mine._stale(1))
            now[0] += 1.5
            stale.append(mine._stale(1))
            next(shares[1])
            shares[0].close()
            return stale, len(where.names("leases"))

    def beats():
        """Returns whether a busy worker renews its lease."""
        where = store.Store(tmp_path_factory.mktemp("beats"))
        where.begin(("leases",))
        with Leases(where, 0, 1, patience=0.04) as mine:
            shares = mine.shares(lambda: {0})
            next(shares)
            (name,) = where.names("leases")
            first, end = where.read(f"leases/{name}"), time.monotonic() + 1
            while time.monotonic() < end and where.read(f"leases/{name}") == first:
                time.sleep(0.01)
            return where.read(f"leases/{name}") != first

    def sheet():
        (page,) = sweep.sheets(results, "hat.scale", "seed", {"hat.warmup": 1, "bow.scale": 5}, side=16)
        return np.asarray(page.image)

    def curve():
        figure = sweep.plot(results, "bright", "hat.scale", "seed")
        return {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}

    def distances():
        rows = [row for row in results.rows if row["hat.warmup"] == 1]
        images = np.stack([np.asarray(results.picture(row)) for row in rows])
        return np.array(metrics.distance(results)(images, rows))

    return Views(
        {
            "names": View(names, lambda: 6),
            "together": View(together, lambda: dict.fromkeys(unshared, True)),
            "files": View(files, lambda: ("refused", b"1", {"a"})),
            "leases": View(leased, lambda: ([False, False, True], 1)),
            "beats": View(beats, lambda: True),
            "sheet": View(sheet),
            "curve": View(curve),
            "distances": View(distances),
        }
    )


def without_a_count(write):
    """Writes leases that do not count their renewals."""

    def damaged(self):
        self._beats = 0
        write(self)

    return damaged


def of_all_values(means):
    """Averages over the pictures for all values, instead of over the pictures for each value."""

    def damaged(rows, y, x, values, is_probability):
        return means([row | {x: value} for row in rows for value in values], y, x, values, is_probability)

    return damaged


FAULTS = {
    "the name of a picture ignores its seed": Fault(
        "names",
        points,
        "name",
        argument(0, lambda point: point._replace(settings=tuple((point.call | {"seed": 0}).items()))),
    ),
    # Sharing
    "pictures leave the shared work one call late": Fault(
        "together", sharing, "departure", lambda departure: lambda point, calls: min(departure(point, calls) + 1, calls)
    ),
    "concepts keep the order of the shared work": Fault(
        "together", prefixes, "_ordered", argument(2, lambda order: [sorted(row) for row in order])
    ),
    # Files and leases
    "a new file replaces an existing one": Fault("files", os, "link", instead(os.replace)),
    "a renewed lease looks like the old one": Fault("leases", Leases, "_write", without_a_count),
    "a worker ends the lease of its successor": Fault("leases", Leases, "holds", instead(lambda self: True)),
    "a busy worker does not renew its lease": Fault("beats", Leases, "_beat", instead(lambda self: None)),
    # Reports
    "a sheet shows the same picture everywhere": Fault(
        "sheet", sweep.Results, "picture", lambda picture: lambda self, row: picture(self, self.rows[0])
    ),
    "curves show means over all values": Fault("curve", plots, "_means", of_all_values),
    "distances compare pictures of different seeds": Fault(
        "distances", records, "columns_without_edits", result(lambda names: [name for name in names if name != "seed"])
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
