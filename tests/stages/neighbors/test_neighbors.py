"""neighbors: the exact ones, and what the inverted file finds of them, for any number of workers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from elfs_ray.methods.neighbors.exact import recall
from elfs_ray.stages import neighbors
from elfs_ray.stages.neighbors import search as neighbor_search
from elfs_ray.stages.neighbors.search import find_neighbors
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.methods.neighbors.test_exact import brute_force, unit
from tests.tables import contents, digits_config, write_embedded

NUM_FILES = 6


def write_embeddings(run_dir: RunDir, rows: np.ndarray) -> None:
    for ids in np.array_split(np.arange(len(rows)), NUM_FILES):
        table = pa.table([ids, schema.matrix_column(rows[ids])], schema=schema.embeddings_schema(rows.shape[1]))
        path = run_dir.path(schema.EMBEDDINGS, schema.range_file(int(ids[0]), int(ids[-1])))
        filesystem.write_table(path, table)


def search(run_dir: RunDir, num_neighbors: int, *overrides: str) -> dict:
    """Make neighbors/ anew; the metrics."""
    filesystem.delete(run_dir.path(schema.NEIGHBORS))
    return find_neighbors(digits_config(Path("/run"), *overrides).cluster, run_dir, num_neighbors, seed=0)


def neighbors_in(run_dir: RunDir) -> np.ndarray:
    tables = [filesystem.read_table(path) for path in run_dir.table_files(schema.NEIGHBORS)]
    return np.concatenate([schema.matrix_of(table, schema.NEIGHBOR_IDS) for table in tables])


def uneven_pool() -> np.ndarray:
    """4,000 embeddings in tight groups of exponential sizes, and a few far from all of them."""
    random = np.random.default_rng(5)
    sizes = random.exponential(size=150)
    sizes = np.maximum(1, np.floor(sizes / sizes.sum() * 4000)).astype(int)
    rows = np.repeat(random.normal(size=(150, 16)), sizes, axis=0)
    return random.permutation(unit(rows + 0.02 * random.normal(size=rows.shape)))


def test_neighbours_equal_brute_force_for_any_number_of_tasks(ray_cluster, tmp_path, monkeypatch):
    tables = []
    for max_queries in (10_000, 200):
        monkeypatch.setattr(neighbor_search, "MAX_QUERIES", max_queries)
        run_dir = RunDir(tmp_path / str(max_queries))
        write_embedded(run_dir)
        search(run_dir, 7)
        tables.append(contents(tmp_path / str(max_queries), "neighbors"))
    assert tables[0] == tables[1]

    embedded = pq.ParquetDataset(run_dir.table_files("embeddings")).read()
    ids, rows = embedded["sample_id"].to_numpy(), schema.matrix_of(embedded, schema.EMBEDDING)
    np.testing.assert_array_equal(neighbors_in(run_dir), brute_force(rows, ids, rows, ids, 7).neighbor_ids)


@pytest.mark.parametrize("kind", ["exact", pytest.param("ivf", marks=pytest.mark.slow)])
def test_a_block_whose_images_were_all_rejected_has_no_neighbours(ray_cluster, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(neighbor_search, "MAX_QUERIES", 1)  # each file for itself
    run_dir, rows = RunDir(tmp_path), unit(np.random.default_rng(9).normal(size=(600, 16)))
    write_embeddings(run_dir, rows)
    empty = pa.table([[], schema.matrix_column(rows[:0])], schema=schema.embeddings_schema(16))
    filesystem.write_table(run_dir.path(schema.EMBEDDINGS, schema.range_file(600, 699)), empty)
    search(run_dir, 7, f"cluster.neighbor_search={kind}")
    assert len(run_dir.table_files(schema.NEIGHBORS)) == NUM_FILES + 1
    assert neighbors_in(run_dir).shape == (600, 7)


def test_a_resumed_search_is_of_the_kind_that_it_began_as(ray_cluster, tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    assert search(run_dir, 7)["search"] == "exact"
    before = contents(tmp_path, "neighbors")
    filesystem.delete(run_dir.table_files(schema.NEIGHBORS)[-1])
    monkeypatch.setattr(neighbors, "MAX_EXACT_ON_CPU", 1)  # as if GPUs had been there before
    assert find_neighbors(digits_config(tmp_path).cluster, run_dir, 7, seed=0)["search"] == "exact"
    assert contents(tmp_path, "neighbors") == before


@pytest.mark.slow
def test_the_inverted_file_reaches_the_requested_recall(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    search(run_dir, 7, "cluster.neighbor_search=exact")
    exact = neighbors_in(run_dir)
    metrics = search(run_dir, 7, "cluster.neighbor_search=ivf", "cluster.neighbor_recall=0.9")
    assert metrics["recall"] == recall(neighbors_in(run_dir), exact) >= 0.9, "all of this pool is the sample"


@pytest.mark.slow
def test_the_inverted_file_finds_the_neighbours_of_uneven_groups(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbor_search, "RECALL_QUERIES", 100)
    run_dir, rows = RunDir(tmp_path), uneven_pool()
    write_embeddings(run_dir, rows)
    options = ("cluster.neighbor_search=ivf", "cluster.neighbor_recall=0.8")
    tables = []
    # A shard on one worker; one on each; two copies of three shards; copies of the whole pool.
    for num_workers, max_queries, shard_bytes in ((1, 10_000, 1), (3, 10_000, 1), (7, 100, 150_000), (2, 700, 1 << 30)):
        monkeypatch.setattr(neighbor_search, "MAX_QUERIES", max_queries)
        monkeypatch.setattr(neighbor_search, "LIST_SHARD_BYTES", shard_bytes)
        metrics = search(run_dir, 30, *options, f"cluster.num_workers={num_workers}")
        tables.append(contents(tmp_path, "neighbors"))
    assert all(table == tables[0] for table in tables)
    nearest = neighbors_in(run_dir)
    assert metrics["nprobe"] < metrics["num_lists"] and (nearest >= 0).all()
    exact = brute_force(rows, np.arange(len(rows)), rows, np.arange(len(rows)), 30).neighbor_ids
    assert recall(nearest, exact) >= 0.8


@pytest.mark.slow
def test_a_search_for_copies_alone_finds_them_in_fewer_lists(ray_cluster, tmp_path):
    run_dir, rng = RunDir(tmp_path), np.random.default_rng(7)
    rows = unit(rng.normal(size=(3000, 32)))
    rows[2000:] = unit(rows[:1000].astype(np.float32) + 0.02 * rng.normal(size=(1000, 32)))
    write_embeddings(run_dir, rows)
    config = digits_config(tmp_path, "cluster.neighbor_search=ivf").cluster
    every = neighbor_search.find_neighbors(config, run_dir, 8, 0)
    filesystem.delete(run_dir.path(schema.NEIGHBORS))
    copies = neighbor_search.find_neighbors(config, run_dir, 8, 0, copies_alone=True)
    assert copies["nprobe"] < every["nprobe"] and copies["recall"] >= 0.95
    assert (neighbors_in(run_dir)[2000:, 0] == np.arange(1000)).mean() >= 0.95


def test_made_up_copies_are_as_similar_as_they_should_be():
    rows = unit(np.random.default_rng(8).normal(size=(50, 64)))
    copies = neighbor_search._made_up_copies(rows, seed=3).astype(np.float64)
    np.testing.assert_allclose((copies * rows).sum(1), 0.9, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(copies, axis=1), 1, atol=2e-3)


@pytest.mark.slow
def test_the_inverted_file_has_no_more_lists_than_distinct_embeddings(ray_cluster, tmp_path):
    run_dir, random = RunDir(tmp_path), np.random.default_rng(6)
    rows = unit(random.normal(size=(25, 16)))[random.integers(25, size=3000)]
    rows[:, 3] = np.where(random.integers(2, size=3000), np.float16(0.0), np.float16(-0.0))
    write_embeddings(run_dir, unit(rows))
    metrics = search(run_dir, 10, "cluster.neighbor_search=ivf")
    assert metrics["num_lists"] == 25 and metrics["recall"] >= 0.95
    assert (neighbors_in(run_dir) >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 50])
def test_the_inverted_file_needs_no_more_than_one_free_cpu(ray_cluster, tmp_path, monkeypatch, num_workers):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    held = ray.remote(num_cpus=int(ray.available_resources()["CPU"]) - 1)(_Idle).remote()
    ray.get(held.ready.remote())
    monkeypatch.setattr(neighbor_search, "num_cpus", lambda: 1)
    search(run_dir, 7, "cluster.neighbor_search=ivf", f"cluster.num_workers={num_workers}")
    ray.kill(held)
    assert (neighbors_in(run_dir) >= 0).all()


class _Idle:
    """Holds CPUs of the cluster without using them."""

    def ready(self) -> None:
        pass


def test_as_many_neighbours_as_samples_are_refused(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    with pytest.raises(ValueError, match=r"cluster\.num_neighbors=1000 of 1000 samples: it must be below"):
        search(run_dir, 1000)


@pytest.mark.slow
def test_every_file_of_a_bucket_is_counted_once(ray_cluster, s3_server, s3_bucket):
    run_dir, rows = RunDir(f"{s3_bucket}/run"), uneven_pool()[:600]
    write_embeddings(run_dir, rows)
    path = run_dir.table_files(schema.EMBEDDINGS)[0]

    def requests_of(function, *arguments) -> int:
        before = s3_server.num_requests()
        function(*arguments)
        return s3_server.num_requests() - before

    table = filesystem.read_table(path)
    counting, reading = (requests_of(function, path) for function in (filesystem.num_rows, filesystem.read_table))
    writing = requests_of(filesystem.write_table, f"{s3_bucket}/x/y", table)
    tasks = NUM_FILES * ((1 + NUM_FILES) * reading + writing)
    assert requests_of(search, run_dir, 5) <= tasks + (NUM_FILES + 1) * counting + 10
