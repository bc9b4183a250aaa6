"""Lay vectors out in the plane such that similar ones lie close together: the map of the report.

This is the idea of UMAP (McInnes, Healy and Melville, 2018) at its simplest: each point is drawn to its nearest
neighbours and pushed away from random points, both with the force of t-SNE's kernel 1 / (1 + distance²). All points
have the same number of neighbours of equal weight, which takes the place of UMAP's weights. Of 2,000 photographs of
Imagenette (EfficientNet-lite0), the ten nearest on the map tell the class of 95%, as on the maps of UMAP and t-SNE,
which take twenty times as long or more; by two principal components it is 66%.
"""

import numpy as np
from scipy.sparse.linalg import svds

from elfs_ray.methods.numeric.hashing import hash_uniform

NUM_NEIGHBORS = 15
NUM_EPOCHS = 300
REPELLED = 5  # random points that push a point away in an epoch
SPREAD = 5.0  # the standard deviation at the start, far above the distance at which neighbours settle, about 1
MAX_STEP = 4.0  # in an epoch, by one other point
ROWS_AT_ONCE = 1024


def lay_out(vectors: np.ndarray, is_sampled: np.ndarray) -> np.ndarray:
    """Return a place in the plane, (n, 2) float32, for each of n vectors (n, d) float32 of unit length.

    It starts from the first two principal components of those that `is_sampled` (n,) names. The same vectors always
    get the same places. If these vectors have no two components, as where all are equal, every place is the same.
    Memory: 8·n·d + 8·1024·n bytes.
    """
    places = _principal_components(vectors, vectors[is_sampled])
    deviation = places.std(axis=0)
    if not deviation.all():
        return places
    places *= SPREAD / deviation
    neighbors = _nearest(vectors, min(NUM_NEIGHBORS, len(vectors) - 1))
    random, everyone = np.random.default_rng(0), np.arange(len(vectors))
    for epoch in range(NUM_EPOCHS):
        neighbor = neighbors[everyone, random.integers(0, neighbors.shape[1], len(vectors))]
        apart = places - places[neighbor]
        pull = np.clip(2 * apart / (1 + _squares(apart)), -MAX_STEP, MAX_STEP)
        # Both come closer: a point that many others have as a neighbour is drawn to all of them.
        step = -pull + np.stack([np.bincount(neighbor, axis, len(vectors)) for axis in pull.T], axis=1)
        apart = places[:, None] - places[random.integers(0, len(vectors), (len(vectors), REPELLED))]
        squares = _squares(apart)
        push = 2 * apart / ((0.001 + squares) * (1 + squares))
        step += np.clip(push, -MAX_STEP, MAX_STEP).sum(axis=1)
        places += ((1 - epoch / NUM_EPOCHS) * step).astype(np.float32)
    return places


def _squares(differences: np.ndarray) -> np.ndarray:
    return np.square(differences).sum(axis=-1, keepdims=True)


def _principal_components(vectors: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Return the coordinates of vectors along the first two principal axes of a sample, (n, 2) float32."""
    if min(sample.shape, default=0) <= 2 or (sample == sample[0]).all():
        return np.zeros((len(vectors), 2), np.float32)
    mean = sample.mean(axis=0)
    # Two axes of a thousand: Lanczos iterations take a fraction of the time of all (fit_pca). They begin with a fixed
    # vector, so that the map of a run is always the same.
    _, _, axes = svds(sample - mean, k=2, v0=hash_uniform(0, np.arange(min(sample.shape))))
    axes = axes[::-1] * np.where(axes[::-1].sum(axis=1, keepdims=True) < 0, -1, 1)
    return ((vectors - mean) @ axes.T).astype(np.float32)


def _nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the k most similar other vectors of each, (n, k), in any order."""
    nearest = np.empty((len(vectors), k), np.int64)
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        similarity = vectors[start : start + ROWS_AT_ONCE] @ vectors.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        nearest[rows + start] = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return nearest
