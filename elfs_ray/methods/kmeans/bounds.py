"""Nearest centroids from one k-means iteration to the next: search only for samples whose centroid may have changed.

After a few iterations most centroids hardly move and most samples keep theirs. Every sample has an upper bound on the
distance to its centroid (`near`) and a lower bound on the distance to any other (`far`). Where centroids move, the
triangle inequality loosens both bounds by as much (Hamerly, SDM 2010). A sample whose upper bound stays below its lower
one provably keeps its centroid, so the labels equal those of a search from scratch, bit for bit.

In Hamerly's scheme a single centroid that jumps loosens the lower bounds of all samples. Here the centroids that moved
most, the hot ones, are measured against every sample in one narrow product, and only the movement of the others, the
cold ones, loosens the bounds.
"""

from functools import lru_cache

import numpy as np
import torch

from elfs_ray.methods.kmeans.filters import ProductFilter, mean_centroid
from elfs_ray.methods.numeric.exact_arithmetic import (
    MAX_NORM,
    exact_centroids,
    flat_nonzero,
    product_error,
    row_chunks,
    select_rows,
)
from elfs_ray.methods.numeric.workspace import Workspace

_ROUNDING = 2.0**-22  # more than the relative error of a few float32 operations, 2^-24 each
_PROBE_STEP = 64  # one row in 64 is enough to estimate what the bounds will decide
_NUM_SIZES = 16  # how many numbers of hot centroids to consider
_COLUMNS_AT_ONCE = 16  # sgemm computes columns in groups: fewer hot centroids would cost as much
# Costs of a row, measured in columns of the product that a search takes: to convert the row and scan its scores, and to
# update its bounds. Rows that have to be gathered first take longer to search than rows in their place.
_ROW, _BOUNDS, _GATHERED = 24, 2, 1.25
_WORTHWHILE = 0.95  # below this share of a full search's cost the bounds pay; the estimate is not exact


