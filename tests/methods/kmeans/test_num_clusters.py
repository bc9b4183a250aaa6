"""The estimated number of clusters: which peak of a silhouette's curve it takes, and what the silhouette is."""

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise_distances

from elfs_ray.methods.kmeans import num_clusters
from elfs_ray.methods.kmeans.assignment import nearest_centroids
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.num_clusters import ClusterEstimate
from elfs_ray.methods.kmeans.points import ArrayPoints


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({2: 0.10, 3: 0.159, 4: 0.12, 6: 0.13, 8: 0.14, 11: 0.145, 16: 0.11}, 11),  # a little lower than 3
        ({2: 0.20, 3: 0.10, 4: 0.10, 6: 0.14, 8: 0.17, 11: 0.19, 16: 0.16}, 11),  # two may be no peak
        ({2: 0.70, 3: 0.50, 4: 0.55, 6: 0.40}, 2),  # but a clear lead is one
        ({2: 0.3, 3: 0.5, 4: 0.4, 6: 0.44, 8: 0.3}, 3),  # the other peak is too low
        ({2: 0.1, 3: 0.2, 4: 0.15, 6: 0.19, 8: 0.21}, 8),  # still rising
        ({2: 0.1, 3: 0.2, 4: 0.2, 6: 0.1}, 3),  # a plateau
        ({2: 0.1}, 2),
    ],
)
def test_the_largest_of_nearly_equal_peaks_is_taken(curve, expected):
    assert num_clusters._largest_peak(curve) == expected


def test_numbers_that_fit_nearly_as_well_are_named():
    curve = {2: 0.10, 3: 0.159, 4: 0.12, 11: 0.145, 16: 0.11}
    evidence = tuple({"num_clusters": k, "silhouette": value} for k, value in curve.items())
    assert ClusterEstimate(11, evidence).fitting == (3, 11)


def test_no_row_pulls_its_own_centroid():
    """The silhouette is that with each row left out of its own centroid, here written out."""
    x = np.random.default_rng(0).normal(size=(500, 8))
    rows = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    points = ArrayPoints(rows, np.arange(500))
    measured = num_clusters._silhouette(points, torch.from_numpy(rows), 100, seed=0)["silhouette"]
    centroids = kmeans(points, 100, seed=0, max_iterations=20, tolerance=1e-3, num_tries=2).centroids
    labels = nearest_centroids(torch.from_numpy(rows), centroids).numpy()
    second = np.sort(pairwise_distances(rows.astype(np.float64), centroids), axis=1)[:, 1]
    expected = []
    for row, label in enumerate(labels):
        others = rows[(labels == label) & (np.arange(500) != row)].astype(np.float64)
        to_centroid = np.linalg.norm(rows[row] - others.mean(0)) if len(others) else np.inf
        expected.append((second[row] - to_centroid) / max(to_centroid, second[row]) if len(others) else 0)
    assert measured == pytest.approx(np.mean(expected), abs=0.01)  # k-means has not quite converged
