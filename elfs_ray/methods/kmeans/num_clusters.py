"""An estimate of the number of clusters by their silhouette."""

from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.kmeans.seeding import distances_to_seeds
from elfs_ray.methods.numeric.exact_arithmetic import squared_norms

ESTIMATE_ROWS = 20_000
MIN_ROWS_PER_CLUSTER = 20
MAX_CLUSTERS = 1000  # that are tried


@dataclass(frozen=True)
class ClusterEstimate:
    """An estimated number of clusters, with the silhouette and objective of every number that was tried."""

    num_clusters: int
    evidence: tuple[dict[str, float], ...]


def estimate_num_clusters(rows: torch.Tensor, *, seed: int, max_clusters: int = MAX_CLUSTERS) -> ClusterEstimate:
    """Return the number of clusters with the highest simplified silhouette, for rows (m, d) float16 of unit length.

    The silhouette (b - a) / max(a, b) of a row compares its distances a to its centroid and b to the next one. The mean
    peaks where clusters are tight and far apart (Rousseeuw 1987; simplified by Hruschka et al., ICDM 2004; its peak
    agrees with the full silhouette's, Vendramin et al. 2010). The search tries 2, 3, 4, 6, 8, ..., each about 1.4 times
    the last, up to `max_clusters` or one cluster per `MIN_ROWS_PER_CLUSTER` rows, then bisects around the best.

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
    tried: dict[int, dict[str, float]] = {}
    wanted = {min(largest, round(2 * 2 ** (step / 2))) for step in range(2 * largest.bit_length())}
    while wanted:
        for num_clusters in sorted(wanted):
            tried[num_clusters] = _silhouette(points, rows, num_clusters, seed)
        best = max(tried, key=lambda k: (tried[k]["silhouette"], -k))  # of equals the fewest clusters
        neighbors = [
            max((k for k in tried if k < best), default=best),
            min((k for k in tried if k > best), default=best),
        ]
        wanted = {(best + k) // 2 for k in neighbors} - tried.keys()
    return ClusterEstimate(best, tuple(tried[k] for k in sorted(tried)))


def count_distinct(rows: torch.Tensor) -> int:
    """Return the number of distinct rows (m, d) float16."""
    embeddings = np.ascontiguousarray(rows.cpu().numpy())
    # Viewed as one opaque value each, rows are compared by their bytes.
    return len(np.unique(embeddings.view(np.dtype((np.void, 2 * embeddings.shape[1])))))


def _silhouette(points: ArrayPoints, rows: torch.Tensor, num_clusters: int, seed: int) -> dict[str, float]:
    fit = kmeans(points, num_clusters, seed=seed, max_iterations=20, tolerance=1e-3, num_tries=2)
    centroids = torch.from_numpy(fit.centroids).to(rows.device)
    distances = distances_to_seeds(rows, squared_norms(rows), centroids)
    nearest, second = np.sqrt(distances.topk(2, dim=0, largest=False).values.cpu().numpy())
    # b >= a by the choice of the centroids, so max(a, b) is b. It is 0 only where two centroids coincide on the row.
    silhouettes = np.divide(second - nearest, second, out=np.zeros_like(nearest), where=second > 0)
    return {"num_clusters": num_clusters, "silhouette": float(silhouettes.mean()), "objective": fit.objective}
