"""The nearest centroids of the same embeddings over and over, as k-means asks for them: only what may have changed.

After a few iterations most centroids stand still or nearly so, and most samples keep theirs. Every sample has an upper
bound of the distance to its own centroid and a lower bound of that to any other; where centroids have moved, the
triangle inequality loosens them by as much (Hamerly, SDM 2010). A sample whose upper bound stays below its lower one
keeps its centroid, with proof, so the labels are those of a search from scratch, to the bit. One centroid that jumps
would loosen the bounds of all: so those that moved most are measured against every sample, in one narrow product, and
only the movement of the others loosens.
"""

import numpy as np
import torch

from elfs_ray.methods.kmeans.filters import ProductFilter, mean_centroid
from elfs_ray.methods.numeric.exact_arithmetic import MAX_NORM, exact_centroids, flat_nonzero, product_error, row_chunks

_ROUNDED = 2.0**-22  # more than a few roundings of a float32 come to
_PROBE_STEP = 64
_NUM_SIZES, _COLUMNS_AT_ONCE = 16, 16
# What steps cost a row, in columns of the product that a search takes: to convert it and go over its scores; to go over
# its bounds. A search of rows that have to be gathered first takes longer than one of rows in their place.
_ROW, _BOUNDS, _GATHERED = 24, 2, 1.25
_WORTHWHILE = 0.95


