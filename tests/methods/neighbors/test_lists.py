"""Many lists are made and found through groups: nearly the nearest ones, and the same for any division of the work."""

import numpy as np
import pytest

from elfs_ray.methods.neighbors import lists as lists_module
from elfs_ray.methods.neighbors.exact import nearest_neighbors, recall
from elfs_ray.methods.neighbors.inverted import InvertedFile, Lists, merge_neighbors, nearest_lists, search_lists
from elfs_ray.methods.neighbors.lists import make_lists
from tests.methods.neighbors.test_exact import clustered

NUM_LISTS, NUM_GROUPS = 100, 10


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray]:
    return clustered(4000, 32, seed=8)


@pytest.fixture
def grouped(pool, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the centroids of lists and of their groups."""
    monkeypatch.setattr(lists_module, "MAX_FLAT", 50)
    centroids, groups = make_lists(*pool, NUM_LISTS, seed=0)
    assert groups is not None
    return centroids, groups


def test_lists_are_as_many_as_requested_and_of_unit_length(grouped):
    centroids, groups = grouped
    assert abs(len(centroids) - NUM_LISTS) < NUM_GROUPS and len(groups) == NUM_GROUPS
    for rows in grouped:
        assert rows.dtype == np.float16
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-3)


def test_few_lists_have_no_groups(pool):
    centroids, groups = make_lists(*pool, NUM_LISTS, seed=0)
    assert groups is None and len(centroids) == NUM_LISTS


def test_the_nearest_lists_are_those_of_the_nearest_groups(pool, grouped):
    embeddings, _ = pool
    centroids, groups = grouped
    group_of = nearest_lists(centroids, groups, 1)[:, 0]
    searched = nearest_lists(embeddings, groups, 4)
    similarity = embeddings.astype(np.float64) @ centroids.astype(np.float64).T
    similarity[~(group_of == searched[:, :, None]).any(1)] = -np.inf
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
    lists = Lists(*grouped)
    np.testing.assert_array_equal(lists.nearest(embeddings, 5), expected)
    parts = [lists.nearest(part, 5) for part in np.split(embeddings, [1, 700, 701])]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_all_lists_are_found_through_all_groups(pool, grouped):
    embeddings, centroids = pool[0][:50], grouped[0]
    expected = nearest_lists(embeddings, centroids, len(centroids))
    np.testing.assert_array_equal(Lists(*grouped).nearest(embeddings, len(centroids)), expected)


def test_a_search_through_groups_finds_nearly_as_much(pool, grouped):
    exact = nearest_neighbors(*pool, [pool], 10).neighbor_ids
    recalls = []
    for lists in (Lists(*grouped), Lists(grouped[0])):
        file = InvertedFile(lists, *pool)

        def search(queries, ids, probed, file=file):
            return merge_neighbors([file.search(queries, ids, probed, 10)])

        recalls.append(recall(search_lists(search, *pool, lists, nprobe=4).neighbor_ids, exact))
    assert recalls[0] > 0.95 * recalls[1] > 0.5
