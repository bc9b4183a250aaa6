"""Coverage of a pool that is too large for one matrix of similarities: greedy in partitions, then among their choices.

This is GreeDi (Mirzasoleiman et al., NIPS 2013): `nominate` in each of the `partitions` of a pool, on any machine, and
`merge` what they nominate. Partitions depend on the size of the pool alone, so the number of workers changes nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, centred, facility_location

PARTITION_ROWS = 20_000  # 0.8 GB of similarities; a pool of up to so many samples is a single partition
MEASURED_ROWS = 4_000  # samples on which coverage is measured; its standard error is then below 0.002
SAMPLE_ROWS = 40_000  # of the pool, to be covered by the merged choice: 1.6 GB of similarities to the nominees
_SAMPLE_STREAM = 11


class Rows(NamedTuple):
    """Hold some samples: embeddings (n, d), ids (n,) int64, and groups (n,) int or None as for `facility_location`."""

    embeddings: np.ndarray
    sample_ids: np.ndarray
    groups: np.ndarray | None

    def among(self, wanted: np.ndarray) -> "Rows":
        """Return those of the samples that are among the `wanted` ids."""
        return self.where(np.isin(self.sample_ids, wanted, assume_unique=True))

    def without(self, unwanted: np.ndarray) -> "Rows":
        """Return the samples that are not among the `unwanted` ids."""
        return self.where(~np.isin(self.sample_ids, unwanted, assume_unique=True))

    def where(self, mask: np.ndarray) -> "Rows":
        """Return the samples of a mask (n,) bool."""
        return Rows(self.embeddings[mask], self.sample_ids[mask], None if self.groups is None else self.groups[mask])

    def centred(self, centre: np.ndarray) -> "Rows":
        """Return the samples with their embeddings relative to a centre (d,) float64."""
        return self._replace(embeddings=centred(self.embeddings, centre))

    @classmethod
    def concatenate(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return the samples of all parts, in their order."""
        groups = [part.groups for part in parts if part.groups is not None]
        embeddings, sample_ids = (np.concatenate(column) for column in list(zip(*parts, strict=True))[:2])
        return cls(embeddings, sample_ids, np.concatenate(groups) if groups else None)


class Nominees(NamedTuple):
    """What a partition selects: ids (r,) int64 in order, and the embeddings (q, d) and groups (q,) of the first."""

    sample_ids: np.ndarray
    embeddings: np.ndarray
    groups: np.ndarray | None


class Merged(NamedTuple):
    """The selection from a pool: ids (b,) int64 in order, and gains (b,) int64, 0 where nothing more is covered."""

    sample_ids: np.ndarray
    gains: np.ndarray


