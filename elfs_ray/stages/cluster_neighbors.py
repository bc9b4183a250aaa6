"""The nearest neighbours of every sample, for TEMI and for baselines that look at the neighbourhood graph.

Reads   embeddings/, and clusters' k-means state for the inverted file
Writes  neighbors/ (sample_id, neighbor_ids, similarity), a file for each of embeddings/

A task finds the neighbours of some files' samples in all files, a few at a time; a resumed run skips files that exist.
Exact search costs 2·n²·d operations. Above 200,000 samples CPUs take an inverted file instead, in shards on actors,
which looks into as many lists as the share of exact neighbours that was asked for takes, measured on a sample.
"""

import math
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import ray
import torch

from elfs_ray.config import ClusterConfig
from elfs_ray.methods.hashing import hash_uniform
from elfs_ray.methods.kmeans import kmeans
from elfs_ray.methods.kmeans_points import ArrayPoints
from elfs_ray.methods.neighbors import InvertedFile, Neighbors, choose_nprobe, merge_neighbors, nearest_neighbors
from elfs_ray.progress import Progress
from elfs_ray.ray_runtime import get_result, num_cpus, num_gpus, resolve_device, run_tasks
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_EXACT_ON_CPU = 200_000
MAX_QUERIES = 1 << 18
MIN_TASKS_PER_WORKER = 4
SHARD_BYTES = 256 << 20
RECALL_QUERIES = 1000
LISTS_PER_ROOT = 4  # times the square root of the samples
LIST_ROWS = 39  # faiss's own lower bound of training rows a list
LIST_ITERATIONS = 10
_LIST_STREAM, _QUERY_STREAM = 1, 2


