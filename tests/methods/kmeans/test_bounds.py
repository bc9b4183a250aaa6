import numpy as np
import pytest
import torch

from elfs_ray.methods.kmeans.assignment import nearest_centroids
from elfs_ray.methods.kmeans.bounds import BoundedSearch
from elfs_ray.methods.kmeans.filters import ProductFilter
from elfs_ray.methods.numeric.exact_arithmetic import exact_centroids, squared_norms, to_fixed_point

DIM = 40


def around(num_centres: int, num_rows: int, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(num_centres, DIM))[random.integers(num_centres, size=num_rows)]
    rows += 0.5 * random.normal(size=rows.shape)
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))


class CountedSearch(BoundedSearch):
    """A search that keeps the number of rows that its last call had to search."""

    num_searched = 0

    def _search(self, search: ProductFilter, rows: slice | torch.Tensor) -> None:
        self.num_searched = rows.stop if isinstance(rows, slice) else len(rows)
        super()._search(search, rows)


def bounded(embeddings: torch.Tensor) -> CountedSearch:
    return CountedSearch(embeddings, squared_norms(embeddings))


def assert_exact(search: BoundedSearch, embeddings: torch.Tensor, centroids: np.ndarray) -> None:
    """Check that the labels equal those of a search from scratch, and that the bounds hold."""
    labels = search(centroids)
    assert torch.equal(labels, nearest_centroids(embeddings, centroids))
    distances = torch.cdist(
        embeddings.double(), exact_centroids(centroids, embeddings.device), compute_mode="donot_use_mm_for_euclid_dist"
    )
    nearest = distances.gather(1, labels[:, None]).squeeze(1)
    second = distances.scatter(1, labels[:, None], torch.inf).amin(1)
    assert (search.near >= nearest).all()
    assert (search.far <= second).all()


@pytest.mark.parametrize(
    ("sizes", "largest_share"),
    [
        ([1e-4] * 4, 0.05),  # everything moves a little
        ([0.0, 0.5, 0.0, 0.5], 0.6),  # some jump, the others stand still
        ([2.0, 1e-3, 2.0, 1e-3], 1.0),  # nothing to save in every other step
    ],
)
def test_labels_equal_a_full_search_while_few_rows_are_searched(sizes, largest_share):
    embeddings = around(30, 6000, seed=0)
    random = np.random.default_rng(1)
    search = bounded(embeddings)
    centroids = embeddings[random.permutation(6000)[:80]].double().numpy()
    assert_exact(search, embeddings, centroids)
    assert search.num_searched == 6000
    for size in sizes:
        moving = random.random((80, 1)) < (0.1 if size in (0.0, 0.5) else 1)
        centroids = centroids + size * moving * random.normal(size=centroids.shape) / DIM**0.5
        assert_exact(search, embeddings, centroids)
        if size < 1:
            assert search.num_searched <= largest_share * 6000


def test_bounds_hold_through_lloyds_iterations():
    embeddings = around(12, 3000, seed=2)
    search = bounded(embeddings)
    centroids = embeddings[:25].double().numpy()
    searched = []
    for _ in range(25):
        assert_exact(search, embeddings, centroids)
        searched.append(search.num_searched)
        labels = search(centroids).numpy()
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, embeddings.double().numpy())
        centroids = sums / np.maximum(np.bincount(labels, minlength=25), 1)[:, None]
    assert searched[0] == 3000 and searched[-1] < 100


def test_unmoved_centroids_cost_no_search_and_equal_ones_tie_by_id():
    embeddings = around(5, 2000, seed=3)
    search = bounded(embeddings)
    distinct = embeddings[:10].double().numpy()
    assert_exact(search, embeddings, distinct)
    assert_exact(search, embeddings, distinct)
    assert search.num_searched == 0
    twice = np.concatenate([distinct[::-1], distinct])
    for centroids in (twice, twice[::-1].copy(), twice):
        assert_exact(search, embeddings, centroids)
        assert search(centroids).max() < 10


def test_centroids_one_fixed_point_unit_apart_are_told_apart():
    embeddings = around(1, 1500, seed=4)
    random = np.random.default_rng(5)
    search = bounded(embeddings)
    middle = embeddings[0].double().numpy() / 2
    for _ in range(4):
        assert_exact(search, embeddings, to_fixed_point(middle + random.integers(-2, 3, size=(30, DIM)) * 2.0**-24))


def test_another_number_of_centroids_starts_from_scratch():
    embeddings = around(8, 1000, seed=6)
    search = bounded(embeddings)
    for num_clusters in (5, 1, 70):
        for step in (0.0, 1e-3):
            assert_exact(search, embeddings, embeddings[:num_clusters].double().numpy() * (1 - step))


def test_an_interrupted_search_leaves_no_bounds_behind(monkeypatch):
    embeddings = around(8, 1000, seed=7)
    search = bounded(embeddings)
    first = embeddings[:20].double().numpy()
    assert_exact(search, embeddings, first)
    with monkeypatch.context() as patch:
        patch.setattr(CountedSearch, "_search", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search(first + 0.05)
    assert_exact(search, embeddings, first + 0.01)
