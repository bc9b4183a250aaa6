"""An estimate of the number of clusters by their silhouette."""

from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.kmeans.seeding import distances_to_seeds
from elfs_ray.methods.numeric.distinct import first_of_equal
from elfs_ray.methods.numeric.exact_arithmetic import squared_norms

ESTIMATE_ROWS = 20_000
MIN_ROWS_PER_CLUSTER = 20
MAX_CLUSTERS = 1000  # that are tried
NEARLY_AS_WELL = 0.9  # of the highest silhouette: how high another peak must be to count (BENCHMARKS.md)


@dataclass(frozen=True)
class ClusterEstimate:
    """An estimated number of clusters, with the silhouette and objective of every number that was tried."""

    num_clusters: int
    evidence: tuple[dict[str, float], ...]

    @property
    def fitting(self) -> tuple[int, int]:
        """Return the fewest and the most clusters that were tried and fit nearly as well as the estimate."""
        silhouettes = {int(each["num_clusters"]): each["silhouette"] for each in self.evidence}
        limit = NEARLY_AS_WELL * silhouettes[self.num_clusters]
        numbers = [number for number, silhouette in silhouettes.items() if silhouette >= limit]
        return min(numbers), max(numbers)


def estimate_num_clusters(rows: torch.Tensor, *, seed: int, max_clusters: int = MAX_CLUSTERS) -> ClusterEstimate:
    """Return the number of clusters at a peak of the simplified silhouette, for rows (m, d) float16 of unit length.

    The silhouette (b - a) / max(a, b) of a row compares its distances a to its centroid and b to the next one. The mean
    peaks where clusters are tight and far apart (Rousseeuw 1987; simplified by Hruschka et al., ICDM 2004; its peak
    agrees with the full silhouette's, Vendramin et al. 2010). The search tries 2, 3, 4, 6, 8, ..., each about 1.4 times
    the last, up to `max_clusters` or one cluster per `MIN_ROWS_PER_CLUSTER` rows. Of the peaks that are at least 90% as
    high as the highest one it takes that of most clusters, and bisects around it: two or three groups of classes often
    fit a little better than the classes, but too few clusters mix classes, while too many only divide them.

    Run it on a sample: `points.on_sample(partial(estimate_num_clusters, seed=seed), ESTIMATE_ROWS, seed)`.
    Memory: 16 m·k bytes for the largest k tried. Raises ValueError for too few rows or distinct rows.
    """
    points = ArrayPoints(rows.cpu().numpy(), np.arange(len(rows)), device=str(rows.device))
    num_distinct = count_distinct(rows)
    largest = min(max_clusters, len(rows) // MIN_ROWS_PER_CLUSTER, num_distinct - 1)
    if largest < 2:
        raise ValueError(
            f"num_clusters cannot be estimated from {len(rows)} embeddings, {num_distinct} of them distinct, with "
            f"max_clusters={max_clusters}; they must be at least {2 * MIN_ROWS_PER_CLUSTER}, 3 and 2. Set the number "
            "of clusters yourself"
        )
    steps = sorted({min(largest, round(2 * 2 ** (step / 2))) for step in range(2 * largest.bit_length())})
    tried = {k: _silhouette(points, rows, k, seed) for k in steps}
    best = _largest_peak({k: fit["silhouette"] for k, fit in tried.items()})
    while True:
        around = [max((k for k in tried if k < best), default=best), min((k for k in tried if k > best), default=best)]
        wanted = {(best + k) // 2 for k in around} - tried.keys()
        if not wanted:
            return ClusterEstimate(best, tuple(tried[k] for k in sorted(tried)))
        tried |= {k: _silhouette(points, rows, k, seed) for k in sorted(wanted)}
        best = max([best, *wanted], key=lambda k: (tried[k]["silhouette"], -k))  # of equals the fewest clusters


def _largest_peak(silhouettes: dict[int, float]) -> int:
    """Return the largest number, ascending, whose silhouette is a peak and nearly as high as the highest."""
    numbers = list(silhouettes)
    # Nobody knows whether two clusters, the fewest, are a peak: theirs must be a tenth higher.
    heights = silhouettes | {numbers[0]: NEARLY_AS_WELL * silhouettes[numbers[0]]}
    best = max(numbers, key=lambda k: (heights[k], -k))
    if best == numbers[-1]:  # the curve may go on to rise, so that none of the lower peaks counts
        return best
    lowest = NEARLY_AS_WELL * heights[best]
    for before, number, after in reversed(list(zip([None, *numbers], numbers, numbers[1:], strict=False))):
        height = heights[number]
        if height >= max(lowest, heights[after]) and (before is None or height > heights[before]):
            break
    return number


def count_distinct(rows: torch.Tensor) -> int:
    """Return the number of distinct rows (m, d) float16."""
    return len(first_of_equal(rows.cpu().numpy()))


def _silhouette(points: ArrayPoints, rows: torch.Tensor, num_clusters: int, seed: int) -> dict[str, float]:
    """Return the mean simplified silhouette of k-means, with each row left out of its own centroid.

    A row pulls its own centroid towards itself, which would favour the many small clusters of a large number.
    """
    fit = kmeans(points, num_clusters, seed=seed, max_iterations=20, tolerance=1e-3, num_tries=2)
    centroids = torch.from_numpy(fit.centroids).to(rows.device)
    distances = distances_to_seeds(rows, squared_norms(rows), centroids)
    smallest, labels = (part.cpu().numpy() for part in distances.topk(2, dim=0, largest=False))
    nearest, second = np.sqrt(smallest)
    sizes = np.bincount(labels[0], minlength=num_clusters)[labels[0]]
    # Without the row the centroid of m rows is m / (m - 1) times as far from it. A row that is alone counts 0.
    nearest = nearest * np.divide(sizes, sizes - 1, out=np.ones(len(sizes)), where=sizes > 1)
    farther = np.maximum(nearest, second)  # 0 only where two centroids coincide on the row
    silhouettes = np.divide(second - nearest, farther, out=np.zeros(len(sizes)), where=(farther > 0) & (sizes > 1))
    return {"num_clusters": num_clusters, "silhouette": float(silhouettes.mean()), "objective": fit.objective}