class BoundedSearch:
    """Labels of embeddings (n, d) float16 of unit length in a CPU's memory, for one set of centroids after another.

    squared_norms (n,) float64 are those of the embeddings, within 2^-24. `near` and `far` (n,) float32 are the bounds,
    `num_searched` is the number of rows that the last call searched for. Memory: 20 n + 8 k·d bytes, during a call 40 n
    more.
    """

    def __init__(self, embeddings: torch.Tensor, squared_norms: torch.Tensor):
        self._embeddings = embeddings
        self._squared_norms = squared_norms
        self._centroids: torch.Tensor | None = None
        self._labels = torch.empty(len(embeddings), dtype=torch.int64)
        self.near, self.far, self._reach = (torch.empty(len(embeddings)) for _ in range(3))
        self.num_searched = 0

    def __call__(self, centroids: np.ndarray) -> torch.Tensor:
        """The nearest of centroids (k, d) to every embedding: labels (n,) int64, ties to the lower centroid id."""
        exact = exact_centroids(centroids, torch.device("cpu"))
        before, self._centroids = self._centroids, None  # no bounds, should this be interrupted
        if before is None or before.shape != exact.shape:
            self._take_offset(mean_centroid(exact))
            before = None
        search = ProductFilter(exact, self._offset)
        self._error = 2 * search.error + self._reach_error + 2.0**-21 * (search.magnitude + self._max_reach)
        undecided = None if before is None else self._undecided(search, (exact - before).norm(dim=1))
        self._labels = self._labels.clone()
        self._search(search, slice(0, len(self._labels)) if undecided is None else undecided)
        self.num_searched = len(self._labels) if undecided is None else len(undecided)
        self._centroids = exact
        return self._labels

    def _take_offset(self, offset: torch.Tensor) -> None:
        """Note the reach of every sample: its squared distance to the offset that scores are taken from."""
        norm = float(offset.norm())
        self._offset, self._max_reach = offset, (MAX_NORM + norm) ** 2
        self._reach_error = 2 * product_error(len(offset), offset.device) * MAX_NORM * norm + 2.0**-23
        single = offset.float()
        for rows in row_chunks(len(self._embeddings), len(offset), offset.device):
            products = (self._embeddings[rows].float() @ single).double()
            self._reach[rows] = (self._squared_norms[rows] - 2 * products + norm**2).float()

    def _search(self, search: ProductFilter, rows: slice | torch.Tensor) -> None:
        """Find the labels of some rows, and bounds that hold for whichever close centroid a row is settled to."""
        num_rows = rows.stop if isinstance(rows, slice) else len(rows)
        labels, best, second = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows), torch.empty(num_rows)
        for chunk in row_chunks(num_rows, len(search), labels.device):
            embeddings = self._embeddings[chunk if isinstance(rows, slice) else rows[chunk]]
            labels[chunk], best[chunk], second[chunk] = search.search_two(embeddings)
        close = best - second <= search.slack
        contested = flat_nonzero(close)
        for chunk in row_chunks(len(contested), len(search), labels.device):
            chosen = contested[chunk]
            labels[chosen] = search.settle(self._embeddings[chosen if isinstance(rows, slice) else rows[chosen]])
        self._labels[rows] = labels
        self.near[rows] = self._at_most(rows, best)
        self.far[rows] = self._at_least(rows, best.where(close, second))

    def _at_most(self, rows: slice | torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Upper bounds of the distances that scores of some rows stand for."""
        return (self._reach[rows] - 2 * scores + self._error).clamp_(min=0).sqrt_().mul_(1 + _ROUNDED)

    def _at_least(self, rows: slice | torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Lower bounds of the distances that scores of some rows stand for."""
        return (self._reach[rows] - 2 * scores - self._error).clamp_(min=0).sqrt_().mul_(1 - _ROUNDED)

    def _undecided(self, search: ProductFilter, drifts: torch.Tensor) -> torch.Tensor | None:
        """Loosen the bounds by drifts (k,): the rows that may have another centroid now, or None for all of them.

        A sample of the rows says beforehand how many centroids to measure, and whether all that pays.
        """
        drifts = drifts.mul(1 + _ROUNDED).float()
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
        """How many of the centroids that moved most had best be measured, going by the bounds of some rows."""
        k = len(drifts)
        steps = np.geomspace(1, max(1, k / 2 / _COLUMNS_AT_ONCE), _NUM_SIZES).astype(int)
        sizes = {0, int(drifts.count_nonzero()), *(_COLUMNS_AT_ONCE * steps).tolist()}
        near, far, own = self.near[probe], self.far[probe], drifts[self._labels[probe]]
        costs = {}
        for num_hot in sorted(size for size in sizes if size < k):
            cold_drift = float(drifts[by_drift[num_hot]])
            loosened = near + own.where(own <= cold_drift, 0)
            costs[num_hot] = _cost(num_hot, k, float((loosened >= far - cold_drift).float().mean()))
        return min(costs, key=costs.__getitem__)

    def _loosened(
        self,
        search: ProductFilter,
        rows: slice | torch.Tensor,
        drifts: torch.Tensor,
        hot: torch.Tensor,
        cold_drift: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of some rows after the movement, hot centroids measured: distances to the own one and to any other."""
        labels = self._labels[rows]
        near = self.near[rows].add(drifts[labels]).mul_(1 + _ROUNDED)
        far = self.far[rows].sub(cold_drift).mul_(1 - _ROUNDED)
        if len(hot) == 0:
            return near, far
        place = torch.full((len(drifts),), -1).index_copy_(0, hot, torch.arange(len(hot)))[labels]
        is_hot, at = (place >= 0).unsqueeze(1), place.clamp(min=0).unsqueeze(1)
        own, other = torch.empty(len(labels), 1), torch.empty(len(labels))
        embeddings = self._embeddings[rows]
        for chunk in row_chunks(len(labels), len(hot), labels.device):
            scores = search.scores(embeddings[chunk], hot)
            torch.gather(scores, 1, at[chunk], out=own[chunk])
            scores.scatter_(1, at[chunk], own[chunk].where(~is_hot[chunk], -torch.inf))
            torch.amax(scores, 1, out=other[chunk])
        near = near.minimum(self._at_most(rows, own.squeeze(1))).where(is_hot.squeeze(1), near)
        return near, far.minimum(self._at_least(rows, other))


def _cost(num_hot: int, num_clusters: int, undecided: float) -> float:
    """The cost of `num_hot` columns for all rows and a search for a share of them, over that of a search for all."""
    everything = num_clusters + _ROW
    narrow = num_hot + _ROW if num_hot else 0
    return (narrow + _BOUNDS) / everything + _GATHERED * undecided
