"""What pictures of a sweep have in common, exactly, and how few evaluations of the UNet they can be made with.

An evaluation is one row through the UNet: a call of a picture with n concepts takes 2 + n. Let concept k have scale
s_k, weight w_k, warm-up a_k, cool-down b_k and momentum scale m_k. By `sega_jax.method.guidance.sega`, in both
semantics:

A concept with s_k = 0 or w_k = 0 is idle: its term and its momentum are 0 at every call. It is never asked about.

Before the first warm-up of a concept that is not idle nothing is added to classifier-free guidance. Up to that call,
its departure, a picture's states x_t are those of every picture with the same prompts, seed, guidance scale, eta,
size, scheduler and steps, whatever its concepts and their settings are: one *trunk* computes x_t and the predictions u
and p for all. A concept's prediction e_k at x_t depends on its words alone, so the trunk computes it once for all
pictures with these words. The momentum is each picture's own, because it accumulates s_k (e_k - u), thresholded and
weighted, from the first call on: it is computed from the shared predictions with the picture's settings, which costs
no evaluation, and goes with the picture when it departs.

From b_k on, e_k is multiplied by a weight of 0; the tail of the momentum needs no prediction. Before a_k, e_k acts
through the momentum alone, hence not at all where m_k = 0. So concept k is asked about in the calls [a_k, b_k) where
m_k = 0, else in [0, b_k).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from sega_jax.method.guidance import Edit, Edits
from sega_jax.pipelines.execution.active_concepts import needed, ordered
from sega_jax.sweep.description.points import Point

# Pictures that share are made together, at most so many for a row.
_MANY = 16


def trunk(point: Point) -> Hashable:
    """Returns what pictures have in common that share their states up to their departures."""
    return point.plain, point.scheduler, point.adapters


def departure(point: Point, calls: int) -> int:
    """The first call at which edits add something; `calls` where none does."""
    return min([calls, *(edit.warmup for edit in point.edits.values() if not _idle(edit))])


def asked(edit: Edit, calls: int) -> tuple[int, int]:
    """From which call to before which a concept's prediction is needed."""
    if _idle(edit):
        return 0, 0
    first = 0 if edit.momentum_scale else edit.warmup
    last = calls if edit.cooldown is None else min(edit.cooldown, calls)
    return first, max(first, last)


def evaluations(points: Iterable[tuple[Point, int]]) -> int:
    """The evaluations that points, each with its calls, can be made with: every trunk once, and every concept only
    where it is asked about."""
    together = defaultdict(list)
    for point, calls in points:
        together[trunk(point)].append((point, calls))
    total = 0
    for group in together.values():
        shared = defaultdict(list)
        length = 0
        for point, calls in group:
            left = departure(point, calls)
            length = max(length, left)
            total += 2 * (calls - left)
            for edit in point.edits.values():
                first, last = asked(edit, calls)
                total += max(last - max(first, left), 0)
                shared[edit.concept].append((first, min(last, left)))
        total += 2 * length + sum(map(_covered, shared.values()))
    return total


def _idle(edit: Edit) -> bool:
    return edit.scale == 0 or edit.weight == 0


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """How many calls are in at least one of the spans."""
    total, reached = 0, 0
    for first, last in sorted(spans):
        total += max(last - max(first, reached), 0)
        reached = max(reached, last)
    return total


class Branch(NamedTuple):
    """Pictures that depart at one call, as rows of one batch."""

    start: int  # the call
    members: tuple[int, ...]  # of the points
    concepts: tuple[int, ...]  # how many are predicted at each call from there on


class Schedule(NamedTuple):
    """How the pictures of some points are made: all trunks as rows of one batch, then branch after branch."""

    trunks: tuple[tuple[int, ...], ...]  # the points of each
    departures: tuple[int, ...]  # the calls at which some depart, rising
    branches: tuple[Branch, ...]
    rows: int

    def evaluations(self, concepts: int) -> int:
        """Rows through the UNet, with those that fill batches up."""
        shared = self.departures[-1] * (2 + concepts)
        return self.rows * (shared + sum(2 + n for one in self.branches for n in one.concepts))


def words(point: Point) -> tuple[str, ...]:
    """The concepts that a trunk predicts for a picture, in an order of their own."""
    return tuple(sorted(edit.concept for edit in point.edits.values()))


def clusters(points: Iterable[Point]) -> list[list[int]]:
    """The numbers of points that share a trunk with all its predictions, in their order."""
    together = defaultdict(list)
    for i, point in enumerate(points):
        together[trunk(point), words(point)].append(i)
    return list(together.values())


def parts(points: Sequence[Point], rows: int) -> list[list[int]]:
    """The numbers of points in parts, each of at most so many trunks, and of few enough pictures to be made again after
    a crash. A part by itself is one part."""
    found: list[list[int]] = [[]]
    trunks = 0
    for cluster in clusters(points):
        for start in range(0, len(cluster), _MANY * rows):
            some = cluster[start : start + _MANY * rows]
            if trunks == rows or (found[-1] and len(found[-1]) + len(some) > _MANY * rows):
                found.append([])
                trunks = 0
            found[-1] += some
            trunks += 1
    return found


def schedule(points: Sequence[Point], calls: int, rows: int) -> Schedule:
    """Of points with as many concepts each, of at most `rows` trunks."""
    leaving = defaultdict(list)
    for i, point in enumerate(points):
        leaving[departure(point, calls)].append(i)
    branches = []
    for start in sorted(leaving):
        # Those that leave out their concepts together are rows of the same batch.
        ends = {
            i: sorted((asked(edit, calls)[1] for edit in points[i].edits.values()), reverse=True)
            for i in leaving[start]
        }
        members = sorted(leaving[start], key=lambda i: ([max(end, start) for end in ends[i]], i), reverse=True)
        for first in range(0, len(members), rows):
            some = tuple(members[first : first + rows])
            edits = ordered([list(points[i].edits.values()) for i in some], 0.0)
            branches.append(Branch(start, some, tuple(needed(Edits.stack(edits), calls)[start:].tolist())))
    return Schedule(tuple(map(tuple, clusters(points))), tuple(sorted(leaving)), tuple(branches), rows)
