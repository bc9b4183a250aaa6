"""The nearest neighbours of every sample, for TEMI and for baselines that look at the neighbourhood graph.

Reads   embeddings/
Writes  neighbors/ (sample_id, neighbor_ids, similarity), a file for each of embeddings/

A task finds the neighbours of some files' samples in all files, a few at a time; a resumed run skips files that exist.
Exact search costs 2·n²·d operations. Above 200,000 samples CPUs use faiss's inverted file instead, in shards on
actors, around the centroids of a spherical k-means on a sample. It looks into as many lists as the requested recall
takes, measured on a sample, and into more where these hold too few.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from elfs_ray.config import ClusterConfig
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.neighbors.exact import Neighbors, nearest_neighbors
from elfs_ray.methods.neighbors.inverted import InvertedFile, choose_nprobe, merge_neighbors, search_lists
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.runtime.cluster import devices_of_cluster, get_result, num_cpus, run_tasks
from elfs_ray.runtime.progress import Progress
from elfs_ray.stages.cluster import searches_on_gpus
from elfs_ray.stages.cluster.shards import read_embeddings
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
CPUS_OF_A_TURN = 0.5  # of the inverted file's shards, and of the tasks that ask them and wait
_LIST_STREAM, _QUERY_STREAM = 1, 2

Files = list[tuple[str, int]]  # paths with their rows


def run_neighbors(config: ClusterConfig, run_dir: RunDir, num_neighbors: int, seed: int) -> dict[str, Any]:
    """Write neighbors/. Returns the route taken and, for the inverted file, its nprobe and measured recall.

    Raises ValueError when num_neighbors is not below the number of samples.
    """
    devices = devices_of_cluster()
    on_gpus = searches_on_gpus(config, devices)
    files = run_dir.counted_files(schema.EMBEDDINGS)
    num_samples = _num_rows(files)
    if num_neighbors >= num_samples:
        raise ValueError(
            f"cluster.num_neighbors={num_neighbors} of {num_samples} samples: it must be below the number of samples"
        )
    search = config.neighbor_search
    if search == "auto":
        search = "exact" if on_gpus or num_samples <= MAX_EXACT_ON_CPU else "ivf"

    done = {filesystem.basename(path) for path in run_dir.table_files(schema.NEIGHBORS)}
    num_workers = max(1, devices.num_gpus if on_gpus else devices.num_cpus)
    groups = _group(files, min(MAX_QUERIES, -(-num_samples // (MIN_TASKS_PER_WORKER * num_workers))))
    pending = [group for group in groups if any(filesystem.basename(path) not in done for path, _ in group)]
    metrics: dict[str, Any] = {"search": search, "num_neighbors": num_neighbors}
    with Progress("cluster", num_samples, "neighbours found") as progress:
        if search == "exact":
            shards = ray.put(_group(files, _shard_rows(files)))
            device = "cuda" if on_gpus else "cpu"
            searches: list[tuple] = [(shards, run_dir, group, num_neighbors, device) for group in pending]
            results = run_tasks(_exact, searches, num_gpus_each=int(on_gpus))
        else:
            lists, centroids, measured = _build_lists(config, files, num_neighbors, seed)
            metrics |= {"num_lists": len(centroids), "nprobe": measured[-1]["nprobe"]}
            metrics |= {"recall": measured[-1]["recall"], "recall_measured": measured}
            shared = ray.put(centroids)
            searches = [(shared, lists, run_dir, group, metrics["nprobe"], num_neighbors) for group in pending]
            results = run_tasks(_approximate, searches, num_cpus_each=CPUS_OF_A_TURN)
        progress.advance(num_samples - sum(map(_num_rows, pending)))
        for _, count in results:
            progress.advance(count)
    return metrics


def _num_rows(files: Files) -> int:
    return sum(rows for _, rows in files)


def _group(files: Files, max_rows: int) -> list[Files]:
    """Consecutive files with up to `max_rows` rows together, at least one file each."""
    groups: list[Files] = []
    room = 0
    for path, count in files:
        if not groups or count > room:
            groups.append([])
            room = max_rows
        groups[-1].append((path, count))
        room -= count
    return groups


def _shard_rows(files: Files) -> int:
    """Rows of some 256 MiB of embeddings."""
    row_bytes = 2 * filesystem.read_schema(files[0][0]).field(schema.EMBEDDING).type.list_size
    return max(1, SHARD_BYTES // row_bytes)


def _read(files: Files) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (n, d) float16, sample_ids (n,)) of some files."""
    return read_embeddings([path for path, _ in files], _num_rows(files))


def _exact(shards: list[Files], run_dir: RunDir, group: Files, num_neighbors: int, device: str) -> int:
    """Write the neighbours of a group of files, found in all shards; the number of samples."""
    queries, query_ids = _read(group)
    found = nearest_neighbors(queries, query_ids, map(_read, shards), num_neighbors, device=device)
    return _write(run_dir, group, query_ids, found)


