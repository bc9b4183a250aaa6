from functools import partial
from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from elfs_ray.methods.kmeans.lloyd import KMeansState, kmeans
from elfs_ray.methods.kmeans.num_clusters import estimate_num_clusters
from elfs_ray.methods.kmeans.points import ArrayPoints, PartialSums, smallest_ids
from elfs_ray.methods.kmeans.seeding import seed_centroids


class Shards:
    """Several shards in one process, as an implementation of `Points`."""

    def __init__(self, embeddings: np.ndarray, sample_ids: np.ndarray, sizes: list[int]):
        cuts = np.cumsum([0, *sizes])
        assert cuts[-1] == len(embeddings)
        self.parts = [ArrayPoints(embeddings[a:b], sample_ids[a:b]) for a, b in pairwise(cuts)]
        self.count = sum(part.count for part in self.parts)
        self.dim = self.parts[0].dim

    def on_sample(self, function, num_rows, seed):
        chosen = smallest_ids([part.smallest_hashes(num_rows, seed) for part in self.parts], num_rows)
        held = [chosen[np.isin(chosen, part.smallest_hashes(part.count, 0)[1])] for part in self.parts]
        rows = np.concatenate([part.rows(ids) for part, ids in zip(self.parts, held, strict=True)])
        return function(torch.from_numpy(rows[np.argsort(np.concatenate(held))]))

    def assign(self, centroids):
        totals = PartialSums(np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), np.zeros(len(centroids)))
        for part in reversed(self.parts):
            totals += part.assign(centroids)
        return totals

    def label(self, centroids):
        labels, distances = zip(*(part.label(centroids) for part in self.parts), strict=True)
        return np.concatenate(labels), np.concatenate(distances)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def blobs(num_blobs: int, dim: int, num_rows: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(num_blobs, size=num_rows)
    return unit(random.normal(size=(num_blobs, dim))[labels] + spread * random.normal(size=(num_rows, dim))), labels


def in_memory(embeddings: np.ndarray) -> ArrayPoints:
    return ArrayPoints(embeddings, np.arange(len(embeddings)))


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    return unit(images), labels


@pytest.mark.parametrize("seed", range(5))
def test_digits_cluster_as_well_as_with_faiss_and_scikit_learn(digits, seed):
    """The objective is within 1% of both libraries' and the mutual information with the labels no lower."""
    images, labels = digits
    points = in_memory(images)
    result = kmeans(points, 10, seed=seed, max_iterations=25, tolerance=0, num_tries=10)
    reference = KMeans(10, n_init=10, max_iter=25, tol=0, random_state=seed).fit(images.astype(np.float32))
    other = faiss.Kmeans(64, 10, niter=25, nredo=10, seed=seed + 1, max_points_per_centroid=len(images))
    other.train(images.astype(np.float32))
    assert result.objective <= 1.01 * reference.inertia_
    assert result.objective <= 1.01 * other.obj[-1]
    nmi = normalized_mutual_info_score(labels, points.label(result.centroids)[0])
    assert nmi >= normalized_mutual_info_score(labels, reference.labels_) - 0.01


def test_on_a_hundred_blobs_every_blob_is_found():
    embeddings, labels = blobs(100, 32, 8000, spread=0.1, seed=1)
    points = in_memory(embeddings)
    result = kmeans(points, 100, seed=0, num_tries=3)
    reference = KMeans(100, n_init=3, random_state=0).fit(embeddings.astype(np.float32))
    assert result.objective <= 1.01 * reference.inertia_
    assert normalized_mutual_info_score(labels, points.label(result.centroids)[0]) > 0.999


def test_objective_and_counts_belong_to_the_centroids(digits):
    images, _ = digits
    points = in_memory(images)
    result = kmeans(points, 10, seed=3, tolerance=0)
    labels, distances = points.label(result.centroids)
    assert result.objective == pytest.approx((distances.astype(np.float64) ** 2).sum(), rel=1e-6)
    np.testing.assert_array_equal(result.counts, np.bincount(labels, minlength=10))
    assert (np.diff(result.history) <= 0).all()
    means = np.stack([images[labels == j].astype(np.float64).mean(axis=0) for j in range(10)])
    np.testing.assert_allclose(result.centroids, means, atol=2**-24)
    assert labels.dtype == np.int32
    assert distances.dtype == np.float32


@pytest.mark.parametrize("spherical", [False, True])
def test_any_number_of_unequal_shards_gives_the_same_bytes(spherical):
    embeddings, _ = blobs(12, 40, 3000, spread=0.8, seed=2)
    sample_ids = np.sort(np.random.default_rng(3).permutation(9000)[:3000])
    outcomes = set()
    for sizes in ([3000], [1, 2999], [1700, 300, 1000], [5, 0, 1200, 795, 64, 900, 36]):
        points = Shards(embeddings, sample_ids, sizes)
        result = kmeans(points, 25, seed=4, num_tries=2, spherical=spherical)
        labels, distances = points.label(result.centroids)
        outcomes.add((result.centroids.tobytes(), labels.tobytes(), distances.tobytes(), result.history))
    assert len(outcomes) == 1


def test_the_order_of_samples_does_not_matter():
    embeddings, _ = blobs(5, 16, 6000, spread=0.8, seed=5)
    order = np.random.default_rng(6).permutation(6000)
    sorted_fit = kmeans(in_memory(embeddings), 9, seed=1)
    shuffled_fit = kmeans(ArrayPoints(embeddings[order], order), 9, seed=1)
    assert sorted_fit.centroids.tobytes() == shuffled_fit.centroids.tobytes()
    assert sorted_fit.history == shuffled_fit.history


def test_updated_sums_equal_those_of_a_fresh_shard():
    embeddings, _ = blobs(6, 20, 2000, spread=1.0, seed=7)
    points = in_memory(embeddings)
    random = np.random.default_rng(8)
    start = unit(random.normal(size=(6, 20))).astype(np.float32)
    for step in (0.0, 0.01, 0.3, 2.0):
        centroids = start + step * random.normal(size=start.shape).astype(np.float32)
        moved, fresh = points.assign(centroids), in_memory(embeddings).assign(centroids)
        for name in ("sums", "counts", "squared_norms"):
            assert getattr(moved, name).tobytes() == getattr(fresh, name).tobytes()
    assert points.assign(start[:4]).counts.sum() == 2000


def test_a_fit_resumed_from_any_state_equals_the_undisturbed_one(digits, tmp_path):
    images, _ = digits
    states: list[KMeansState] = []
    fit = partial(kmeans, num_clusters=13, seed=5, max_iterations=6, num_tries=3)
    undisturbed = fit(in_memory(images), on_iteration=states.append)
    assert [state.attempt for state in states[::7]] == [0, 1, 2]
    for i, state in enumerate(states):
        np.savez(tmp_path / f"{i}.npz", **state.to_arrays())
        with np.load(tmp_path / f"{i}.npz") as saved:
            resumed = fit(in_memory(images), start=KMeansState.from_arrays(saved))
        assert resumed.centroids.tobytes() == undisturbed.centroids.tobytes()
        assert resumed.counts.tolist() == undisturbed.counts.tolist()
        assert (resumed.history, resumed.attempt) == (undisturbed.history, undisturbed.attempt)


def test_a_state_of_another_number_of_clusters_is_refused(digits):
    points = in_memory(digits[0])
    states: list[KMeansState] = []
    kmeans(points, 4, seed=0, max_iterations=2, on_iteration=states.append)
    with pytest.raises(ValueError, match=r"centroids of shape \(4, 64\), but this fit needs \(5, 64\)"):
        kmeans(points, 5, seed=0, start=states[0])


def test_the_best_try_wins(digits):
    points = in_memory(digits[0])
    ends: list[float] = []

    def note_end(state: KMeansState) -> None:
        if state.best is not None and not state.history:
            ends.append(state.best.objective)

    result = kmeans(points, 10, seed=1, num_tries=4, on_iteration=note_end)
    assert len(ends) == 4
    assert ends == sorted(ends, reverse=True)
    assert len(set(ends)) > 1
    assert result.objective == ends[-1] < ends[0]


def test_a_larger_tolerance_stops_earlier(digits):
    points = in_memory(digits[0])
    counts = [kmeans(points, 10, seed=2, tolerance=tolerance).num_iterations for tolerance in (0.1, 1e-3, 0)]
    assert counts == sorted(counts)
    assert 1 <= counts[0] < counts[-1]
    assert kmeans(points, 10, seed=2, max_iterations=0).num_iterations == 0


def test_spherical_centroids_have_unit_length(digits):
    result = kmeans(in_memory(digits[0]), 10, seed=0, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)


def test_one_cluster_has_the_mean_as_its_centroid(digits):
    images, _ = digits
    result = kmeans(in_memory(images), 1, seed=0)
    np.testing.assert_allclose(result.centroids[0], images.astype(np.float64).mean(axis=0), atol=2**-24)


def test_as_many_clusters_as_samples_makes_every_sample_a_centroid():
    embeddings, _ = blobs(8, 12, 200, spread=0.5, seed=9)
    points = in_memory(embeddings)
    result = kmeans(points, 200, seed=0)
    labels, distances = points.label(result.centroids)
    assert sorted(labels) == list(range(200))
    assert not distances.any()
    assert result.objective < 1e-5


def test_duplicates_share_a_cluster():
    distinct, _ = blobs(9, 24, 9, spread=0.1, seed=10)
    points = in_memory(np.repeat(distinct, [1, 400, 2, 30, 1, 50, 1, 3, 5], axis=0))
    labels, distances = points.label(kmeans(points, 9, seed=0).centroids)
    assert not distances.any()
    assert sorted(np.bincount(labels)) == [1, 1, 1, 2, 3, 5, 30, 50, 400]


def test_a_far_outlier_gets_a_cluster_of_its_own():
    random = np.random.default_rng(11)
    around = unit(np.eye(1, 16) + 0.005 * random.normal(size=(3000, 16)))
    points = in_memory(np.concatenate([around, -np.eye(1, 16, dtype=np.float16)]))
    result = kmeans(points, 2, seed=0, num_tries=3)
    assert sorted(result.counts) == [1, 3000]


def test_fewer_distinct_samples_than_clusters_are_refused():
    equal = in_memory(np.repeat(unit(np.ones((1, 7))), 50, axis=0))
    assert kmeans(equal, 1, seed=0).objective < 1e-5
    with pytest.raises(ValueError, match=r"num_clusters=2, .* only 1 distinct embeddings; use at most 1 clusters"):
        kmeans(equal, 2, seed=0)
    three = in_memory(np.repeat(unit(np.eye(3, 7)), 20, axis=0))
    assert kmeans(three, 3, seed=0).counts.tolist() == [20, 20, 20]
    with pytest.raises(ValueError, match="only 3 distinct"):
        kmeans(three, 4, seed=0)


def test_samples_a_float16_step_apart_are_distinct():
    embeddings = np.repeat(unit(np.array([[0.6, 0.8, 0.0]])), 4, axis=0)
    embeddings[:, 2] = [0, 2**-24, 2**-23, 2**-22]
    points = in_memory(embeddings)
    assert kmeans(points, 4, seed=0).counts.tolist() == [1, 1, 1, 1]


def test_an_empty_cluster_takes_half_of_the_one_with_the_largest_error():
    """The largest cluster consists of equal points, has no error and is not split."""
    random = np.random.default_rng(12)
    wide = unit(random.normal(size=(300, 16)))
    equal = np.repeat(unit(np.eye(1, 16)), 2000, axis=0)
    points = in_memory(np.concatenate([wide, equal]))
    start = np.stack([np.eye(1, 16)[0], wide.astype(np.float64).mean(axis=0), np.full(16, 0.9), -np.full(16, 0.9)])
    result = kmeans(points, 4, seed=0, start=KMeansState(centroids=start.astype(np.float32)))
    assert (result.counts > 0).all()
    assert (result.counts >= 2000).sum() == 1
    assert result.objective <= 1.03 * kmeans(points, 4, seed=0).objective


@pytest.mark.parametrize(("fault", "message"), [(np.nan, "NaN or infinity"), (np.inf, "NaN"), (3.0, "unit length")])
def test_embeddings_that_are_no_unit_vectors_are_refused_with_their_ids(fault, message):
    embeddings, _ = blobs(2, 8, 40, spread=0.1, seed=13)
    embeddings[17, 2] = fault
    with pytest.raises(ValueError, match=rf"{message}.*sample ids 1017;"):
        ArrayPoints(embeddings, np.arange(1000, 1040))


def test_repeated_ids_and_impossible_arguments_are_refused(digits):
    points = in_memory(digits[0])
    with pytest.raises(ValueError, match="an id more than once"):
        ArrayPoints(digits[0][:3], np.array([4, 5, 4]))
    with pytest.raises(ValueError, match="num_clusters=0, but the pool has 1797"):
        kmeans(points, 0, seed=0)
    with pytest.raises(ValueError, match="num_clusters=1798"):
        kmeans(points, 1798, seed=0)
    with pytest.raises(ValueError, match="tolerance=nan"):
        kmeans(points, 3, seed=0, tolerance=float("nan"))
    with pytest.raises(ValueError, match="num_tries=0"):
        kmeans(points, 3, seed=0, num_tries=0)


def test_seeds_are_distinct_rows_fixed_by_seed_and_attempt(digits):
    rows = torch.from_numpy(digits[0])
    seeds = seed_centroids(rows, 40, seed=1, attempt=0)
    assert len(np.unique(seeds, axis=0)) == 40
    assert (seeds[:, None] == digits[0][None]).all(axis=2).any(axis=1).all()
    assert seeds.tobytes() == seed_centroids(rows, 40, seed=1, attempt=0).tobytes()
    assert seeds.tobytes() != seed_centroids(rows, 40, seed=1, attempt=1).tobytes()
    assert seeds.tobytes() != seed_centroids(rows, 40, seed=2, attempt=0).tobytes()


def test_more_seeds_than_the_greedy_limit_follow_the_distances():
    """Plain k-means++ samples from D², so among 2,100 seeds a far group of three is always present."""
    random = np.random.default_rng(14)
    near = unit(np.eye(1, 24) + 0.1 * random.normal(size=(3000, 24)))
    far = unit(-np.eye(1, 24) + 0.001 * random.normal(size=(3, 24)))
    seeds = seed_centroids(torch.from_numpy(np.concatenate([near, far])), 2100, seed=0)
    assert len(np.unique(seeds, axis=0)) == 2100
    assert (seeds[:, 0] < 0).any()


@pytest.mark.parametrize(("num_blobs", "dim", "spread"), [(5, 16, 0.3), (20, 64, 0.3)])
def test_the_estimate_finds_the_number_of_separated_blobs(num_blobs, dim, spread):
    embeddings, _ = blobs(num_blobs, dim, 2000, spread, seed=15)
    estimate = in_memory(embeddings).on_sample(partial(estimate_num_clusters, seed=0, max_clusters=60), 2000, 0)
    assert estimate.num_clusters == num_blobs
    tried = {entry["num_clusters"]: entry["silhouette"] for entry in estimate.evidence}
    assert max(tried, key=tried.__getitem__) == num_blobs
    assert {2, 3} <= tried.keys()
    assert max(tried) == 60


def test_the_estimate_for_digits_is_close_to_ten(digits):
    estimate = estimate_num_clusters(torch.from_numpy(digits[0]), seed=0)
    assert 8 <= estimate.num_clusters <= 12


def test_an_estimate_from_too_little_is_refused():
    with pytest.raises(ValueError, match="clusters cannot be estimated from 200 embeddings, 2 of them distinct"):
        estimate_num_clusters(torch.from_numpy(np.repeat(unit(np.eye(2)), 100, axis=0)), seed=0)
    with pytest.raises(ValueError, match="39 embeddings"):
        estimate_num_clusters(torch.from_numpy(blobs(3, 4, 39, 0.1, 0)[0]), seed=0)


@pytest.mark.gpu
def test_a_gpu_gives_the_bytes_of_the_cpu():
    embeddings, _ = blobs(30, 128, 50_000, spread=1.0, seed=16)
    sample_ids = np.arange(len(embeddings))
    outcomes = set()
    for device in ("cpu", "cuda"):
        points = ArrayPoints(embeddings, sample_ids, device=device)
        result = kmeans(points, 64, seed=0, max_iterations=10)
        labels, distances = points.label(result.centroids)
        outcomes.add((result.centroids.tobytes(), labels.tobytes(), distances.tobytes(), result.history))
    assert len(outcomes) == 1
