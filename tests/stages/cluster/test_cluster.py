"""cluster: the same bytes for any number of workers, with a worker or the driver lost on the way."""

import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from sklearn.cluster import KMeans

from elfs_ray.config import ConfigError
from elfs_ray.methods.clustering_metrics import contingency_table, matched_accuracy
from elfs_ray.methods.numeric.pca import fit_pca
from elfs_ray.runtime.cluster import Devices
from elfs_ray.stages.cluster import STAGE
from elfs_ray.stages.cluster import run as cluster
from elfs_ray.stages.cluster import shards as cluster_shards
from elfs_ray.stages.cluster import temi as cluster_temi
from elfs_ray.stages.cluster.temi import temi_settings
from elfs_ray.stages.neighbors.run import run_neighbors
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import contents, digit_images, digits_config, write_embedded


def run(tmp_path, *overrides: str) -> tuple[dict[str, bytes], dict]:
    run_dir = RunDir(tmp_path)
    if not (tmp_path / "embeddings").exists():
        write_embedded(run_dir)
    config = digits_config(tmp_path, *overrides)
    if config.needs_neighbors:
        run_neighbors(config, run_dir)
    result = cluster.run_cluster(config, run_dir)
    return contents(tmp_path, "clusters"), result


@pytest.mark.slow
def test_one_two_three_and_seven_workers_give_the_same_bytes(ray_cluster, tmp_path):
    tables = {}
    for num_workers in (1, 2, 3, 7):
        tables[num_workers], result = run(tmp_path / str(num_workers), f"cluster.num_workers={num_workers}")
        assert result.workers == num_workers
    tables["faiss"], _ = run(tmp_path / "faiss", "cluster.num_workers=2", "cluster.engine=faiss")
    assert all(table == tables[1] for table in tables.values())


@pytest.mark.slow
def test_sums_added_up_by_a_tree_of_tasks_give_the_same_bytes(ray_cluster, tmp_path, monkeypatch):
    options = ("cluster.num_workers=3", "cluster.num_tries=1", "cluster.max_iterations=3", "cluster.tolerance=0")
    by_driver, _ = run(tmp_path / "driver", *options)
    nodes = []
    add_up = cluster_shards._add_up

    def note_and_add_up(*sums):
        nodes.append(len(sums))
        return add_up.remote(*sums)

    monkeypatch.setattr(cluster_shards, "MAX_BYTES_TO_DRIVER", 0)
    monkeypatch.setattr(cluster_shards, "FAN_IN", 2)
    monkeypatch.setattr(cluster_shards, "_add_up", SimpleNamespace(remote=note_and_add_up))
    by_tree, _ = run(tmp_path / "tree", *options)
    assert by_tree == by_driver
    assert nodes == [2, 1, 2] * 4


def test_samples_get_the_label_of_the_nearest_of_good_centroids(ray_cluster, tmp_path):
    """The objective is within one percent of scikit-learn's."""
    _, result = run(tmp_path, "cluster.num_tries=5", "cluster.tolerance=0")
    embedded = pq.ParquetDataset(RunDir(tmp_path).table_files("embeddings")).read()
    embeddings = np.stack(embedded["embedding"].to_numpy()).astype(np.float64)
    centroids = np.stack(pq.read_table(tmp_path / "clusters/centroids.parquet")["centroid"].to_numpy())
    labelled = pq.ParquetDataset(RunDir(tmp_path).table_files("clusters", "pseudo_labels")).read()
    distances = np.linalg.norm(embeddings[:, None] - centroids[None].astype(np.float64), axis=2)
    np.testing.assert_array_equal(labelled["sample_id"], embedded["sample_id"])
    np.testing.assert_array_equal(labelled["pseudo_label"], distances.argmin(1))
    np.testing.assert_allclose(labelled["distance"], distances.min(1), atol=1e-6)
    reference = KMeans(10, n_init=10, random_state=0).fit(embeddings).inertia_ / len(embeddings)
    assert result.objective <= 1.01 * reference


@pytest.mark.slow
def test_a_worker_killed_in_an_iteration_changes_no_byte(ray_cluster, tmp_path, monkeypatch):
    undisturbed, _ = run(tmp_path / "undisturbed", "cluster.num_workers=3")
    killed = []
    assign = cluster_shards.ShardedPoints.assign

    def assign_and_kill(points, centroids):
        if len(killed) < 2:
            killed.append(ray.get(points._workers()[len(killed)].process_id.remote()))
            threading.Timer(0.005, os.kill, (killed[-1], signal.SIGKILL)).start()
        return assign(points, centroids)

    monkeypatch.setattr(cluster_shards._Shard, "process_id", lambda shard: os.getpid(), raising=False)
    monkeypatch.setattr(cluster_shards.ShardedPoints, "assign", assign_and_kill)
    disturbed, _ = run(tmp_path / "disturbed", "cluster.num_workers=3")
    assert len(killed) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in killed)
    assert disturbed == undisturbed