def _approximate(
    centroids: np.ndarray, lists: list[Any], run_dir: RunDir, group: Files, nprobe: int, num_neighbors: int
) -> int:
    """Write the neighbours of a group of files, found through the inverted file; the number of samples."""
    torch.set_num_threads(1)
    queries, query_ids = _read(group)
    search = partial(_ask, lists, num_neighbors)
    return _write(run_dir, group, query_ids, search_lists(search, queries, query_ids, centroids, nprobe))


def _ask(shards: list[Any], k: int, *queries_ids_lists: np.ndarray) -> Neighbors:
    """What all shards of the inverted file find together."""
    shared = [ray.put(array) for array in queries_ids_lists]
    return merge_neighbors(ray.get([shard.search.remote(*shared, k) for shard in shards]))


class _ListShard:
    """The samples of some files in the inverted file. Memory: n·(4·d + 24) bytes."""

    def __init__(self, files: Files, centroids: np.ndarray):
        torch.set_num_threads(1)
        self._index = InvertedFile(centroids, *_read(files))

    def search(self, queries: np.ndarray, query_ids: np.ndarray, lists: np.ndarray, k: int) -> Neighbors:
        return self._index.search(queries, query_ids, lists, k)


def _build_lists(
    config: ClusterConfig, files: Files, num_neighbors: int, seed: int
) -> tuple[list[Any], np.ndarray, list[dict[str, float]]]:
    """Actors that hold the inverted file, its centroids, and the recall of each nprobe, the last of them chosen."""
    prepare = ray.remote(num_cpus=1)(_prepare)
    centroids, queries, query_ids, exact = get_result(prepare.remote(files, num_neighbors, seed))
    num_workers = min(config.num_workers or max(1, num_cpus() // 2), num_cpus())
    actor = ray.remote(num_cpus=CPUS_OF_A_TURN, max_restarts=-1, max_task_retries=-1)(_ListShard)
    shared = ray.put(centroids)
    lists: list[Any] = [actor.remote(share, shared) for share in _group(files, -(-_num_rows(files) // num_workers))]

    def search(nprobe: int) -> Neighbors:
        return search_lists(partial(_ask, lists, num_neighbors), queries, query_ids, centroids, nprobe)

    _, measured = choose_nprobe(search, exact, len(centroids), config.neighbor_recall)
    return lists, centroids, measured


def _prepare(files: Files, num_neighbors: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Neighbors]:
    """Centroids of the lists from a sample of the pool, and queries with their exact neighbours to measure recall.

    There are no more lists than the sample has distinct embeddings.
    """
    torch.set_num_threads(1)
    num_samples = _num_rows(files)
    num_lists = max(1, min(LISTS_PER_ROOT * math.isqrt(num_samples), num_samples // LIST_ROWS))
    shards = _group(files, _shard_rows(files))
    shares = {_LIST_STREAM: LIST_ROWS * num_lists / num_samples, _QUERY_STREAM: RECALL_QUERIES / num_samples}
    (rows, ids), (queries, query_ids) = _samples(map(_read, shards), shares, seed)
    rows, ids = _distinct(rows, ids)
    points = ArrayPoints(rows, ids)
    num_lists = min(num_lists, len(rows))
    fit = kmeans(points, num_lists, seed=seed, max_iterations=LIST_ITERATIONS, spherical=True)
    # Of unit length in float16 they are searched like samples: exactly.
    centroids = fit.centroids.astype(np.float16)
    return centroids, queries, query_ids, nearest_neighbors(queries, query_ids, map(_read, shards), num_neighbors)


def _samples(
    shards: Iterator[tuple[np.ndarray, np.ndarray]], shares: dict[int, float], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """About a share of all samples for each stream of random numbers, drawn by the hash of their ids."""
    drawn: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {stream: [] for stream in shares}
    for embeddings, sample_ids in shards:
        for stream, share in shares.items():
            chosen = hash_uniform(seed, stream, sample_ids) < share
            drawn[stream].append((embeddings[chosen], sample_ids[chosen]))
    return [(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])) for parts in drawn.values()]


def _distinct(rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each group of equal embeddings."""
    as_numbers = np.ascontiguousarray(rows + np.float16(0))  # which turns -0.0 into 0.0
    whole_rows = as_numbers.view(np.dtype((np.void, as_numbers.shape[1] * 2)))[:, 0]
    first = np.sort(np.unique(whole_rows, return_index=True)[1])
    return rows[first], ids[first]


def _write(run_dir: RunDir, group: Files, query_ids: np.ndarray, found: Neighbors) -> int:
    start = 0
    for path, rows in group:
        end = start + rows
        columns = [
            pa.array(query_ids[start:end]),
            schema.matrix_column(found.neighbor_ids[start:end]),
            schema.matrix_column(found.similarity[start:end]),
        ]
        table = pa.table(columns, schema=schema.neighbors_schema(found.neighbor_ids.shape[1]))
        filesystem.write_table(run_dir.path(schema.NEIGHBORS, filesystem.basename(path)), table)
        start = end
    return len(query_ids)
