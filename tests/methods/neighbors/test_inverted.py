from itertools import pairwise

import numpy as np
import pytest

from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.neighbors.exact import Neighbors, nearest_neighbors, recall
from elfs_ray.methods.neighbors.inverted import (
    InvertedFile,
    Lists,
    choose_nprobe,
    merge_neighbors,
    nearest_lists,
    search_lists,
)
from tests.methods.neighbors.test_exact import assert_same, brute_force, clustered, unit

NUM_LISTS = 64


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return embeddings with equal ones among them, their ids, and the centroids of lists."""
    embeddings, sample_ids = clustered(4000, 32, seed=8)
    embeddings[100:160] = embeddings[100]
    fit = kmeans(ArrayPoints(embeddings, sample_ids), NUM_LISTS, seed=0, spherical=True)
    return embeddings, sample_ids, fit.centroids.astype(np.float16)


def make_search(embeddings, sample_ids, centroids, k, at=()):
    """Return the `search` argument of `search_lists`, over the inverted files of a pool cut at some places."""
    cuts = list(pairwise([0, *at, len(embeddings)]))
    files = [InvertedFile(Lists(centroids), embeddings[first:last], sample_ids[first:last]) for first, last in cuts]
    return lambda queries, ids, lists: merge_neighbors([file.search(queries, ids, lists, k) for file in files])


def uneven_pool(num_rows: int, num_groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tight groups of exponential sizes, some of a single sample, and their centres."""
    random = np.random.default_rng(11)
    sizes = random.exponential(size=num_groups)
    sizes = np.maximum(1, np.floor(sizes / sizes.sum() * num_rows)).astype(int)
    centres = random.normal(size=(num_groups, 24))
    rows = np.repeat(centres, sizes, axis=0)
    rows = unit(rows + 0.02 * random.normal(size=rows.shape))
    return rows, np.arange(len(rows)), unit(centres)


def test_lists_are_the_most_similar_centroids_ties_to_the_first(pool):
    embeddings, _, centroids = pool
    centroids = np.concatenate([centroids, centroids])
    similarity = embeddings.astype(np.float64) @ centroids.astype(np.float64).T
    for num in (1, 7, 128):
        expected = np.argsort(-similarity, axis=1, kind="stable")[:, :num]
        np.testing.assert_array_equal(nearest_lists(embeddings, centroids, num), expected)


def test_searching_every_list_finds_the_exact_neighbours(pool):
    embeddings, sample_ids, centroids = pool
    neighbors = search_lists(
        make_search(*pool, 10, [7, 3000]), embeddings[:200], sample_ids[:200], Lists(centroids), nprobe=len(centroids)
    )
    assert_same(neighbors, brute_force(embeddings[:200], sample_ids[:200], embeddings, sample_ids, 10))


@pytest.mark.parametrize("k", [5, 50])
def test_cuts_of_the_pool_and_of_the_queries_do_not_change_the_result(pool, k):
    embeddings, sample_ids, centroids = pool
    whole = search_lists(make_search(*pool, k), embeddings, sample_ids, Lists(centroids), nprobe=2)
    search = make_search(*pool, k, [1, 120, 130, 2500])
    parts = [
        search_lists(search, embeddings[rows], sample_ids[rows], Lists(centroids), nprobe=2)
        for rows in np.array_split(np.random.default_rng(0).permutation(4000), 9)
    ]
    order = np.argsort(np.random.default_rng(0).permutation(4000))
    joined = Neighbors(*(np.concatenate(columns)[order] for columns in zip(*map(_columns, parts), strict=True)))
    assert_same(joined, whole)


def _columns(neighbors: Neighbors) -> tuple[np.ndarray, np.ndarray]:
    return neighbors.neighbor_ids, neighbors.similarity


def test_the_search_of_a_list_is_exact(pool):
    embeddings, sample_ids, centroids = pool
    lists = nearest_lists(embeddings, centroids, 1)
    neighbors = InvertedFile(Lists(centroids), embeddings, sample_ids).search(
        embeddings[:100], sample_ids[:100], lists[:100], 8
    )
    for row in range(0, 100, 9):
        inside = lists[:, 0] == lists[row, 0]
        one = slice(row, row + 1)
        expected = brute_force(embeddings[one], sample_ids[one], embeddings[inside], sample_ids[inside], 8)
        np.testing.assert_array_equal(neighbors.neighbor_ids[one], expected.neighbor_ids)


def test_equal_samples_of_a_list_are_found_by_the_lowest_ids(pool):
    """60 equal samples lie in one list: no margin of candidates proves which 8 come first."""
    embeddings, sample_ids, centroids = pool
    equal = sample_ids[100:160]
    for cut in ([], [130]):
        neighbors = search_lists(make_search(*pool, 8, cut), embeddings[100:160], equal, Lists(centroids), nprobe=1)
        lowest = np.sort(equal)
        assert neighbors.neighbor_ids.tolist() == [[i for i in lowest if i != query][:8] for query in equal]


def test_nprobe_is_the_smallest_power_of_two_that_reaches_the_recall(pool):
    embeddings, sample_ids, centroids = pool
    exact = brute_force(embeddings[:300], sample_ids[:300], embeddings, sample_ids, 10)
    search_all = make_search(*pool, 10)

    def search(nprobe: int) -> Neighbors:
        return search_lists(search_all, embeddings[:300], sample_ids[:300], Lists(centroids), nprobe)

    nprobe, measured = choose_nprobe(search, exact, NUM_LISTS, 0.9)
    assert [entry["nprobe"] for entry in measured] == [2**i for i in range(len(measured))]
    assert nprobe == measured[-1]["nprobe"] < NUM_LISTS
    assert measured[-1]["recall"] >= 0.9 > measured[-2]["recall"]
    assert recall(search(nprobe).neighbor_ids, exact.neighbor_ids) == measured[-1]["recall"]
    everything, _ = choose_nprobe(search, exact, NUM_LISTS, 1.1)
    assert everything == NUM_LISTS


def test_queries_whose_lists_hold_too_few_look_into_more(pool):
    rows, ids, centroids = uneven_pool(6000, 200)
    k = 20
    first = InvertedFile(Lists(centroids), rows, ids).search(rows, ids, nearest_lists(rows, centroids, 1), k)
    short = (first.neighbor_ids < 0).any(1)
    assert 100 < short.sum() < len(rows), "this pool is no test"
    neighbors = search_lists(make_search(rows, ids, centroids, k, [1000]), rows, ids, Lists(centroids), nprobe=1)
    exact = nearest_neighbors(rows, ids, [(rows, ids)], k)
    assert (neighbors.neighbor_ids >= 0).all() and np.isfinite(neighbors.similarity).all()
    np.testing.assert_array_equal(neighbors.neighbor_ids[~short], first.neighbor_ids[~short])
    assert recall(neighbors.neighbor_ids, exact.neighbor_ids) > recall(first.neighbor_ids, exact.neighbor_ids)


def test_all_other_samples_are_found_through_all_lists():
    rows, ids, centroids = uneven_pool(60, 8)
    neighbors = search_lists(make_search(rows, ids, centroids, len(rows) - 1), rows, ids, Lists(centroids), nprobe=1)
    assert_same(neighbors, nearest_neighbors(rows, ids, [(rows, ids)], len(rows) - 1))