@pytest.mark.slow
def test_a_killed_driver_resumes_at_its_last_iteration_to_the_same_bytes(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SAVE_INTERVAL_S", 0.0)
    calls = []
    dies_at = 0
    assign = cluster_shards.ShardedPoints.assign

    def assign_until(points, centroids):
        calls.append(centroids)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return assign(points, centroids)

    monkeypatch.setattr(cluster_shards.ShardedPoints, "assign", assign_until)
    undisturbed, _ = run(tmp_path / "undisturbed")
    num_calls, dies_at = len(calls), len(calls) + 6
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed")
    assert (tmp_path / "resumed/cluster/kmeans_state.npz").exists()
    resumed, _ = run(tmp_path / "resumed")
    assert resumed == undisturbed
    assert len(calls) == 2 * num_calls + 1, "what was lost is the assignment under way"


@pytest.mark.slow
def test_fewer_distinct_embeddings_than_clusters_are_refused(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    for path in (tmp_path / "embeddings").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.take([0] * table.num_rows).set_column(0, "sample_id", table["sample_id"]), path)
    with pytest.raises(ValueError, match="distinct"):
        run(tmp_path, "cluster.num_clusters=20", "cluster.num_workers=1")


def test_embeddings_that_are_not_finite_are_refused_with_their_ids(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    path = sorted((tmp_path / "embeddings").iterdir())[2]
    table = pq.read_table(path)
    embeddings = schema.matrix_of(table, "embedding").copy()
    embeddings[5, 0], embeddings[6, 3] = np.nan, np.inf
    pq.write_table(table.set_column(1, "embedding", schema.matrix_column(embeddings)), path)
    ids = table["sample_id"].to_pylist()
    with pytest.raises(ValueError, match=f"2 embeddings hold NaN or infinity: sample ids {ids[5]}, {ids[6]};"):
        run(tmp_path, "cluster.num_workers=1")


def test_a_gpu_that_the_cluster_does_not_have_is_refused(ray_cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.device=cuda, but there is no GPU"):
        run(tmp_path, "cluster.device=cuda")


def labels_of(tmp_path) -> np.ndarray:
    return RunDir(tmp_path).read_column("clusters", "pseudo_labels", column="pseudo_label")


TEMI = (
    "cluster.method=temi",
    "cluster.temi.profile=cpu",
    "cluster.temi.num_heads=3",
    "cluster.temi.num_epochs=4",
    "cluster.temi.pca_dim=16",
    "cluster.temi.batch_size=100",
    "cluster.num_neighbors=10",
)


def test_a_pool_smaller_than_a_batch_of_temi_is_one_even_batch():
    config = digits_config("/run").cluster.temi
    assert temi_settings(config, 10, num_samples=200, num_workers=1).batch_size == 200
    assert temi_settings(config, 10, num_samples=203, num_workers=4).batch_size == 200
    assert temi_settings(config, 10, num_samples=5000, num_workers=4).batch_size == 1024
    with pytest.raises(ConfigError, match=r"batch_size=1024 .* give a multiple of 3"):
        temi_settings(config, 10, num_samples=5000, num_workers=3)


def test_a_pool_larger_than_imagenet_sees_as_many_samples_in_larger_batches():
    config = digits_config("/run").cluster.temi
    n = 1_281_167
    sizes = (n - 1, n, 2 * n - 1, 2 * n, 5 * n, 78 * n)
    settings = [temi_settings(config, 10, size, num_workers=4) for size in sizes]
    assert [each.batch_size for each in settings] == [1024, 1024, 1024, 2048, 4096, 8192]
    assert [each.num_epochs for each in settings] == [200, 200, 101, 100, 40, 3]
    for size, each in zip(sizes, settings, strict=True):
        assert each.num_epochs * size < 200 * n + size and each.num_warmup_epochs == each.num_epochs / 10
    # How many samples back the moving averages reach.
    published, largest = settings[0], settings[-1]
    assert largest.teacher_momentum == pytest.approx(published.teacher_momentum**8)
    assert largest.marginal_momentum == pytest.approx(published.marginal_momentum**8)


def test_the_keys_of_temi_hold_for_any_pool():
    config = digits_config("/run", "cluster.temi.batch_size=512", "cluster.temi.num_epochs=7").cluster.temi
    settings = temi_settings(config, 10, 100_000_000, num_workers=4)
    assert (settings.batch_size, settings.num_epochs, settings.num_warmup_epochs) == (512, 7, 20)
    assert (settings.learning_rate, settings.teacher_momentum) == (1e-4, 0.996)
    config = digits_config("/run", "cluster.temi.teacher_momentum=0.5").cluster.temi
    settings = temi_settings(config, 10, 100_000_000, num_workers=4)
    assert (settings.batch_size, settings.teacher_momentum) == (8192, 0.5)
    assert settings.marginal_momentum == pytest.approx(0.9**8)


def test_the_projection_of_the_cpu_profile_fits_a_small_pool(tmp_path):
    config = digits_config(tmp_path, "cluster.method=temi", "cluster.temi.profile=cpu").cluster.temi
    assert [temi_settings(config, 2, n, num_workers=1).pca_dim for n in (2, 33, 129, 5000)] == [1, 32, 128, 128]
    sample = np.random.default_rng(0).normal(size=(33, 200))
    fit_pca(sample, temi_settings(config, 2, 33, num_workers=1).pca_dim)
    config.pca_dim = 7
    assert temi_settings(config, 2, 33, num_workers=1).pca_dim == 7


@pytest.mark.parametrize(("profile", "num_workers"), [("cpu", 3), ("paper", 3), ("cpu", 7)])
def test_workers_that_cannot_share_the_profiles_batch_are_refused_first(tmp_path, profile, num_workers):
    keys = ("cluster.method=temi", f"cluster.temi.profile={profile}", f"cluster.temi.num_workers={num_workers}")
    with pytest.raises(ConfigError, match=f"does not divide evenly among {num_workers} workers"):
        STAGE.requests(digits_config(tmp_path, *keys), Devices(8, 0, "here", 8))
    assert STAGE.requests(digits_config(tmp_path, *keys[:2]), Devices(8, 0, "here", 8))


@pytest.mark.slow
def test_temi_labels_every_sample_by_its_best_head(ray_cluster, tmp_path):
    """Its worker gets every CPU of the cluster, also those that k-means held."""
    _, result = run(tmp_path, *TEMI, "cluster.temi.num_epochs=2", "cluster.num_workers=1")
    assert sum(result.sizes) == len(labels_of(tmp_path)) == 1000
    assert len(result.temi["head_losses"]) == 3
    assert result.temi["head"] == np.argmin(result.temi["head_losses"])


@pytest.mark.slow
def test_temi_gives_better_labels_than_k_means_and_reports_its_heads(ray_cluster, tmp_path):
    _, kmeans_result = run(tmp_path / "kmeans")
    _, result = run(tmp_path / "temi", *TEMI, "cluster.temi.num_epochs=25")
    truth = digit_images(1003)[1][RunDir(tmp_path / "temi").read_column("embeddings", column="sample_id")]
    accuracy = {
        name: matched_accuracy(contingency_table(labels_of(tmp_path / name), truth, 10, 10))
        for name in ("kmeans", "temi")
    }
    assert accuracy["temi"] > accuracy["kmeans"]
    assert len(result.temi["head_losses"]) == 3
    assert result.temi["head"] == np.argmin(result.temi["head_losses"])
    assert sum(result.sizes) == kmeans_result.rows == 1000
    assert 0 < result.trust["right"] <= result.trust["neighbor_purity"] <= 1


@pytest.mark.slow
def test_temi_killed_in_an_epoch_and_resumed_equals_undisturbed(ray_cluster, tmp_path, monkeypatch):
    undisturbed, first = run(tmp_path / "undisturbed", *TEMI)
    train_epoch = cluster_temi.train_epoch

    def train_epoch_and_die(trainer, embeddings, neighbors, seed, epoch):
        mark = tmp_path / "died"
        if epoch == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_epoch(trainer, embeddings, neighbors, seed, epoch)

    monkeypatch.setattr(cluster_temi, "train_epoch", train_epoch_and_die)
    cloudpickle.register_pickle_by_value(cluster_temi)
    try:
        resumed, second = run(tmp_path / "resumed", *TEMI)
    finally:
        cloudpickle.unregister_pickle_by_value(cluster_temi)
    assert (tmp_path / "died").exists()
    assert resumed == undisturbed
    assert first["temi"] == second["temi"]


@pytest.mark.slow
def test_an_estimated_number_of_clusters_says_from_how_many_embeddings(ray_cluster, tmp_path):
    _, result = run(tmp_path, "cluster.num_clusters=auto")
    assert 5 <= result.num_clusters <= 30
    tried = {row["num_clusters"]: row["silhouette"] for row in result.num_clusters_evidence}
    assert max(tried, key=tried.get) == result.num_clusters and len(tried) > 5
