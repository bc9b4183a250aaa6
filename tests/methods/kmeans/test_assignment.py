from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch

from elfs_ray.methods.kmeans.assignment import (
    ENGINES,
    add_rows,
    check_device,
    embeddings_to_device,
    move_rows,
    nearest_centroids,
    squared_distances_to,
)
from elfs_ray.methods.numeric.exact_arithmetic import squared_norms, to_fixed_point

CPU = torch.device("cpu")
UNIT = 2.0**-24


def unit_rows(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(num_rows, dim))
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))


def integer_labels(embeddings: torch.Tensor, centroids: np.ndarray) -> np.ndarray:
    """Nearest centroids in 64-bit integers: coordinates are multiples of 2^-24, and argmin takes the lower id."""
    x = (embeddings.numpy().astype(np.float64) / UNIT).astype(np.int64)
    c = (centroids.astype(np.float64) / UNIT).astype(np.int64)
    return (-2 * x @ c.T + (c * c).sum(axis=1)).argmin(axis=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dim", "num_clusters"), [(3, 1), (64, 2), (48, 300), (129, 17)])
def test_labels_are_those_of_integer_arithmetic(engine, dim, num_clusters):
    embeddings = unit_rows(2500, dim, seed=1)
    centroids = to_fixed_point(unit_rows(num_clusters, dim, seed=2).numpy() * 0.7)
    labels = nearest_centroids(embeddings, centroids, engine)
    np.testing.assert_array_equal(labels.numpy(), integer_labels(embeddings, centroids))


@pytest.mark.parametrize("engine", ENGINES)
def test_centroids_closer_than_float32_can_tell_are_told_apart(engine):
    embeddings = unit_rows(400, 64, seed=3)
    steps = np.random.default_rng(4).integers(-2, 3, size=(40, 64)) * UNIT
    centroids = to_fixed_point(embeddings.numpy()[:1].astype(np.float64) / 2 + steps)
    labels = nearest_centroids(embeddings, centroids, engine)
    expected = integer_labels(embeddings, centroids)
    in_float32 = (embeddings.float().numpy() @ centroids.T - (centroids**2).sum(axis=1) / 2).argmax(axis=1)
    assert (in_float32 != expected).mean() > 0.1, "these centroids are no test"
    np.testing.assert_array_equal(labels.numpy(), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_ties_go_to_the_lower_centroid_id(engine):
    embeddings = torch.eye(4, dtype=torch.float16).repeat(50, 1)
    axes = np.eye(4, dtype=np.float32)
    labels = nearest_centroids(embeddings, np.concatenate([axes[::-1], axes, axes]), engine)
    np.testing.assert_array_equal(labels.numpy(), np.tile([3, 2, 1, 0], 50))
    even = nearest_centroids(embeddings[:1], np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float32))
    assert even.tolist() == [0]


def test_labels_do_not_depend_on_the_batch():
    embeddings = unit_rows(3000, 96, seed=5)
    centroids = to_fixed_point(unit_rows(50, 96, seed=6).numpy() * 0.01)
    together = nearest_centroids(embeddings, centroids)
    cuts = [0, 1, 3, 20, 1024, 1999, 3000]
    apart = [nearest_centroids(embeddings[a:b], centroids) for a, b in pairwise(cuts)]
    assert torch.equal(together, torch.cat(apart))


def test_labels_are_exact_where_a_process_allows_bfloat16_products():
    embeddings = unit_rows(1500, 64, seed=7)
    centroids = to_fixed_point(unit_rows(30, 64, seed=8).numpy() * 0.1)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        labels = nearest_centroids(embeddings, centroids)
        assert settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before
    np.testing.assert_array_equal(labels.numpy(), integer_labels(embeddings, centroids))


def test_squared_distances_are_those_of_integer_arithmetic():
    embeddings = unit_rows(500, 70, seed=9)
    centroids = to_fixed_point(unit_rows(9, 70, seed=10).numpy() * 0.8)
    labels = nearest_centroids(embeddings, centroids)
    x = (embeddings.numpy().astype(np.float64) / UNIT).astype(np.int64)
    c = (centroids.astype(np.float64) / UNIT).astype(np.int64)
    expected = ((x - c[labels.numpy()]) ** 2).sum(axis=1) * UNIT**2
    np.testing.assert_array_equal(squared_distances_to(embeddings, centroids, labels).numpy(), expected)


def test_sums_are_the_same_bytes_in_any_order():
    embeddings = unit_rows(5000, 33, seed=11)
    labels = torch.arange(5000) % 7
    order = torch.from_numpy(np.random.default_rng(12).permutation(5000))
    sums, shuffled = torch.zeros(7, 33, dtype=torch.float64), torch.zeros(7, 33, dtype=torch.float64)
    add_rows(sums, embeddings, labels)
    add_rows(shuffled, embeddings[order], labels[order])
    assert sums.numpy().tobytes() == shuffled.numpy().tobytes()
    np.testing.assert_array_equal(sums[3].numpy(), embeddings[3::7].double().sum(0).numpy())
    others = (labels + 2) % 7
    move_rows(shuffled, embeddings[:4000], labels[:4000], others[:4000])
    zeros = torch.cat([others[:4000], labels[4000:]]) == 0
    np.testing.assert_array_equal(shuffled[0].numpy(), embeddings[zeros].double().sum(0).numpy())


def test_squared_norms_are_those_of_integer_arithmetic():
    embeddings = unit_rows(300, 50, seed=13)
    x = (embeddings.numpy().astype(np.float64) / UNIT).astype(np.int64)
    np.testing.assert_array_equal(squared_norms(embeddings).numpy(), (x * x).sum(axis=1) * UNIT**2)


def test_embeddings_that_are_not_finite_are_refused_with_their_ids():
    embeddings = unit_rows(5, 8, seed=14).numpy()
    embeddings[1, 3], embeddings[4, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 embeddings hold NaN or infinity: sample ids 101, 104;"):
        embeddings_to_device(embeddings, np.arange(100, 105), CPU)


def test_embeddings_that_are_not_of_unit_length_are_refused_with_their_ids():
    embeddings = unit_rows(30, 8, seed=15).numpy()
    embeddings[12:] *= np.float16(1.5)
    embeddings[3] = 0
    with pytest.raises(ValueError, match=r"19 embeddings are not of unit length: sample ids 3, 12, .* and 9 more"):
        embeddings_to_device(embeddings, np.arange(30), CPU)


def test_embeddings_of_another_dtype_or_shape_are_refused():
    with pytest.raises(ValueError, match="must be float16"):
        embeddings_to_device(np.zeros((3, 2), dtype=np.float32), np.arange(3), CPU)
    with pytest.raises(ValueError, match="must be int64 of shape"):
        embeddings_to_device(np.zeros((3, 2), dtype=np.float16), np.arange(4), CPU)


def test_a_read_only_memory_map_is_used_as_it_is(tmp_path):
    embeddings = unit_rows(20, 8, seed=16).numpy()
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    tensor = embeddings_to_device(mapped, np.arange(20), CPU)
    assert tensor.data_ptr() == mapped.ctypes.data
    np.testing.assert_array_equal(tensor.numpy(), embeddings)


def test_a_missing_gpu_is_an_error_not_a_silent_run_on_the_cpu():
    with pytest.raises(ValueError, match=r"torch sees .* CUDA devices"):
        check_device(f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(ValueError, match="use 'cpu' or 'cuda'"):
        check_device("meta")


def test_wrong_engines_and_centroids_are_refused():
    embeddings = unit_rows(3, 4, seed=17)
    with pytest.raises(ValueError, match="engine='scann' is unknown"):
        nearest_centroids(embeddings, np.zeros((2, 4), dtype=np.float32), "scann")
    with pytest.raises(ValueError, match="centroids hold NaN"):
        nearest_centroids(embeddings, np.full((2, 4), np.nan, dtype=np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_a_gpu_gives_the_labels_distances_and_sums_of_the_cpu(engine):
    if engine == "faiss" and faiss.get_num_gpus() == 0:
        pytest.skip("needs faiss-gpu")
    embeddings = unit_rows(50_000, 129, seed=18)
    centroids = to_fixed_point(unit_rows(300, 129, seed=19).numpy() * 0.05)
    on_gpu = embeddings.cuda()
    labels = nearest_centroids(on_gpu, centroids, engine)
    expected = nearest_centroids(embeddings, centroids)
    assert torch.equal(labels.cpu(), expected)
    distances = squared_distances_to(on_gpu, centroids, labels).cpu()
    assert torch.equal(distances, squared_distances_to(embeddings, centroids, expected))
    sums, expected_sums = (torch.zeros(300, 129, dtype=torch.float64, device=device) for device in ("cuda", "cpu"))
    add_rows(sums, on_gpu, labels)
    add_rows(expected_sums, embeddings, expected)
    assert torch.equal(sums.cpu(), expected_sums)
