"""Finds the exact common prefixes of a sweep's pictures, and computes the minimum number of UNet evaluations.

An evaluation runs the UNet on one row. A model call for a picture with n concepts needs 2 + n evaluations. Let concept
k have scale s_k, weight w_k, warm-up a_k, cool-down b_k and momentum scale m_k. The following holds for
`sega_jax.method.guidance.sega` in both semantics.

A concept with s_k = 0 or w_k = 0 is idle: its term and its momentum are 0 at every call, so its prediction is never
needed.

Until the first non-idle concept has warmed up, nothing is added to classifier-free guidance. The call at which this
warm-up ends is the picture's *departure*. Up to this call, the states x_t are equal for all pictures with the same
prompts, seed, guidance scale, eta, size, scheduler and steps, regardless of their edits. One *trunk* computes x_t and
the predictions u and p for all of them. A concept's prediction e_k at x_t depends only on the concept's text, so the
trunk computes it once for all pictures with the same text. Each picture has its own momentum, which accumulates
s_k (e_k - u), thresholded and weighted, starting at the first call. When the picture departs, its momentum is computed
from the shared predictions with the picture's settings. This needs no evaluation. The remaining calls of pictures that
depart together form a *fork*.

From call b_k on, e_k is multiplied by a weight of 0, and the decay of the momentum needs no prediction. Before call
a_k, e_k acts only through the momentum, and not at all if m_k = 0. So the prediction of concept k is needed in the
calls [a_k, b_k) if m_k = 0, and in the calls [0, b_k) otherwise.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from sega_jax.method.guidance import Edit, Edits
from sega_jax.method.guidance.edits import warmup_of
from sega_jax.pipelines.execution.active_concepts import needed, ordered
from sega_jax.sweep.description.points import Point

# The maximum number of pictures in a shared batch, per row of its program.
_PICTURES_PER_ROW = 16


def trunk(point: Point) -> Hashable:
    """Returns a key that is equal for pictures whose states are equal up to their departures."""
    return point.plain, point.scheduler, point.adapters


def departure(point: Point, calls: int) -> int:
    """Returns the first call at which an edit changes the guidance; `calls` if no edit does."""
    return min([calls, *(warmup_of(edit) for edit in point.edits.values() if not _idle(edit))])


def predicted(edit: Edit, calls: int) -> tuple[int, int]:
    """Returns the range of calls that need a concept's prediction, as the first call and the call after the last."""
    if _idle(edit):
        return 0, 0
    first = 0 if edit.momentum_scale else warmup_of(edit)
    last = calls if edit.cooldown is None else min(edit.cooldown, calls)
    return first, max(first, last)


def evaluations(points: Iterable[tuple[Point, int]]) -> int:
    """Returns the minimum number of evaluations for the points: each trunk is counted once, and each concept only where
    it is needed.

    Args:
        points: the points, each with its number of model calls.
    """
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
                first, last = predicted(edit, calls)
                total += max(last - max(first, left), 0)
                shared[edit.concept].append((first, min(last, left)))
        total += 2 * length + sum(map(_covered, shared.values()))
    return total


def _idle(edit: Edit) -> bool:
    return edit.scale == 0 or edit.weight == 0


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Counts the calls that are in at least one of the spans."""
    total, reached = 0, 0
    for first, last in sorted(spans):
        total += max(last - max(first, reached), 0)
        reached = max(reached, last)
    return total


class Fork(NamedTuple):
    """Pictures that depart at the same call and are finished as rows of one batch."""

    start: int  # the call of the departure
    members: tuple[int, ...]  # the indices of the points
    concepts: tuple[int, ...]  # the number of predicted concepts at each call, starting at `start`


class Schedule(NamedTuple):
    """The order in which a batch with shared prefixes is made: first all trunks together, then one fork after
    another."""

    trunks: tuple[tuple[int, ...], ...]  # the indices of each trunk's points
    departures: tuple[int, ...]  # the calls at which pictures depart, in ascending order
    forks: tuple[Fork, ...]
    rows: int

    def evaluations(self, concepts: int) -> int:
        """Counts the evaluations, including padding."""
        shared = self.departures[-1] * (2 + concepts)
        return self.rows * (shared + sum(2 + n for one in self.forks for n in one.concepts))


def trunk_concepts(point: Point) -> tuple[str, ...]:
    """Returns a sorted tuple of the concepts that a trunk predicts for a picture, so that equal sets compare equal."""
    return tuple(sorted(edit.concept for edit in point.edits.values()))


def clusters(points: Iterable[Point]) -> list[list[int]]:
    """Groups points that share a trunk and all its predictions, and returns their indices in order."""
    together = defaultdict(list)
    for i, point in enumerate(points):
        together[trunk(point), trunk_concepts(point)].append(i)
    return list(together.values())


def parts(points: Sequence[Point], rows: int) -> list[list[int]]:
    """Splits points into batches of at most `rows` trunks, and returns the points' indices.

    A batch has at most 16 pictures per row, to limit the work that is lost in a crash. Splitting a resulting batch
    again leaves it unchanged.
    """
    batches: list[list[int]] = [[]]
    trunks = 0
    for cluster in clusters(points):
        for start in range(0, len(cluster), _PICTURES_PER_ROW * rows):
            members = cluster[start : start + _PICTURES_PER_ROW * rows]
            if trunks == rows or (batches[-1] and len(batches[-1]) + len(members) > _PICTURES_PER_ROW * rows):
                batches.append([])
                trunks = 0
            batches[-1] += members
            trunks += 1
    return batches


def schedule(points: Sequence[Point], calls: int, rows: int) -> Schedule:
    """Returns the schedule of points that have the same number of concepts and at most `rows` trunks."""
    departing = defaultdict(list)
    for i, point in enumerate(points):
        departing[departure(point, calls)].append(i)
    forks = []
    for start in sorted(departing):
        # Pictures whose concepts cool down together become rows of the same batch.
        ends = {
            i: sorted((predicted(edit, calls)[1] for edit in points[i].edits.values()), reverse=True)
            for i in departing[start]
        }
        members = sorted(departing[start], key=lambda i: ([max(end, start) for end in ends[i]], i), reverse=True)
        for first in range(0, len(members), rows):
            fork = tuple(members[first : first + rows])
            edits = ordered([list(points[i].edits.values()) for i in fork], 0.0)
            forks.append(Fork(start, fork, tuple(needed(Edits.stack(edits), calls)[start:].tolist())))
    return Schedule(tuple(map(tuple, clusters(points))), tuple(sorted(departing)), tuple(forks), rows)
