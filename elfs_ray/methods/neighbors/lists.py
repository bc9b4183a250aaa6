"""Make the lists of an inverted file by k-means, and in two steps where there are many of them.

Lists should hold about as many samples in a large pool as in a small one, or every query is compared with more of them
the larger the pool. But k-means takes the square of the number of lists, and each search for the nearest list grows
with it. So more than `MAX_FLAT` lists are made in groups: a k-means finds the groups, and one for each group its lists.
"""

import numpy as np

from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.neighbors.inverted import nearest_lists

MAX_FLAT = 4096
_ITERATIONS = 10


def make_lists(
    embeddings: np.ndarray, sample_ids: np.ndarray, num_lists: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the centroids (l, d) of about `num_lists` lists and those of their groups (g, d) or None, for `Lists`.

    embeddings (m, d) float16 of unit length, all distinct, with sample_ids (m,): a sample of the pool, m >= num_lists.
    Both results are float16 of unit length. Time: 10·m·l·d multiplications, with groups 20·m·√l·d.
    """
    if num_lists <= MAX_FLAT:
        return _centroids(embeddings, sample_ids, num_lists, seed), None
    groups = _centroids(embeddings, sample_ids, round(num_lists**0.5), seed)
    group_of = nearest_lists(embeddings, groups, 1)[:, 0]
    rows_of_groups = np.split(
        np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of, minlength=len(groups)))
    )
    lists = []
    for rows in rows_of_groups:
        if len(rows):
            share = max(1, round(num_lists * len(rows) / len(embeddings)))
            lists.append(_centroids(embeddings[rows], sample_ids[rows], share, seed))
    return np.concatenate(lists), groups


def _centroids(embeddings: np.ndarray, sample_ids: np.ndarray, num: int, seed: int) -> np.ndarray:
    points = ArrayPoints(embeddings, sample_ids)
    fit = kmeans(points, num, seed=seed, max_iterations=_ITERATIONS, spherical=True)
    # Of unit length in float16 they are searched like samples: exactly.
    return fit.centroids.astype(np.float16)
