from itertools import pairwise

import numpy as np
import pytest

from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.neighbors.exact import Neighbors, nearest_neighbors, recall
from elfs_ray.methods.neighbors.inverted import (
    InvertedFile,
    choose_nprobe,
    merge_neighbors,
    nearest_lists,
    search_lists,
)
from tests.methods.neighbors.test_exact import assert_same, brute_force, clustered, unit

NUM_LISTS = 64


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings with equal ones among them, their ids, and the centroids of lists."""
    embeddings, sample_ids = clustered(4000, 32, seed=8)
    embeddings[100:160] = embeddings[100]
    fit = kmeans(ArrayPoints(embeddings, sample_ids), NUM_LISTS, seed=0, spherical=True)
    return embeddings, sample_ids, fit.centroids.astype(np.float16)


def asker(embeddings, sample_ids, centroids, k, at=()):
    """What answers `search_lists`: the inverted files of a pool that is cut at some places."""
    cuts = list(pairwise([0, *at, len(embeddings)]))
    files = [InvertedFile(centroids, embeddings[first:last], sample_ids[first:last]) for first, last in cuts]
    return lambda queries, ids, lists: merge_neighbors([file.search(queries, ids, lists, k) for file in files])


def uneven_pool(num_rows: int, num_groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tight groups of exponential sizes, some of one sample alone, and their centres."""
    random = np.random.default_rng(11)
    sizes = random.exponential(size=num_groups)
    sizes = np.maximum(1, np.floor(sizes / sizes.sum() * num_rows)).astype(int)
    centres = random.normal(size=(num_groups, 24))
    rows = np.repeat(centres, sizes, axis=0)
    rows = unit(rows + 0.02 * random.normal(size=rows.shape))
    return rows, np.arange(len(rows)), unit(centres)


def test_lists_are_those_of_the_most_similar_centroids_and_of_equal_ones_the_first(pool):
    embeddings, _, centroids = pool
    centroids = np.concatenate([centroids, centroids])
    similarity = embeddings.astype(np.float64) @ centroids.astype(np.float64).T
    for num in (1, 7, 128):
        expected = np.argsort(-similarity, axis=1, kind="stable")[:, :num]
        np.testing.assert_array_equal(nearest_lists(embeddings, centroids, num), expected)


def test_an_inverted_file_that_looks_into_every_list_finds_the_exact_neighbours(pool):
    embeddings, sample_ids, centroids = pool
    found = search_lists(
        asker(*pool, 10, [7, 3000]), embeddings[:200], sample_ids[:200], centroids, nprobe=len(centroids)
    )
    assert_same(found, brute_force(embeddings[:200], sample_ids[:200], embeddings, sample_ids, 10))


@pytest.mark.parametrize("k", [5, 50])
def test_neither_the_cut_of_the_pool_nor_that_of_the_queries_changes_what_is_found(pool, k):
    embeddings, sample_ids, centroids = pool
    whole = search_lists(asker(*pool, k), embeddings, sample_ids, centroids, nprobe=2)
    ask = asker(*pool, k, [1, 120, 130, 2500])
    parts = [
        search_lists(ask, embeddings[rows], sample_ids[rows], centroids, nprobe=2)
        for rows in np.array_split(np.random.default_rng(0).permutation(4000), 9)
    ]
    order = np.argsort(np.random.default_rng(0).permutation(4000))
    joined = Neighbors(*(np.concatenate(columns)[order] for columns in zip(*map(_columns, parts), strict=True)))
    assert_same(joined, whole)


def _columns(found: Neighbors) -> tuple[np.ndarray, np.ndarray]:
    return found.neighbor_ids, found.similarity


def test_the_search_of_a_list_is_exact(pool):
    embeddings, sample_ids, centroids = pool
    lists = nearest_lists(embeddings, centroids, 1)
    found = InvertedFile(centroids, embeddings, sample_ids).search(embeddings[:100], sample_ids[:100], lists[:100], 8)
    for row in range(0, 100, 9):
        inside = lists[:, 0] == lists[row, 0]
        one = slice(row, row + 1)
        expected = brute_force(embeddings[one], sample_ids[one], embeddings[inside], sample_ids[inside], 8)
        np.testing.assert_array_equal(found.neighbor_ids[one], expected.neighbor_ids)


def test_equal_samples_of_a_list_are_found_by_the_lowest_ids(pool):
    """60 equal samples lie in one list: no margin of candidates proves which 8 come first."""
    embeddings, sample_ids, centroids = pool
    equal = sample_ids[100:160]
    for cut in ([], [130]):
        found = search_lists(asker(*pool, 8, cut), embeddings[100:160], equal, centroids, nprobe=1)
        lowest = np.sort(equal)
        assert found.neighbor_ids.tolist() == [[i for i in lowest if i != query][:8] for query in equal]


def test_nprobe_is_the_smallest_power_of_two_that_reaches_the_recall(pool):
    embeddings, sample_ids, centroids = pool
    exact = brute_force(embeddings[:300], sample_ids[:300], embeddings, sample_ids, 10)
    ask = asker(*pool, 10)

    def search(nprobe: int) -> Neighbors:
        return search_lists(ask, embeddings[:300], sample_ids[:300], centroids, nprobe)

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
    first = InvertedFile(centroids, rows, ids).search(rows, ids, nearest_lists(rows, centroids, 1), k)
    short = (first.neighbor_ids < 0).any(1)
    assert 100 < short.sum() < len(rows), "this pool is no test"
    found = search_lists(asker(rows, ids, centroids, k, [1000]), rows, ids, centroids, nprobe=1)
    exact = nearest_neighbors(rows, ids, [(rows, ids)], k)
    assert (found.neighbor_ids >= 0).all() and np.isfinite(found.similarity).all()
    np.testing.assert_array_equal(found.neighbor_ids[~short], first.neighbor_ids[~short])
    assert recall(found.neighbor_ids, exact.neighbor_ids) > recall(first.neighbor_ids, exact.neighbor_ids)


def test_all_other_samples_are_found_through_all_lists():
    rows, ids, centroids = uneven_pool(60, 8)
    found = search_lists(asker(rows, ids, centroids, len(rows) - 1), rows, ids, centroids, nprobe=1)
    assert_same(found, nearest_neighbors(rows, ids, [(rows, ids)], len(rows) - 1))