def run_neighbors(config: ClusterConfig, run_dir: RunDir, num_neighbors: int, seed: int) -> dict[str, Any]:
    """Write neighbors/. Returns the route taken and, for the inverted file, its nprobe and measured recall.

    Raises ValueError when num_neighbors is not below the number of samples.
    """
    device = resolve_device(config.device, "cluster.device")
    files = run_dir.table_files(schema.EMBEDDINGS)
    rows = [filesystem.num_rows(path) for path in files]
    num_samples = sum(rows)
    if num_neighbors >= num_samples:
        raise ValueError(
            f"cluster.num_neighbors={num_neighbors} of {num_samples} samples: needed are fewer neighbours than samples"
        )
    search = config.neighbor_search
    if search == "auto":
        search = "exact" if device == "cuda" or num_samples <= MAX_EXACT_ON_CPU else "ivf"

    done = {path.rsplit("/", 1)[1] for path in run_dir.table_files(schema.NEIGHBORS)}
    num_workers = num_gpus() if device == "cuda" else num_cpus()
    groups = _group(files, rows, min(MAX_QUERIES, -(-num_samples // (MIN_TASKS_PER_WORKER * num_workers))))
    pending = [group for group in groups if any(path.rsplit("/", 1)[1] not in done for path in group)]
    figures: dict[str, Any] = {"search": search, "num_neighbors": num_neighbors}
    with Progress("cluster", num_samples, "neighbours found") as progress:
        if search == "exact":
            searches: list[tuple] = [(run_dir, group, files, num_neighbors, device) for group in pending]
            results = run_tasks(_exact, searches, num_gpus_each=1 if device == "cuda" else 0)
        else:
            lists, measured = _build_lists(config, files, num_samples, num_neighbors, seed)
            figures |= {"num_lists": measured[-1]["num_lists"], "nprobe": measured[-1]["nprobe"]}
            figures |= {"recall": measured[-1]["recall"], "recall_measured": measured}
            searches = [(run_dir, group, lists, figures["nprobe"], num_neighbors) for group in pending]
            results = run_tasks(_approximate, searches)
        progress.advance(num_samples - sum(sum(filesystem.num_rows(path) for path in group) for group in pending))
        for _, count in results:
            progress.advance(count)
    return figures


def _group(files: list[str], rows: list[int], max_rows: int) -> list[list[str]]:
    """Consecutive files with up to `max_rows` rows together, at least one file each."""
    groups: list[list[str]] = []
    room = 0
    for path, count in zip(files, rows, strict=True):
        if not groups or count > room:
            groups.append([])
            room = max_rows
        groups[-1].append(path)
        room -= count
    return groups


def _read(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (n, d) float16, sample_ids (n,)) of some files."""
    tables = [filesystem.read_table(path) for path in files]
    embeddings = np.concatenate([schema.matrix_of(table, schema.EMBEDDING) for table in tables])
    return embeddings, np.concatenate([table[schema.SAMPLE_ID].to_numpy() for table in tables])


def _shards(files: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All files, some 256 MiB of embeddings at a time."""
    row_bytes = 2 * filesystem.read_schema(files[0]).field(schema.EMBEDDING).type.list_size
    rows = [filesystem.num_rows(path) for path in files]
    yield from (_read(group) for group in _group(files, rows, max(1, SHARD_BYTES // row_bytes)))


def _exact(run_dir: RunDir, group: list[str], files: list[str], num_neighbors: int, device: str) -> int:
    """Write the neighbours of a group of files, found in all files; the number of samples."""
    queries, query_ids = _read(group)
    return _write(
        run_dir, group, query_ids, nearest_neighbors(queries, query_ids, _shards(files), num_neighbors, device=device)
    )


def _approximate(run_dir: RunDir, group: list[str], lists: list[Any], nprobe: int, num_neighbors: int) -> int:
    """Write the neighbours of a group of files, found through the inverted file; the number of samples."""
    queries, query_ids = _read(group)
    return _write(run_dir, group, query_ids, _search(lists, queries, query_ids, num_neighbors, nprobe))


def _search(lists: list[Any], queries: np.ndarray, query_ids: np.ndarray, k: int, nprobe: int) -> Neighbors:
    """What all shards of the inverted file find together."""
    shared, shared_ids = ray.put(queries), ray.put(query_ids)
    return merge_neighbors(ray.get([shard.search.remote(shared, shared_ids, k, nprobe) for shard in lists]))


class _ListShard:
    """The samples of some files in the inverted file. Memory: n·(2·d + 8) bytes."""

    def __init__(self, files: list[str], centroids: np.ndarray):
        faiss.omp_set_num_threads(1)
        self._index = InvertedFile(centroids)
        for embeddings, sample_ids in _shards(files):
            self._index.add(embeddings, sample_ids)

    def search(self, queries: np.ndarray, query_ids: np.ndarray, k: int, nprobe: int) -> Neighbors:
        return self._index.search(queries, query_ids, k, nprobe=nprobe)


def _build_lists(
    config: ClusterConfig, files: list[str], num_samples: int, num_neighbors: int, seed: int
) -> tuple[list[Any], list[dict[str, float]]]:
    """Actors that hold the inverted file, and the recall measured for each nprobe, the last of them chosen."""
    num_lists = max(1, min(LISTS_PER_ROOT * math.isqrt(num_samples), num_samples // LIST_ROWS))
    centroids, queries, query_ids, exact = get_result(
        ray.remote(num_cpus=1)(_prepare).remote(files, num_samples, num_lists, num_neighbors, seed)
    )
    num_workers = config.num_workers or max(1, num_cpus() // 2)
    shares = _group(files, [filesystem.num_rows(path) for path in files], -(-num_samples // num_workers))
    # Actors wait for most of their time: half a CPU each leaves room for the tasks that ask them.
    actor = ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1)(_ListShard)
    lists: list[Any] = [actor.remote(share, ray.put(centroids)) for share in shares]

    def search(nprobe: int) -> Neighbors:
        parts = [shard.search.remote(queries, query_ids, num_neighbors, nprobe) for shard in lists]
        return merge_neighbors(ray.get(parts), allow_short=True)

    _, measured = choose_nprobe(search, exact, num_lists, config.neighbor_recall)
    return lists, [{"num_lists": num_lists, **row} for row in measured]


def _prepare(
    files: list[str], num_samples: int, num_lists: int, num_neighbors: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Neighbors]:
    """Centroids of the lists from a sample of the pool, and queries with their exact neighbours to measure recall."""
    torch.set_num_threads(1)
    rows, ids = _sample(files, min(1.0, LIST_ROWS * num_lists / num_samples), seed, _LIST_STREAM)
    centroids = kmeans(ArrayPoints(rows, ids), num_lists, seed=seed, max_iterations=LIST_ITERATIONS).centroids
    queries, query_ids = _sample(files, min(1.0, RECALL_QUERIES / num_samples), seed, _QUERY_STREAM)
    return centroids, queries, query_ids, nearest_neighbors(queries, query_ids, _shards(files), num_neighbors)


def _sample(files: list[str], share: float, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """About `share` of all samples, drawn by the hash of their ids."""
    parts = []
    for embeddings, sample_ids in _shards(files):
        drawn = hash_uniform(seed, stream, sample_ids) < share
        parts.append((embeddings[drawn], sample_ids[drawn]))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _write(run_dir: RunDir, group: list[str], query_ids: np.ndarray, found: Neighbors) -> int:
    start = 0
    for path in group:
        end = start + filesystem.num_rows(path)
        columns = [
            pa.array(query_ids[start:end]),
            schema.matrix_column(found.neighbor_ids[start:end]),
            schema.matrix_column(found.similarity[start:end]),
        ]
        table = pa.table(columns, schema=schema.neighbors_schema(found.neighbor_ids.shape[1]))
        filesystem.write_table(run_dir.path(schema.NEIGHBORS, path.rsplit("/", 1)[1]), table)
        start = end
    return len(query_ids)
