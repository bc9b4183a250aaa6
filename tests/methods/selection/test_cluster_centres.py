"""k-means centres and TypiClust vs. plain implementations on the same clusters."""

import numpy as np
import pytest
import torch

from elfs_ray.methods.kmeans.assignment import nearest_centroids
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.selection.cluster_centres import kmeans_centres, typiclust
from tests.tables import digit_images


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of n digits (n, d) float16, and their ids."""
    pixels = digit_images(n)[0].reshape(n, -1).astype(np.float64)
    pixels -= pixels.mean(0)
    return (pixels / np.linalg.norm(pixels, axis=1, keepdims=True)).astype(np.float16), np.arange(n) * 3


def clusters_of(embeddings, ids, num_clusters):
    centroids = kmeans(ArrayPoints(embeddings, ids), num_clusters, seed=0, max_iterations=25).centroids
    return nearest_centroids(torch.from_numpy(embeddings), centroids).numpy(), centroids


def test_kmeans_centres_are_the_nearest_of_each_cluster_by_size():
    embeddings, ids = digits(400)
    labels, centroids = clusters_of(embeddings, ids, 12)
    distances = ((embeddings.astype(np.float64) - centroids[labels]) ** 2).sum(1)
    expected = [min(np.flatnonzero(labels == c), key=lambda i: distances[i]) for c in range(12)]
    expected.sort(key=lambda i: (-np.count_nonzero(labels == labels[i]), labels[i]))
    assert kmeans_centres(embeddings, ids, 12, seed=0).tolist() == expected


def plain_typiclust(embeddings, labels, budget):
    x, taken = embeddings.astype(np.float64), []
    sizes = np.bincount(labels)
    clusters = sorted(np.flatnonzero(sizes >= 6), key=lambda c: -sizes[c])
    while len(taken) < budget:
        for cluster in clusters[: budget - len(taken)]:
            left = [i for i in np.flatnonzero(labels == cluster) if i not in taken]
            k = min(20, len(left) // 2)
            means = {i: np.sort([np.linalg.norm(x[i] - x[j]) for j in left if j != i])[:k].mean() for i in left}
            taken.append(min(left, key=means.get))
    return taken


def test_typiclust_takes_the_samples_of_a_plain_implementation():
    embeddings, ids = digits(300)
    assert typiclust(embeddings, ids, 8, seed=0).tolist() == plain_typiclust(
        embeddings, clusters_of(embeddings, ids, 8)[0], 8
    )


def test_typiclust_goes_round_its_clusters_again(monkeypatch):
    monkeypatch.setattr("elfs_ray.methods.selection.cluster_centres.MAX_TYPICLUST_CLUSTERS", 5)
    embeddings, ids = digits(200)
    expected = plain_typiclust(embeddings, clusters_of(embeddings, ids, 5)[0], 13)
    assert typiclust(embeddings, ids, 13, seed=0).tolist() == expected


@pytest.mark.parametrize("select", [kmeans_centres, typiclust])
def test_every_budget_is_met_even_if_most_samples_are_equal(select):
    embeddings = digits(40)[0]
    repeated = np.concatenate([embeddings[:10]] * 3 + [embeddings[10:]])
    for budget in (1, 15, 45, 60):
        chosen = select(repeated, np.arange(60), budget, seed=1)
        assert len(set(chosen.tolist())) == budget
    equal = np.repeat(embeddings[:1], 30, axis=0)
    assert select(equal, np.arange(30), 3, seed=0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="budget is 61 samples of a pool of 60"):
        select(repeated, np.arange(60), 61, seed=0)


@pytest.mark.parametrize("select", [kmeans_centres, typiclust])
def test_seeds_decide_the_clusters_and_nothing_else_does(select):
    embeddings, ids = digits(300)
    first = select(embeddings, ids, 20, seed=3)
    assert np.array_equal(first, select(embeddings, ids, 20, seed=3))
    assert not np.array_equal(np.sort(first), np.sort(select(embeddings, ids, 20, seed=4)))