class BoundedSearch:
    """A search for the nearest centroids of the same embeddings, called with one set of centroids after another.

    embeddings (n, d) float16 of unit length in a CPU's memory; squared_norms (n,) float64 are theirs, within 2^-24.
    `near` and `far` (n,) float32 are the bounds that the module describes. Memory: 20 n + 8 k·d bytes, during a call
    40 n more.
    """

    def __init__(self, embeddings: torch.Tensor, squared_norms: torch.Tensor):
        self._embeddings = embeddings
        self._squared_norms = squared_norms
        self._space = Workspace(embeddings.device)
        self._centroids: torch.Tensor | None = None
        self._labels = torch.empty(len(embeddings), dtype=torch.int64)
        self.near, self.far, self._reach = (torch.empty(len(embeddings)) for _ in range(3))

    def __call__(self, centroids: np.ndarray) -> torch.Tensor:
        """Return the nearest of centroids (k, d) to every embedding, (n,) int64; ties go to the lower centroid id."""
        exact = exact_centroids(centroids, torch.device("cpu"))
        # An interrupted call leaves bounds of two iterations: without centroids the next call searches from scratch.
        before, self._centroids = self._centroids, None
        # An empty shard has no rows to estimate from what the bounds would save.
        if before is None or before.shape != exact.shape or len(self._labels) == 0:
            self._take_offset(mean_centroid(exact))
            before = None
        search = ProductFilter(exact, self._offset, self._space)
        # Bounds come from reach - 2 · score: twice a score's error, the reach's, and roundings of their float32 values.
        self._error = 2 * search.error + self._reach_error + 2.0**-21 * (search.magnitude + self._max_reach)
        undecided = None if before is None else self._undecided(search, (exact - before).norm(dim=1))
        self._labels = self._labels.clone()  # the caller still holds the labels of the previous call
        self._search(search, slice(0, len(self._labels)) if undecided is None else undecided)
        self._centroids = exact
        return self._labels

    def _take_offset(self, offset: torch.Tensor) -> None:
        """Set the offset of the scores, and every sample's reach: its squared distance to the offset.

        The score of a centroid is (reach - squared distance) / 2, see `ProductFilter`. One offset serves all calls of a
        fit, so that the reach is computed once.
        """
        norm = float(offset.norm())
        self._offset, self._max_reach = offset, (MAX_NORM + norm) ** 2
        self._reach_error = 2 * product_error(len(offset), offset.device) * MAX_NORM * norm + 2.0**-23
        single = offset.float()
        for rows in row_chunks(len(self._embeddings), len(offset), offset.device):
            products = (self._embeddings[rows].float() @ single).double()
            self._reach[rows] = (self._squared_norms[rows] - 2 * products + norm**2).float()

    def _search(self, search: ProductFilter, rows: slice | torch.Tensor) -> None:
        """Search the labels and bounds of some rows.

        Where two scores are too close to tell apart, an exact comparison decides the label, and the bounds hold for
        either outcome.
        """
        num_rows = rows.stop if isinstance(rows, slice) else len(rows)
        labels, best, second = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows), torch.empty(num_rows)
        # Parts are written through numpy, whose calls take a tenth of the time of torch's: chunks are many and small.
        results = [result.numpy() for result in (labels, best, second)]
        for chunk in row_chunks(num_rows, len(search), labels.device):
            embeddings = select_rows(self._embeddings, chunk if isinstance(rows, slice) else rows[chunk])
            for result, part in zip(results, search.search_two(embeddings), strict=True):
                result[chunk] = part.numpy()
        close = best - second <= search.slack
        contested = flat_nonzero(close)
        for chunk in row_chunks(len(contested), len(search), labels.device):
            positions = contested[chunk]
            row_ids = positions if isinstance(rows, slice) else rows[positions]
            labels[positions] = search.settle(select_rows(self._embeddings, row_ids))
        self._labels[rows] = labels
        self.near[rows] = self._at_most(rows, best)
        # A contested row may be settled to the second-best centroid: then the best score is that of "any other".
        self.far[rows] = self._at_least(rows, best.where(close, second))

    def _at_most(self, rows: slice | torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return upper bounds on the distances of some rows, from their scores."""
        return (self._reach[rows] - 2 * scores + self._error).clamp_(min=0).sqrt_().mul_(1 + _ROUNDING)

    def _at_least(self, rows: slice | torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return lower bounds on the distances of some rows, from their scores."""
        return (self._reach[rows] - 2 * scores - self._error).clamp_(min=0).sqrt_().mul_(1 - _ROUNDING)

    def _undecided(self, search: ProductFilter, drifts: torch.Tensor) -> torch.Tensor | None:
        """Loosen the bounds by drifts (k,), how far each centroid moved, and return the rows that may have changed.

        Returns None, with the bounds as they were, where a search of all rows is cheaper. A sample of the rows decides
        that, and how many hot centroids to measure.
        """
        drifts = drifts.mul(1 + _ROUNDING).float()
        by_drift = drifts.argsort(descending=True)
        probe = torch.arange(0, len(self._labels), _PROBE_STEP)
        hot = by_drift[: self._num_hot(drifts, by_drift, probe)]
        cold_drift = float(drifts[by_drift[len(hot)]])
        near, far = self._loosened(search, probe, drifts, hot, cold_drift)
        if _cost(len(hot), len(drifts), float((near >= far).float().mean())) >= _WORTHWHILE:
            return None
        self.near, self.far = self._loosened(search, slice(0, len(self._labels)), drifts, hot, cold_drift)
        return flat_nonzero(self.near >= self.far)

    def _num_hot(self, drifts: torch.Tensor, by_drift: torch.Tensor, probe: torch.Tensor) -> int:
        """Return the cheapest number of hot centroids to measure, estimated from the bounds of the probed rows."""
        k = len(drifts)
        # Besides the grid: no centroid, and all that moved, after which nothing loosens the lower bounds.
        sizes = np.array(sorted(size for size in {0, int(drifts.count_nonzero()), *_grid(k)} if size < k))
        near, far = self.near[probe].numpy(), self.far[probe].numpy()
        label_drifts = drifts[self._labels[probe]].numpy()
        cold_drifts = drifts[by_drift[sizes]].numpy()[:, None]
        # A sample of a hot centroid gets a measured upper bound, taken here to be about the one it had.
        loosened = near + np.where(label_drifts <= cold_drifts, label_drifts, 0)
        undecided = (loosened >= far - cold_drifts).mean(1)
        costs = [_cost(num_hot, k, share) for num_hot, share in zip(sizes.tolist(), undecided.tolist(), strict=True)]
        return int(sizes[np.argmin(costs)])

    def _loosened(
        self,
        search: ProductFilter,
        rows: slice | torch.Tensor,
        drifts: torch.Tensor,
        hot: torch.Tensor,
        cold_drift: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return near and far of some rows after the movement, with the hot centroids measured."""
        labels = self._labels[rows]
        near = self.near[rows].add(drifts[labels]).mul_(1 + _ROUNDING)
        far = self.far[rows].sub(cold_drift).mul_(1 - _ROUNDING)
        if len(hot) == 0:
            return near, far
        columns = torch.full((len(drifts),), -1).index_copy_(0, hot, torch.arange(len(hot)))
        place = columns[labels]
        is_hot, column = (place >= 0).unsqueeze(1), place.clamp(min=0).unsqueeze(1)
        label_score, other_score = torch.empty(len(labels), 1), torch.empty(len(labels))
        embeddings = select_rows(self._embeddings, rows)
        for chunk in row_chunks(len(labels), len(hot), labels.device):
            scores = search.scores(embeddings[chunk], hot)
            torch.gather(scores, 1, column[chunk], out=label_score[chunk])
            # Take the sample's centroid out of the maximum. Where it is cold, column 0 is overwritten with itself.
            scores.scatter_(1, column[chunk], label_score[chunk].where(~is_hot[chunk], -torch.inf))
            torch.amax(scores, 1, out=other_score[chunk])
        near = near.minimum(self._at_most(rows, label_score.squeeze(1))).where(is_hot.squeeze(1), near)
        return near, far.minimum(self._at_least(rows, other_score))


@lru_cache
def _grid(num_clusters: int) -> tuple[int, ...]:
    """Return numbers of hot centroids to consider, up to half of all."""
    steps = np.geomspace(1, max(1, num_clusters / 2 / _COLUMNS_AT_ONCE), _NUM_SIZES).astype(int)
    return tuple((_COLUMNS_AT_ONCE * steps).tolist())


def _cost(num_hot: int, num_clusters: int, undecided: float) -> float:
    """Return the cost of measuring `num_hot` centroids and searching a share of the rows, relative to a full search."""
    everything = num_clusters + _ROW
    narrow = num_hot + _ROW if num_hot else 0
    return (narrow + _BOUNDS) / everything + _GATHERED * undecided
