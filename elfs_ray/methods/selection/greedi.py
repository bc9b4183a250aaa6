"""Coverage of a pool that is too large for one matrix of similarities: greedy in partitions, then among their choices.

This is GreeDi (Mirzasoleiman et al., NIPS 2013): `nominate` in each of the `partitions` of a pool, on any machine, and
`merge` what they nominate. Partitions depend on the size of the pool alone, so the number of workers changes nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from elfs_ray.methods.selection.coverage import facility_location

PARTITION_ROWS = 20_000  # 0.8 GB of similarities; a pool of up to so many samples is a single partition
SAMPLE_ROWS = 40_000  # of the pool, to be covered by the merged choice: 1.6 GB of similarities to the nominees


class Nominees(NamedTuple):
    """What a partition selects: ids (r,) int64 in order, and the embeddings (q, d) and groups (q,) of the first."""

    sample_ids: np.ndarray
    embeddings: np.ndarray
    groups: np.ndarray | None


class Merged(NamedTuple):
    """The selection from a pool: ids (b,) int64 in order, and gains (b,) int64, 0 where nothing more is covered."""

    sample_ids: np.ndarray
    gains: np.ndarray


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


def nominate(
    embeddings: np.ndarray, sample_ids: np.ndarray, groups: np.ndarray | None, num_candidates: int, share: int
) -> Nominees:
    """Select from a partition: embeddings (n, d), ids (n,) ascending, groups (n,) as for `facility_location`.

    `share` is the partition's share of the budget, rounded up.

    Memory: 2·n² bytes, and those of `facility_location`.
    """
    depth = max(num_candidates, share)
    order = facility_location(embeddings, min(depth, len(embeddings)), groups=groups).order
    first = order[:num_candidates]
    return Nominees(sample_ids[order], embeddings[first], None if groups is None else groups[first])


def merge(nominees: Sequence[Nominees], points: np.ndarray, groups: np.ndarray | None, budget: int) -> Merged:
    """Select from the nominees of all partitions those that best cover `points`, a sample of the pool, in `groups`.

    After the last one that covers anything more, or the last candidate, come the other nominees by their ranks in their
    partitions, then by id: for a budget as large as that, one choice is as good as another.

    Memory: 2·m·s bytes for m candidates and s points, and 16 bytes for each nominee.
    """
    candidate_ids = np.concatenate([part.sample_ids[: len(part.embeddings)] for part in nominees])
    by_id = np.argsort(candidate_ids)
    candidates = np.concatenate([part.embeddings for part in nominees])[by_id]
    candidate_groups = None if groups is None else np.concatenate([part.groups for part in nominees])[by_id]
    coverage = facility_location(
        points, min(budget, len(candidates)), candidates=candidates, groups=groups, candidate_groups=candidate_groups
    )
    useful = coverage.gains > 0
    chosen, gains = candidate_ids[by_id][coverage.order[useful]], coverage.gains[useful]
    ids = np.concatenate([part.sample_ids for part in nominees])
    ranks = np.concatenate([np.arange(len(part.sample_ids)) for part in nominees])
    rest = ids[np.lexsort((ids, ranks))]
    rest = rest[~np.isin(rest, chosen)][: budget - len(chosen)]
    return Merged(np.concatenate([chosen, rest]), np.concatenate([gains, np.zeros(len(rest), np.int64)]))