def samples_of(sample_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids, ascending, of the samples that a merged choice covers and of those to measure coverage on.

    sample_ids: the pool (n,). The second sample comes from the other end of a random order, so that the coverage of a
    large pool is measured on other samples than those that were covered.
    """
    by_hash = sample_ids[np.argsort(hash_uint64(seed, _SAMPLE_STREAM, sample_ids), kind="stable")]
    return np.sort(by_hash[:SAMPLE_ROWS]), np.sort(by_hash[-MEASURED_ROWS:])


def scores_of(gains: np.ndarray, num_points: int, num_samples: int) -> np.ndarray:
    """Return gains (b,) int64 over some points as (b,) float32: what they add to the sum of similarities of a pool."""
    return (gains / (SIMILARITY_ONE * num_points) * num_samples).astype(np.float32)


def partitions(num_samples: int) -> list[range]:
    """Divide the positions of a pool's samples, in the order of their ids, into the fewest equal ranges that fit."""
    parts = -(-num_samples // PARTITION_ROWS)
    ends = [num_samples * part // parts for part in range(parts + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def num_candidates(num_partitions: int) -> int:
    """Return the number of samples with which a partition takes part in the merged choice.

    These are `PARTITION_ROWS` in all, whatever the budget, so that the selection for a budget is the beginning of that
    for a larger one.
    """
    return -(-PARTITION_ROWS // num_partitions)


def share_of(sample_ids: np.ndarray, left_ids: np.ndarray, budget: int) -> int:
    """Return how many samples each partition of a pool must nominate, so that all together nominate the budget.

    sample_ids: those of the pool (n,), ascending; left_ids: those that may be selected (m,), ascending, m >= budget.
    Partitions in which fewer are left nominate these, and the others share the rest.
    """
    starts = [sample_ids[part.start] for part in partitions(len(sample_ids))]
    sizes = np.sort(np.diff([*np.searchsorted(left_ids, starts), len(left_ids)]))
    for number, size in enumerate(sizes.tolist()):
        share = -(-budget // (len(sizes) - number))
        if size >= share:
            return share
        budget -= size
    raise AssertionError(f"{budget} samples more than are left")


def select(rows: Rows, budget: int, labelled: Rows | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Select from samples, ascending by id, in one partition: return positions (b,) in order and gains (b,) int64.

    labelled: samples that cover others from the start; those among `rows` are not selected. Fewer than `budget` are
    selected if no more are left.
    """
    if labelled is None:
        return facility_location(rows.embeddings, min(budget, len(rows.embeddings)), groups=rows.groups)
    eligible = ~np.isin(rows.sample_ids, labelled.sample_ids)
    # A labelled sample gains nothing, so it comes after all that gain anything, and is then left out.
    depth = min(budget + int(np.count_nonzero(~eligible)), len(eligible))
    order, gains = facility_location(
        rows.embeddings,
        depth,
        groups=rows.groups,
        covered_by=labelled.embeddings,
        covered_by_groups=labelled.groups,
    )
    left = eligible[order]
    return order[left][:budget], gains[left][:budget]


def nominate(rows: Rows, num_candidates: int, share: int, labelled: Rows | None = None) -> Nominees:
    """Select from a partition, ascending by id; `share` is its share of the budget, by `share_of`.

    Memory: 2·n² bytes, and those of `facility_location`.
    """
    # A partition may consist of nothing but samples that must not be chosen.
    order = select(rows, max(num_candidates, share), labelled)[0] if len(rows.sample_ids) else np.empty(0, np.int64)
    first = order[:num_candidates]
    return Nominees(rows.sample_ids[order], rows.embeddings[first], None if rows.groups is None else rows.groups[first])


def merge(nominees: Sequence[Nominees], points: Rows, budget: int, labelled: Rows | None = None) -> Merged:
    """Select from the nominees of all partitions those that best cover `points`, a sample of the pool.

    After the last one that covers anything more, or the last candidate, come the other nominees by their ranks in their
    partitions, then by id: for a budget as large as that, one choice is as good as another.

    Memory: 2·m·s bytes for m candidates and s points, and 16 bytes for each nominee.
    """
    candidate_ids = np.concatenate([part.sample_ids[: len(part.embeddings)] for part in nominees])
    by_id = np.argsort(candidate_ids)
    candidates = np.concatenate([part.embeddings for part in nominees])[by_id]
    groups = [part.groups for part in nominees if part.groups is not None]
    coverage = facility_location(
        points.embeddings,
        min(budget, len(candidates)),
        candidates=candidates,
        groups=points.groups,
        candidate_groups=np.concatenate(groups)[by_id] if groups else None,
        covered_by=None if labelled is None else labelled.embeddings,
        covered_by_groups=None if labelled is None else labelled.groups,
    )
    useful = coverage.gains > 0
    chosen, gains = candidate_ids[by_id][coverage.order[useful]], coverage.gains[useful]
    ids = np.concatenate([part.sample_ids for part in nominees])
    ranks = np.concatenate([np.arange(len(part.sample_ids)) for part in nominees])
    rest = ids[np.lexsort((ids, ranks))]
    rest = rest[~np.isin(rest, chosen)][: budget - len(chosen)]
    return Merged(np.concatenate([chosen, rest]), np.concatenate([gains, np.zeros(len(rest), np.int64)]))
