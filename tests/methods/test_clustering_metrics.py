import itertools

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from elfs_ray.methods.clustering_metrics import (
    adjusted_rand_index,
    contingency_table,
    head_agreement,
    matched_accuracy,
    neighbor_purity,
    normalized_mutual_information,
    purity,
)


def labelings(seed: int, n: int, num_clusters: int, num_classes: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(num_classes, size=n)
    clusters = np.where(rng.random(n) < noise, rng.integers(num_clusters, size=n), (truth * 3 + 1) % num_clusters)
    return clusters, truth


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_accuracy_equals_the_best_of_all_one_to_one_matches(shape: tuple[int, int], seed: int) -> None:
    clusters, truth = labelings(seed, 60, *shape, noise=0.4)
    table = contingency_table(clusters, truth, *shape)
    square = np.zeros((max(shape), max(shape)), dtype=np.int64)
    square[: shape[0], : shape[1]] = table
    best = max(sum(square[i, p] for i, p in enumerate(perm)) for perm in itertools.permutations(range(max(shape))))
    assert matched_accuracy(table) == pytest.approx(best / 60)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_clusters", "num_classes"), [(10, 10), (7, 20), (40, 5)])
def test_information_and_rand_index_equal_scikit_learn(noise: float, num_clusters: int, num_classes: int) -> None:
    clusters, truth = labelings(1, 5000, num_clusters, num_classes, noise)
    table = contingency_table(clusters, truth, num_clusters, num_classes)
    assert normalized_mutual_information(table) == pytest.approx(
        normalized_mutual_info_score(truth, clusters), abs=1e-9
    )
    assert adjusted_rand_index(table) == pytest.approx(adjusted_rand_score(truth, clusters), abs=1e-9)


@pytest.mark.parametrize(
    ("clusters", "truth"),
    [([0], [0]), ([0, 0, 0], [0, 0, 0]), ([0, 1, 2], [2, 0, 1]), ([0, 0, 0], [0, 1, 2]), ([0, 1, 2], [0, 0, 0])],
)
def test_degenerate_partitions_equal_scikit_learn(clusters: list[int], truth: list[int]) -> None:
    table = contingency_table(np.array(clusters), np.array(truth), 3, 3)
    assert normalized_mutual_information(table) == pytest.approx(
        normalized_mutual_info_score(truth, clusters), abs=1e-12
    )
    assert adjusted_rand_index(table) == pytest.approx(adjusted_rand_score(truth, clusters), abs=1e-12)


def test_tables_of_shards_add_up_to_the_table_of_the_pool() -> None:
    clusters, truth = labelings(2, 1000, 8, 6, 0.5)
    parts = [contingency_table(c, t, 8, 6) for c, t in zip(np.split(clusters, 5), np.split(truth, 5), strict=True)]
    assert np.array_equal(sum(parts), contingency_table(clusters, truth, 8, 6))


def test_a_label_outside_its_range_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match=r"second label array holds ids from -1 to 1; they must be 0 to 2"):
        contingency_table(np.array([0, 1]), np.array([-1, 1]), 3, 3)
    with pytest.raises(ValueError, match="one length"):
        contingency_table(np.array([0, 1]), np.array([1]), 3, 3)


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="counts no samples"):
        matched_accuracy(np.zeros((3, 3), dtype=np.int64))


def test_renamed_heads_agree_fully_and_random_heads_hardly() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=2000)
    heads = np.stack([labels, rng.permutation(10)[labels], rng.integers(10, size=2000)])
    agreement = head_agreement(heads, head=0, num_clusters=10)
    assert agreement[:2].tolist() == [1.0, 1.0]
    assert agreement[2] < 0.2


def test_neighbor_purity_is_the_share_of_neighbors_with_the_samples_label() -> None:
    labels = np.array([0, 0, 1, 1])
    neighbors = np.array([[1, 2], [0, 3], [3, 0], [0, 1]])
    assert neighbor_purity(labels, np.arange(4), neighbors) == pytest.approx((1 + 1 + 1 + 0) / 8)
    assert neighbor_purity(labels, np.array([2, 3]), neighbors[2:]) == pytest.approx(1 / 4)


def test_purity_lets_several_clusters_be_one_class() -> None:
    table = np.array([[3, 0], [4, 1], [0, 2]])
    assert purity(table) == pytest.approx(9 / 10)
    assert matched_accuracy(table) == pytest.approx(6 / 10)
