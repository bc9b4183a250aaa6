"""Choose one sample of each k-means cluster: label-free baselines that need embeddings alone.

`kmeans_centres` takes the sample nearest to each centre, and `typiclust` (Hacohen et al., ICML 2022, arXiv 2202.02794)
the one in the densest place of each cluster. The number of clusters follows the budget, so the selection for a small
budget is not the beginning of that for a larger one.
"""

import numpy as np
import torch

from elfs_ray.methods.kmeans.assignment import embeddings_to_device, nearest_centroids, squared_distances_to
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.num_clusters import count_distinct
from elfs_ray.methods.kmeans.points import ArrayPoints

# The values of section 3 and the authors' code.
MAX_TYPICLUST_CLUSTERS = 500
TYPICLUST_NEIGHBORS = 20
SMALLEST_CLUSTER = 6
_MAX_ITERATIONS = 25
_BLOCK = 1_000


def kmeans_centres(embeddings: np.ndarray, sample_ids: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """Return positions (budget,) int64 of the samples nearest to the centres of `budget` k-means clusters.

    The largest cluster comes first. Where clusters are empty, the second nearest of each follow, and so on. Ties go to
    the lowest position.

    embeddings: (n, d) float16 of unit length; sample_ids: (n,) int64, ascending. Raises ValueError for budgets outside
    [1, n]. Time: that of k-means, n · budget · d multiplications an iteration. Memory: 8·n·d + 32·budget·d bytes.
    """
    rows = embeddings_to_device(embeddings, sample_ids, torch.device("cpu"))
    labels, centroids = _clusters(rows, sample_ids, budget, budget, seed)
    distances = squared_distances_to(rows, centroids, torch.from_numpy(labels)).numpy()
    by_cluster = np.lexsort((distances, labels))  # stable: of equal distances the lowest position first
    sizes = np.bincount(labels, minlength=len(centroids))
    starts = np.cumsum(sizes) - sizes
    ranks = np.arange(len(labels)) - starts[labels[by_cluster]]
    order = np.lexsort((labels[by_cluster], -sizes[labels[by_cluster]], ranks))
    return by_cluster[order][:budget]


def typiclust(embeddings: np.ndarray, sample_ids: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """Return positions (budget,) int64 of the most typical samples of clusters, the largest cluster first.

    The typicality of a sample is the inverse of its mean distance to its nearest neighbours in its cluster that are not
    selected yet: 20 of them, or half of these if they are fewer than 40. k-means makes as many clusters as the budget,
    500 at most. Beyond that every cluster gives a second sample, and so on; clusters of up to 5 samples come last. Ties
    go to the lowest position.

    embeddings: (n, d) float16 of unit length; sample_ids: (n,) int64, ascending. Raises ValueError for budgets outside
    [1, n]. Time: that of k-means, and c²·d multiplications for each sample taken of a cluster of c.
    Memory: 8·n·d bytes, and 8,000·c.
    """
    rows = embeddings_to_device(embeddings, sample_ids, torch.device("cpu"))
    labels, _ = _clusters(rows, sample_ids, budget, min(budget, MAX_TYPICLUST_CLUSTERS), seed)
    members = [np.flatnonzero(labels == cluster) for cluster in range(labels.max() + 1)]
    members.sort(key=len, reverse=True)  # stable: of equal sizes the lowest cluster first
    usual = [left for left in members if len(left) >= SMALLEST_CLUSTER]
    small = [left for left in members if len(left) < SMALLEST_CLUSTER]
    taken: list[int] = []
    for clusters in (usual, small):
        while clusters and len(taken) < budget:
            for number, left in enumerate(clusters[: budget - len(taken)]):
                best = _most_typical(embeddings[left])
                taken.append(int(left[best]))
                clusters[number] = np.delete(left, best)
            clusters = [left for left in clusters if len(left)]
    return np.array(taken, np.int64)


def _clusters(
    rows: torch.Tensor, sample_ids: np.ndarray, budget: int, num_clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each sample (n,) int64 and the centroids (k, d) float32, fewer if samples repeat."""
    if not 1 <= budget <= len(rows):
        raise ValueError(f"budget is {budget} samples of a pool of {len(rows)}; it must be 1 to the whole pool")
    num_clusters = min(num_clusters, count_distinct(rows))
    points = ArrayPoints(rows.numpy(), sample_ids)
    centroids = kmeans(points, num_clusters, seed=seed, max_iterations=_MAX_ITERATIONS).centroids
    return nearest_centroids(rows, centroids).numpy(), centroids


def _most_typical(rows: np.ndarray) -> int:
    """Return the position of the row (c, d) with the smallest mean distance to its nearest ones."""
    num_neighbors = min(TYPICLUST_NEIGHBORS, len(rows) // 2)
    if not num_neighbors:
        return 0
    points = rows.astype(np.float32)
    means = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = points[start : start + _BLOCK]
        distances = np.sqrt(np.maximum(2 - 2 * (block @ points.T), 0))
        distances[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf  # no row is its own neighbour
        nearest = np.partition(distances, num_neighbors - 1, axis=1)[:, :num_neighbors]
        means[start : start + len(block)] = nearest.mean(axis=1, dtype=np.float64)
    return int(means.argmin())
