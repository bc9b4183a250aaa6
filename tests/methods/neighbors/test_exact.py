from itertools import pairwise

import numpy as np
import pytest
import torch

from elfs_ray.methods.neighbors.exact import Neighbors, nearest_neighbors, recall


def unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def clustered(num_rows: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings around 20 centres, with ids that are neither dense nor sorted."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(20, dim))[random.integers(20, size=num_rows)] + 0.7 * random.normal(size=(num_rows, dim))
    return unit(rows), random.permutation(3 * num_rows)[:num_rows]


def brute_force(queries, query_ids, embeddings, sample_ids, k) -> Neighbors:
    """Sort float64 products, which are exact for these embeddings, by similarity, then id."""
    ids, similarities = [], []
    for start in range(0, len(queries), 500):
        similarity = queries[start : start + 500].astype(np.float64) @ embeddings.astype(np.float64).T
        similarity[query_ids[start : start + 500, None] == sample_ids] = -np.inf
        for row in similarity:
            best = np.flatnonzero(row >= np.partition(row, -k)[-k])
            best = best[np.lexsort((sample_ids[best], -row[best]))][:k]
            ids.append(sample_ids[best])
            similarities.append(row[best].astype(np.float32))
    return Neighbors(np.stack(ids), np.stack(similarities))


def assert_same(neighbors: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(neighbors.neighbor_ids, expected.neighbor_ids)
    np.testing.assert_array_equal(neighbors.similarity, expected.similarity)
    assert (neighbors.neighbor_ids.dtype, neighbors.similarity.dtype) == (np.int64, np.float32)


def cut(embeddings, sample_ids, at):
    edges = [0, *at, len(embeddings)]
    return [(embeddings[a:b], sample_ids[a:b]) for a, b in pairwise(edges)]


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray, Neighbors]:
    embeddings, sample_ids = clustered(2600, 48, seed=1)
    embeddings[10:90] = embeddings[0]
    embeddings[200:230] = embeddings[200]
    return embeddings, sample_ids, brute_force(embeddings, sample_ids, embeddings, sample_ids, 50)


@pytest.mark.parametrize("at", [[], [1000], [0, 3, 40, 2500, 2501]])
def test_ids_and_order_are_those_of_brute_force_for_any_shards(pool, at):
    embeddings, sample_ids, expected = pool
    assert_same(nearest_neighbors(embeddings, sample_ids, iter(cut(embeddings, sample_ids, at)), 50), expected)


@pytest.mark.slow
def test_ids_and_order_are_those_of_brute_force_on_twenty_thousand_samples():
    embeddings, sample_ids = clustered(20_000, 384, seed=2)
    embeddings[100:300] = embeddings[0]
    neighbors = nearest_neighbors(embeddings, sample_ids, cut(embeddings, sample_ids, [4000, 15_000]), 50)
    assert_same(neighbors, brute_force(embeddings, sample_ids, embeddings, sample_ids, 50))


def test_neighbours_closer_than_float32_can_tell_are_in_order():
    random = np.random.default_rng(3)
    embeddings = np.repeat(unit(random.normal(size=(1, 64))), 1500, axis=0)
    tiny = np.abs(embeddings[0]).argmin()
    embeddings[:, tiny] = random.integers(-40, 41, size=1500) * 2.0**-24
    sample_ids = random.permutation(1500)
    expected = brute_force(embeddings, sample_ids, embeddings, sample_ids, 20)
    assert_same(nearest_neighbors(embeddings, sample_ids, cut(embeddings, sample_ids, [700]), 20), expected)
    in_float32 = embeddings.astype(np.float32) @ embeddings.astype(np.float32).T
    order = np.lexsort((np.broadcast_to(sample_ids, in_float32.shape), -in_float32), axis=1)[:, :20]
    assert (sample_ids[order] != expected.neighbor_ids).any(), "this pool is no test"


def test_equal_samples_are_each_others_neighbours_by_id():
    embeddings = np.repeat(unit(np.ones((1, 5))), 12, axis=0)
    sample_ids = np.arange(12)[::-1].copy()
    neighbors = nearest_neighbors(embeddings, sample_ids, cut(embeddings, sample_ids, [5]), 3)
    expected = [[i for i in range(12) if i != sample_id][:3] for sample_id in sample_ids]
    assert neighbors.neighbor_ids.tolist() == expected


@pytest.mark.parametrize("at", [[], [100], [5, 6, 1900]])
def test_a_pool_of_equal_samples_gives_the_lowest_ids(at):
    """No margin of candidates proves a ranking here: every query is compared with every sample."""
    embeddings = np.repeat(unit(np.random.default_rng(7).normal(size=(1, 24))), 2000, axis=0)
    sample_ids = np.random.default_rng(8).permutation(2000)
    neighbors = nearest_neighbors(embeddings, sample_ids, cut(embeddings, sample_ids, at), 4)
    expected = [[i for i in range(5) if i != sample_id][:4] for sample_id in sample_ids]
    assert neighbors.neighbor_ids.tolist() == expected


def test_a_query_is_left_out_by_its_id_not_its_place():
    embeddings, sample_ids = clustered(300, 16, seed=4)
    chosen = np.array([250, 3, 77])
    neighbors = nearest_neighbors(embeddings[chosen], sample_ids[chosen], [(embeddings, sample_ids)], 10)
    assert not (neighbors.neighbor_ids == sample_ids[chosen][:, None]).any()
    assert_same(neighbors, brute_force(embeddings[chosen], sample_ids[chosen], embeddings, sample_ids, 10))
    outsider = nearest_neighbors(embeddings[:1], np.array([10**6]), [(embeddings, sample_ids)], 1)
    assert outsider.neighbor_ids.tolist() == [[sample_ids[0]]]


def test_k_may_be_all_other_samples_but_no_more():
    embeddings, sample_ids = clustered(40, 8, seed=5)
    neighbors = nearest_neighbors(embeddings, sample_ids, cut(embeddings, sample_ids, [7, 20]), 39)
    assert (np.sort(neighbors.neighbor_ids, axis=1)[5] == np.sort(np.delete(sample_ids, 5))).all()
    with pytest.raises(ValueError, match=r"k=40 neighbours .* pool of 40 samples; use at most 39"):
        nearest_neighbors(embeddings, sample_ids, [(embeddings, sample_ids)], 40)
    with pytest.raises(ValueError, match="k=0"):
        nearest_neighbors(embeddings, sample_ids, [(embeddings, sample_ids)], 0)


def test_faulty_embeddings_are_refused_with_their_ids():
    embeddings, sample_ids = clustered(40, 8, seed=6)
    faulty = embeddings.copy()
    faulty[4] = np.nan
    with pytest.raises(ValueError, match=f"sample ids {sample_ids[4]};"):
        nearest_neighbors(faulty, sample_ids, [(embeddings, sample_ids)], 3)
    with pytest.raises(ValueError, match=f"sample ids {sample_ids[4]};"):
        nearest_neighbors(embeddings, sample_ids, [(faulty, sample_ids)], 3)


def test_a_gpu_that_is_not_there_is_an_error():
    embeddings, sample_ids = clustered(40, 8, seed=7)
    with pytest.raises(ValueError, match="CUDA devices"):
        nearest_neighbors(
            embeddings, sample_ids, [(embeddings, sample_ids)], 3, device=f"cuda:{torch.cuda.device_count()}"
        )


def test_recall_counts_the_exact_neighbours_that_were_found():
    assert recall(np.array([[1, 2], [3, -1]]), np.array([[2, 1], [4, 3]])) == 0.75


@pytest.mark.gpu
def test_a_gpu_finds_the_neighbours_of_the_cpu():
    embeddings, sample_ids = clustered(30_000, 128, seed=9)
    embeddings[100:200] = embeddings[0]
    shards = cut(embeddings, sample_ids, [9000])
    on_gpu = nearest_neighbors(embeddings, sample_ids, shards, 50, device="cuda")
    assert_same(on_gpu, nearest_neighbors(embeddings, sample_ids, shards, 50))
